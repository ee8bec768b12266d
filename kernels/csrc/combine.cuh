// The weighted sum of every token's slots. A unit is one token x 256 columns, 8 columns a lane.
//
// Units of a column group are claimed dynamically: by service warps while the products of later groups run, by math
// warps after their last product. No products follow the last group, and with few tokens a claim costs more than it
// saves. Those units are assigned statically instead: every math warp of the grid computes which are its own.
#pragma once
#include "epilogue.cuh"

namespace hopper_moe {

constexpr int kMinTokensToCombineEarly = 256;
constexpr int kCombineColumns = 256;  // of one unit
constexpr int kGroupPieces =
    kGroupTiles * kRowTile / kCombineColumns;  // units of one token and column group; the last group may have fewer
constexpr int kSlotsInFlight = 6;              // loads of one unit before the first sum
constexpr int kMathUnits = 4;                  // units that a math warp has in flight, with four times the registers
constexpr int kMaxClaim = 8;                   // units of one claim
constexpr int kFirstWarpBarrier = 1;           // of the math warps' named barriers; 0 is that of __syncthreads
static_assert(kGroupPieces == 2, "CombinePlan divides by shifting");

struct CombineUnit {
  int token, column;
};

// Numbering of the units of a launch, and which of them are claimed dynamically. Pieces of a token are consecutive.
struct CombinePlan {
  int num_tokens, num_groups, last_pieces;
  int num_claimed;  // groups 0 .. num_claimed - 1 are claimed, the others assigned statically

  __host__ __device__ CombinePlan(const Shape& s, int num_tokens)
      : num_tokens(num_tokens),
        num_groups(s.num_column_groups()),
        last_pieces(ceil_div(s.hidden, kCombineColumns) - (num_groups - 1) * kGroupPieces),
        num_claimed(num_tokens < kMinTokensToCombineEarly ? 0 : num_groups - 1) {}

  __host__ __device__ int num_units(int group) const {
    return num_tokens * (group == num_groups - 1 ? last_pieces : kGroupPieces);
  }
  __host__ __device__ int num_shared() const {
    return num_tokens * ((num_groups - 1 - num_claimed) * kGroupPieces + last_pieces);
  }
  __host__ __device__ int group_of_shared(int number) const {
    return num_claimed + number / (num_tokens * kGroupPieces);
  }
  __host__ __device__ CombineUnit unit(int group, int number) const {
    const int halves = group == num_groups - 1 ? last_pieces - 1 : 1, token = number >> halves;
    return {token, (group * kGroupPieces + number - (token << halves)) * kCombineColumns};
  }
  __host__ __device__ CombineUnit shared_unit(int group, int number) const {
    return unit(group, number - (group - num_claimed) * num_tokens * kGroupPieces);
  }
  // With few units a claim is one unit, so that more warps get work.
  __host__ __device__ int claim() const {
    return num_tokens >= 512 * kMaxClaim ? kMaxClaim : num_tokens < 1024 ? 1 : num_tokens / 512;
  }
};

// Eight columns of a combine slot, loaded long before they are summed.
struct Bf16Slots {
  struct Piece {
    uint4 v;
  };
  const uint16_t* slots;
  int64_t stride;
  __device__ Bf16Slots(const MegaMoeParams& p, int token, int column)
      : slots(p.local<uint16_t>(p.ws.combine) + int64_t{token} * p.shape.top_k * p.shape.hidden + column),
        stride(p.shape.hidden) {}
  __device__ __forceinline__ Piece load(int k) const { return {ptx::load_l2(slots + k * stride)}; }
  __device__ static __forceinline__ void add(float (&sum)[8], const Piece& piece) {
    const uint32_t words[4] = {piece.v.x, piece.v.y, piece.v.z, piece.v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sum[2 * w] += ptx::bf16_low(words[w]);
      sum[2 * w + 1] += ptx::bf16_high(words[w]);
    }
  }
};

struct E4m3Slots {
  struct Piece {
    uint2 q;
    float scale;
  };
  const uint8_t* slots;
  const float* scales;
  int64_t stride, scale_stride;
  __device__ E4m3Slots(const MegaMoeParams& p, int token, int column)
      : slots(p.local<uint8_t>(p.ws.combine) + int64_t{token} * p.shape.top_k * p.shape.hidden + column),
        scales(p.local<float>(p.ws.combine_scale) + int64_t{token} * p.shape.top_k * p.shape.num_combine_groups() +
               column / kCombineGroup),
        stride(p.shape.hidden),
        scale_stride(p.shape.num_combine_groups()) {}
  __device__ __forceinline__ Piece load(int k) const {
    return {__ldcg(reinterpret_cast<const uint2*>(slots + k * stride)), __ldcg(scales + k * scale_stride)};
  }
  __device__ static __forceinline__ void add(float (&sum)[8], const Piece& piece) {
    const uint32_t words[2] = {piece.q.x, piece.q.y};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 v = ptx::from_e4m3x2(static_cast<uint16_t>(words[w / 2] >> w % 2 * 16));
      sum[2 * w] = __fadd_rn(sum[2 * w], __fmul_rn(v.x, piece.scale));
      sum[2 * w + 1] = __fadd_rn(sum[2 * w + 1], __fmul_rn(v.y, piece.scale));
    }
  }
};

