// The weighted sum of every token's slots, column group by column group.
#pragma once
#include "epilogue.cuh"

namespace hopper_moe {

// The columns of one group, cut into units of one token x 256 columns (8 a lane).
struct CombineGroup {
  int first_column, num_columns, pieces, num_units;
  uint32_t target;                   // (L2 task, service warp) pairs of the group

  __device__ CombineGroup(const MegaMoeParams& p, const TaskList& tasks, int group) {
    const int num_tiles = TaskList::group_width(p.shape, group);
    first_column = group * kGroupTiles * kRowTile;
    num_columns = num_tiles * kRowTile;
    pieces = ceil_div(num_columns, 256);
    num_units = p.num_tokens * pieces;
    target = static_cast<uint32_t>(tasks.num_blocks) * num_tiles * kServiceWarps;
  }
};

// Eight columns of a combine slot on their way to the sum. Loads are started long before they are used.
struct Bf16Slots {
  struct Piece {
    uint4 v;
  };
  const uint16_t* slots;
  int64_t stride;
  __device__ Bf16Slots(const MegaMoeParams& p, int token, int column)
      : slots(p.local<uint16_t>(p.ws.combine) + int64_t{token} * p.shape.top_k * p.shape.hidden + column), stride(p.shape.hidden) {}
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
        scales(p.local<float>(p.ws.combine_scale) + int64_t{token} * p.shape.top_k * p.shape.num_combine_groups() + column / kCombineGroup),
        stride(p.shape.hidden), scale_stride(p.shape.num_combine_groups()) {}
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

// Sums the slots of one unit's token in ascending order. Every L2 task of the group has stored its rows.
template <typename Slots>
__device__ inline void combine_unit(const MegaMoeParams& p, const CombineGroup& group, int unit, int lane) {
  const Shape& s = p.shape;
  const int token = unit / group.pieces, offset = (unit - token * group.pieces) * 256 + lane * 8;
  const int id = lane < s.top_k ? __ldg(p.local<int>(p.ws.topk_ids) + token * s.top_k + lane) : -1;
  uint32_t valid = __ballot_sync(~0u, id >= 0);
  if (offset >= group.num_columns) return;
  const int column = group.first_column + offset;
  const Slots slots(p, token, column);
  float sum[8] = {};
  while (valid) {
    typename Slots::Piece v[4];
    uint32_t rest = valid;
#pragma unroll
    for (int i = 0; i < 4; ++i) {    // four loads in flight
      if (rest) v[i] = slots.load(__ffs(rest) - 1);
      rest &= rest - 1;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!valid) break;
      Slots::add(sum, v[i]);
      valid &= valid - 1;
    }
  }
  uint4 out;
  out.x = ptx::to_bf16x2(sum[0], sum[1]);
  out.y = ptx::to_bf16x2(sum[2], sum[3]);
  out.z = ptx::to_bf16x2(sum[4], sum[5]);
  out.w = ptx::to_bf16x2(sum[6], sum[7]);
  *reinterpret_cast<uint4*>(p.y + int64_t{token} * s.hidden + column) = out;
}

// Units are claimed, a few at a time, by whichever warp is free: service warps while tiles are on their way, every warp at the end.
template <typename Slots>
class Combiner {
 public:
  __device__ Combiner(const MegaMoeParams& p, const TaskList& tasks, int lane, uint32_t launch) : p_(p), tasks_(tasks), lane_(lane), launch_(launch) {}

  __device__ __forceinline__ bool finished() const { return group_ >= p_.shape.num_column_groups(); }

  // Combines some units of the first group with any left. False: its L2 tasks are still running (never with `wait`) or all is done.
  __device__ __forceinline__ bool step(bool wait) {
    if (!ready_) skip_claimed();
    if (finished()) return false;
    const CombineGroup group(p_, tasks_, group_);
    if (!ready_ && !has_rows(group, wait)) return false;
    ready_ = true;
    // Few units: one each, so that every warp gets a share.
    const int num = group.num_units > kManyUnits ? 4 : 1;
    uint32_t first = 0;
    if (lane_ == 0) first = atomicAdd(p_.group_claimed(launch_) + group_, num);
    first = __shfl_sync(~0u, first, 0);
    if (first >= static_cast<uint32_t>(group.num_units)) {
      ready_ = false;
      return true;
    }
    const int last = min(static_cast<int>(first) + num, group.num_units);
    for (int unit = first; unit < last; ++unit) combine_unit<Slots>(p_, group, unit, lane_);
    return true;
  }

 private:
  static constexpr int kManyUnits = 8192;

  // Whether every rank has stored its rows of the group.
  __device__ __forceinline__ bool has_rows(const CombineGroup& group, bool wait) const {
    const int num_ranks = p_.shape.num_ranks;
    bool there = true;
    if (num_ranks > 1) {
      if (lane_ < num_ranks) {
        const uint32_t* sent = p_.local<uint32_t>(p_.ws.results_sent) + lane_ * p_.shape.num_column_groups() + group_;
        if (wait) wait_for_peer(p_, sent, launch_, PeerStep::kResults, lane_);
        there = wait || has_reached(sent, launch_);
      }
    } else if (wait) {
      if (lane_ == 0) ptx::wait_at_least(p_.group_done(launch_) + group_, group.target);
    } else {
      there = ptx::load_acquire_gpu(p_.group_done(launch_) + group_) >= group.target;
    }
    return __all_sync(~0u, there);
  }

  // Moves on to the first group with unclaimed units: one look at all counters instead of one atomic operation a group and warp.
  __device__ __forceinline__ void skip_claimed() {
    const int num_groups = p_.shape.num_column_groups();
    while (group_ < num_groups) {
      const int group = group_ + lane_;
      const bool left = group < num_groups &&
                        static_cast<int>(__ldcg(p_.group_claimed(launch_) + group)) < CombineGroup(p_, tasks_, min(group, num_groups - 1)).num_units;
      const uint32_t groups_left = __ballot_sync(~0u, left);
      if (groups_left) {
        group_ += __ffs(groups_left) - 1;
        return;
      }
      group_ += 32;
    }
  }

  const MegaMoeParams& p_;
  const TaskList& tasks_;
  const int lane_;
  const uint32_t launch_;
  int group_ = 0;
  bool ready_ = false;
};

}  // namespace hopper_moe