// A lane's slot of a token; negative where it is invalid. Loaded early, used late.
__device__ __forceinline__ int slot_id(const MegaMoeParams& p, int token, int lane) {
  return lane < p.shape.top_k ? __ldg(p.local<int>(p.ws.topk_ids) + token * p.shape.top_k + lane) : -1;
}

// Adds slots first .. first + kSlots - 1 of some tokens to their sums in ascending order, all loads in flight at once.
template <typename Slots, int kSlots, int kUnits>
__device__ __forceinline__ void add_slots(const MegaMoeParams& p, const CombineUnit (&units)[kUnits],
                                          const uint32_t (&valid)[kUnits], int first, int lane,
                                          float (&sum)[kUnits][8]) {
  typename Slots::Piece v[kUnits][kSlots];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int column = units[u].column + lane * 8;
    const Slots slots(p, units[u].token, column);
    const uint32_t rest = column < p.shape.hidden ? valid[u] >> first : 0;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      v[u][k] = {};  // an invalid slot adds +0, which does not change a sum that starts at +0; it also ends the live
                     // range of the previous unit's value for ptxas
      if (rest >> k & 1) v[u][k] = slots.load(first + k);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) Slots::add(sum[u], v[u][k]);
  }
}

// The sums of some tokens. `valid`: bit k for slot k; zero, with a negative token, where there is no unit. Requires
// that every L2 task of these columns has stored its rows.
template <typename Slots, int kUnits>
__device__ __forceinline__ void combine_units(const MegaMoeParams& p, const CombineUnit (&units)[kUnits],
                                              const uint32_t (&valid)[kUnits], int lane) {
  const int hidden = p.shape.hidden;
  float sum[kUnits][8] = {};
  add_slots<Slots, kSlotsInFlight>(p, units, valid, 0, lane, sum);
  for (int first = kSlotsInFlight; first < p.shape.top_k; first += 2)
    add_slots<Slots, 2>(p, units, valid, first, lane, sum);  // beside 8 sums a unit
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int column = units[u].column + lane * 8;
    if (units[u].token < 0 || column >= hidden) continue;
    uint4 out;
    out.x = ptx::to_bf16x2(sum[u][0], sum[u][1]);
    out.y = ptx::to_bf16x2(sum[u][2], sum[u][3]);
    out.z = ptx::to_bf16x2(sum[u][4], sum[u][5]);
    out.w = ptx::to_bf16x2(sum[u][6], sum[u][7]);
    *reinterpret_cast<uint4*>(p.y + int64_t{units[u].token} * hidden + column) = out;
  }
}

// Whether a rank has stored its rows of a column group.
__device__ __forceinline__ bool has_rows(const MegaMoeParams& p, int num_blocks, int group, int rank, uint32_t launch) {
  const Shape& s = p.shape;
  if (s.num_ranks > 1)
    return has_reached(p.local<uint32_t>(p.ws.results_sent) + rank * s.num_column_groups() + group, launch);
  return ptx::load_acquire_gpu(p.group_done(launch) + group) >=
         static_cast<uint32_t>(num_blocks) * TaskList::group_width(s, group) * kServiceWarps;
}

// The units that one warp has claimed, column group by column group.
class UnitClaims {
 public:
  __device__ UnitClaims(const MegaMoeParams& p, int num_blocks, uint32_t launch, int lane)
      : p_(p), plan_(p.shape, p.num_tokens), num_blocks_(num_blocks), lane_(lane), launch_(launch) {}

  __device__ __forceinline__ const CombinePlan& plan() const { return plan_; }
  __device__ __forceinline__ int group() const { return group_; }  // of the claimed units, or of the next claim
  __device__ __forceinline__ int num_in_hand() const { return last_ - next_; }
  // The i-th of the claimed units.
  __device__ __forceinline__ CombineUnit unit(int i) const { return plan_.unit(group_, next_ + i); }
  __device__ __forceinline__ void use(int num) { next_ += num; }
  __device__ __forceinline__ bool finished() const { return group_ >= plan_.num_claimed; }

  // Claims units if none are left; with kComplete only of a group whose rows have all arrived. Returns false if there
  // are none to claim.
  template <bool kComplete>
  __device__ __forceinline__ bool claim() {
    while (true) {
      if (!entered_) skip_claimed();
      if (finished()) return false;
      if (kComplete && !entered_) {
        const bool there = lane_ >= p_.shape.num_ranks || has_rows(p_, num_blocks_, group_, lane_, launch_);
        if (!__all_sync(~0u, there)) return false;
        __syncwarp();  // makes what single lanes have acquired visible to all lanes
      }
      const int num = plan_.claim(), num_units = plan_.num_units(group_);
      uint32_t first = 0;
      if (lane_ == 0) first = atomicAdd(p_.group_claimed(launch_) + group_, num);
      next_ = static_cast<int>(__shfl_sync(~0u, first, 0));
      last_ = min(next_ + num, num_units);
      entered_ = next_ < num_units;
      if (entered_) return true;
      next_ = last_;
    }
  }

 private:
  // Advances to the first group with unclaimed units: one read of all counters instead of one atomic operation per
  // group and warp.
  __device__ __forceinline__ void skip_claimed() {
    while (group_ < plan_.num_claimed) {
      const int mine = group_ + lane_;
      const bool left = mine < plan_.num_claimed &&
                        static_cast<int>(__ldcg(p_.group_claimed(launch_) + mine)) < plan_.num_units(mine);
      const uint32_t groups_left = __ballot_sync(~0u, left);
      if (groups_left) {
        group_ += __ffs(groups_left) - 1;
        return;
      }
      group_ += 32;
    }
  }

  const MegaMoeParams& p_;
  const CombinePlan plan_;
  const int num_blocks_, lane_;
  const uint32_t launch_;
  int group_ = 0, next_ = 0, last_ = 0;
  bool entered_ = false;  // this warp has claimed units of group_
};

// Combining in a service warp: one unit per step, because a finished tile may be waiting.
template <typename Slots>
class EarlyCombiner {
 public:
  __device__ EarlyCombiner(const MegaMoeParams& p, int num_blocks, uint32_t launch, int lane)
      : p_(p), lane_(lane), claims_(p, num_blocks, launch, lane) {}

  __device__ __forceinline__ bool finished() const { return claims_.finished(); }
  __device__ __forceinline__ int group() const { return claims_.group(); }  // the current group

  // Returns false if there is nothing to combine now.
  __device__ __forceinline__ bool step() {
    if (claims_.num_in_hand() == 0) {
      if (!claims_.claim<true>()) return false;
      look_up();
      num_done_ = 0;
    }
    const CombineUnit units[1] = {claims_.unit(0)};
    const uint32_t valid[1] = {__shfl_sync(~0u, valid_, num_done_++ * kLanesPerUnit)};
    claims_.use(1);
    combine_units<Slots, 1>(p_, units, valid, lane_);
    return true;
  }

 private:
  static constexpr int kLanesPerUnit = 32 / kMaxClaim;

  // Loads the valid slots of all claimed units, so that a step need not wait for them before it loads rows.
  __device__ __forceinline__ void look_up() {
    const int unit = lane_ / kLanesPerUnit, top_k = p_.shape.top_k;
    valid_ = 0;
    if (unit < claims_.num_in_hand()) {
      const int* ids = p_.local<int>(p_.ws.topk_ids) + claims_.unit(unit).token * top_k;
      for (int k = lane_ % kLanesPerUnit; k < top_k; k += kLanesPerUnit)
        valid_ |= static_cast<uint32_t>(__ldg(ids + k) >= 0) << k;
    }
#pragma unroll
    for (int step = 1; step < kLanesPerUnit; step *= 2) valid_ |= __shfl_xor_sync(~0u, valid_, step);
  }

  const MegaMoeParams& p_;
  const int lane_;
  UnitClaims claims_;
  uint32_t valid_ = 0;  // of the claimed units, kLanesPerUnit lanes each
  int num_done_ = 0;    // units of the claim that are finished
};

// Combining in a math warp after its last product: the unclaimed units, then its static share, units worker, worker +
// num_workers, ... If there are tokens, every group has a unit, and the warp that combines it has waited for all ranks;
// the end of a launch relies on that (peers.cuh).
template <typename Slots>
__device__ inline void combine_rest(const MegaMoeParams& p, int num_blocks, uint32_t launch, int worker,
                                    int num_workers, int lane) {
  UnitClaims claims(p, num_blocks, launch, lane);
  const CombinePlan& plan = claims.plan();
  const int num_shared = plan.num_shared();
  // Eight lanes wait for each unit: one per rank that may send rows of it.
  static_assert(kMathUnits * kMaxRanks == 32);
  const int my_unit = lane / kMaxRanks, my_rank = lane % kMaxRanks;
  while (true) {
    CombineUnit mine{-1, 0};
    int group = -1;
    if (claims.num_in_hand() > 0 || claims.claim<false>()) {
      const int num = min(claims.num_in_hand(), kMathUnits);
      group = claims.group();
      if (my_unit < num) mine = claims.unit(my_unit);
      claims.use(num);
    } else if (worker < num_shared) {
      const int number = worker + my_unit * num_workers;
      if (number < num_shared) {
        group = plan.group_of_shared(number);
        mine = plan.shared_unit(group, number);
      }
      worker += kMathUnits * num_workers;
    } else {
      return;
    }
    CombineUnit units[kMathUnits];
    int ids[kMathUnits];
#pragma unroll
    for (int u = 0; u < kMathUnits; ++u) {
      units[u] = {__shfl_sync(~0u, mine.token, u * kMaxRanks), __shfl_sync(~0u, mine.column, u * kMaxRanks)};
      ids[u] = units[u].token >= 0 ? slot_id(p, units[u].token, lane) : -1;
    }
    // The whole warp polls and leaves the loop together: if lanes wait separately, ptxas takes the descriptors of all
    // products out of uniform registers (32 R2UR a loop).
    const bool waits = mine.token >= 0 && my_rank < p.shape.num_ranks;
    const uint64_t begin = ptx::global_timer();
    while (const uint32_t missing = __ballot_sync(~0u, waits && !has_rows(p, num_blocks, group, my_rank, launch))) {
      const bool late = p.shape.num_ranks > 1 && ptx::global_timer() - begin > p.timeout_ns;
      if (__any_sync(~0u, late)) give_up(p, PeerStep::kResults, (__ffs(missing) - 1) % kMaxRanks, launch);
      __nanosleep(64);  // hundreds of warps may poll one address, and the increments that they wait for go through the
                        // same L2 slice
    }
    // Makes what single lanes have acquired visible to the loads of all lanes; a vote does not. __syncwarp would, but
    // then ptxas takes the descriptors out of uniform registers as above and serialises all products (C7512).
    ptx::sync_warp(kFirstWarpBarrier + threadIdx.x / 32);
    uint32_t valid[kMathUnits];
#pragma unroll
    for (int u = 0; u < kMathUnits; ++u) valid[u] = __ballot_sync(~0u, ids[u] >= 0);
    combine_units<Slots, kMathUnits>(p, units, valid, lane);
  }
}

}  // namespace hopper_moe
