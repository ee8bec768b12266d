// Copies rows from their source ranks into the expert pools, in the layout that the products read.
#pragma once
#include "epilogue.cuh"

namespace hopper_moe {

// E4M3 bytes of the E2M1 magnitudes 0 .5 1 1.5 | 2 3 4 6.
constexpr uint32_t kE2m1AsE4m3Low = 0x3C383000u, kE2m1AsE4m3High = 0x4C484440u;

// Source and destination of a pool row. Rows are numbered over the valid rows of all local experts; the rows of an
// expert are ordered by source rank.
struct PoolRow {
  int rank, slot;             // source: slot = token * top_k + k
  int block, block_row, row;  // block number, its first pool row, the row inside it
  int tile;

  PoolRow() = default;
  __device__ PoolRow(const MegaMoeParams& p, const ExpertTable& table, int index) {
    const Shape& s = p.shape;
    const int expert = find_expert(table.slot_base, s.num_local_experts, index),
              position = index - table.slot_base[expert];
    int from = position;
    rank = 0;
    while (from >= table.rank_count[rank * s.num_local_experts + expert])
      from -= table.rank_count[rank++ * s.num_local_experts + expert];
    slot = __ldcg(p.peer<int>(rank, p.ws.slot_list) + int64_t{s.first_expert + expert} * s.list_stride() + from);
    const int in_expert = position / p.tiles.max_tile, first = in_expert * p.tiles.max_tile;
    const int rest = table.slot_base[expert + 1] - table.slot_base[expert] - first;
    tile = rest >= p.tiles.max_tile ? p.tiles.max_tile : tail_tile(p.tiles, rest);
    block = table.block_base[expert] + in_expert;
    block_row = row_in_wave(p, table.row_base[expert] + first);
    row = position - first;
  }

  // The row that lane `from` has looked up.
  __device__ __forceinline__ PoolRow(const PoolRow& mine, int from)
      : rank(__shfl_sync(~0u, mine.rank, from)),
        slot(__shfl_sync(~0u, mine.slot, from)),
        block(__shfl_sync(~0u, mine.block, from)),
        block_row(__shfl_sync(~0u, mine.block_row, from)),
        row(__shfl_sync(~0u, mine.row, from)),
        tile(__shfl_sync(~0u, mine.tile, from)) {}
};

// The rows begin, begin + stride, ... < end that one warp copies. Each lane looks up one of them, so that 32 rows share
// the latency of one search and of one read of a (remote) slot list.
class RowQueue {
 public:
  __device__ RowQueue(const MegaMoeParams& p, const ExpertTable& table, int begin, int stride, int end, int lane)
      : p_(p), table_(table), next_(begin), stride_(stride), end_(end), lane_(lane) {
    if (!empty()) look_up();
  }

  __device__ __forceinline__ bool empty() const { return next_ >= end_; }
  __device__ __forceinline__ int index() const { return next_; }  // of the row that pop() returns
  __device__ __forceinline__ PoolRow pop() {
    const PoolRow row(mine_, taken_);
    next_ += stride_;
    if (++taken_ == 32 && !empty()) look_up();
    return row;
  }

 private:
  __device__ __forceinline__ void look_up() {
    mine_ = PoolRow(p_, table_, min(next_ + lane_ * stride_, end_ - 1));
    taken_ = 0;
  }

  const MegaMoeParams& p_;
  const ExpertTable& table_;
  int next_;
  const int stride_, end_, lane_;
  PoolRow mine_;
  int taken_ = 0;
};

// A lane copies the 16-byte chunks lane, lane + 32, ... of a row: always the same chunk of a 128-byte line, four lines
// apart.
struct PoolLane {
  uint8_t* at;
  int stride;
  __device__ PoolLane(uint8_t* block, const PoolRow& to, int lane)
      : at(block + lane / 8 * to.tile * kUnitK + swizzled(to.row, lane % 8)), stride(4 * to.tile * kUnitK) {}
};

// kInFlight 16-byte loads per lane hide the latency.
template <int kInFlight>
__device__ __forceinline__ void copy_row(const uint8_t* source, PoolLane to, int num_chunks, int lane) {
  source += lane * 16;
  for (int chunk = lane; chunk < num_chunks; chunk += 32 * kInFlight) {
    uint4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      v[i] = {};  // otherwise ptxas keeps the previous value alive for a predicated load that is not taken: 16
                  // registers throughout the service warps
      if (chunk + 32 * i < num_chunks) v[i] = ptx::load_l2(source + 512 * i);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (chunk + 32 * i < num_chunks) *reinterpret_cast<uint4*>(to.at) = v[i];
      to.at += to.stride;
    }
    source += 512 * kInFlight;
  }
}

// Four E2M1 values (in the low nibbles) times 2**exponent, rounded to nearest E4M3.
__device__ __forceinline__ uint32_t expand_e2m1(uint32_t nibbles, int exponent) {
  const __half2 step = __float2half2_rn(__int_as_float((exponent + 127) << 23));
  uint32_t pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t pair = nibbles >> 8 * i;  // one magnitude in bits 0-2, the next in 4-6; signs in bits 3 and 7
    const uint32_t bytes =
        ptx::prmt(kE2m1AsE4m3Low, kE2m1AsE4m3High, pair & 0x77) | (pair & 8) << 4 | (pair & 0x80) << 8;
    pairs[i] = ptx::scale_e4m3x2(static_cast<uint16_t>(bytes), step);
  }
  return pairs[0] | pairs[1] << 16;
}

// Reads a row of E2M1 values and stores it as E4M3, which the products read. The four quads of a 16-byte chunk belong
// to the four groups of 32 in its block of 128 (wgmma_position), so a chunk needs all four exponents of the block.
template <int kInFlight>
__device__ __forceinline__ void expand_row(const uint8_t* source, const int8_t* exponents, PoolLane to, int num_chunks,
                                           int lane) {
  static_assert(kUnitK == 4 * kFp4Group);
  for (int chunk = lane; chunk < num_chunks; chunk += 32 * kInFlight) {
    uint2 nibbles[kInFlight];
    uint32_t scales[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      nibbles[i] = {}, scales[i] = 0;  // as in copy_row
      if (chunk + 32 * i < num_chunks) {
        nibbles[i] = __ldcg(reinterpret_cast<const uint2*>(source + (chunk + 32 * i) * 8));
        scales[i] = __ldcg(reinterpret_cast<const uint32_t*>(exponents) + (chunk + 32 * i) * 16 / kUnitK);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t quads[4] = {nibbles[i].x, nibbles[i].x >> 16, nibbles[i].y, nibbles[i].y >> 16};
      uint32_t expanded[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) expanded[q] = expand_e2m1(quads[q], static_cast<signed char>(scales[i] >> 8 * q));
      if (chunk + 32 * i < num_chunks)
        *reinterpret_cast<uint4*>(to.at) = make_uint4(expanded[0], expanded[1], expanded[2], expanded[3]);
      to.at += to.stride;
    }
  }
}

// One warp copies one row.
template <int kInFlight>
__device__ __forceinline__ void dispatch_row(const MegaMoeParams& p, const PoolRow& to, uint32_t launch, int lane) {
  const Shape& s = p.shape;
  const int num_chunks = s.hidden / 16, token = to.slot / s.top_k;
  const uint8_t* source = p.peer<uint8_t>(to.rank, p.ws.x) + int64_t{token} * s.token_bytes();
  const PoolLane pool(p.local<uint8_t>(p.ws.pool_x) + int64_t{to.block_row} * s.hidden, to, lane);
  const float scale = __ldcg(p.peer<float>(to.rank, p.ws.x_scale) + token);
  const float weight = __ldcg(p.peer<float>(to.rank, p.ws.topk_weights) + to.slot);
  if (s.fp4_dispatch) {
    expand_row<kInFlight / 4>(source,
                              p.peer<int8_t>(to.rank, p.ws.x_exponent) + int64_t{token} * s.num_token_exponents(), pool,
                              num_chunks, lane);
  } else {
    copy_row<kInFlight>(source, pool, num_chunks, lane);
  }
  if (lane == 0) {
    p.local<float>(p.ws.pool_x_scale)[to.block_row + to.row] = scale;
    p.local<float>(p.ws.pool_weight)[to.block_row + to.row] = weight;
    p.local<uint32_t>(p.ws.pool_slot)[to.block_row + to.row] =
        static_cast<uint32_t>(to.rank) << 24 | static_cast<uint32_t>(to.slot);
  }
  ptx::fence_async_global();  // bulk copies read the rows
  __syncwarp();
  if (lane == 0) ptx::red_add_release_gpu(p.x_ready(launch) + to.block, 1);
}

// Rows are dispatched in the order in which the products need them. All warps that would otherwise be idle copy the
// first rows while the weights are in flight; the service warps copy the rest while the products run.
constexpr int kFirstRowsPerCta = 12;

struct DispatchPlan {
  int num_rows, num_first;
  __device__ DispatchPlan(const MegaMoeParams& p, const ExpertTable& table)
      : num_rows(table.slot_base[p.shape.num_local_experts]),
        num_first(min(WaveBegin(table, p, 1).slot, kFirstRowsPerCta * static_cast<int>(gridDim.x))) {}
};

template <int kInFlight>
__device__ __forceinline__ void dispatch_first(const MegaMoeParams& p, const ExpertTable& table, uint32_t launch,
                                               int worker, int num_workers, int lane) {
  const DispatchPlan plan(p, table);
  for (RowQueue rows(p, table, worker, num_workers, plan.num_first, lane); !rows.empty();)
    dispatch_row<kInFlight>(p, rows.pop(), launch, lane);
}

// Decides which rows may be dispatched: rows of a later wave overwrite the pools of the previous wave. Called by whole
// warps.
class WaveGate {
 public:
  __device__ WaveGate(const MegaMoeParams& p, const ExpertTable& table, uint32_t launch, int lane)
      : p_(p), table_(table), lane_(lane), launch_(launch), end_(WaveBegin(table, p, 1).slot) {}

  __device__ __forceinline__ bool admits(int slot) {
    while (slot >= end_) {
      if (!products_done(WaveBegin(table_, p_, wave_ + 1).block)) return false;
      end_ = WaveBegin(table_, p_, ++wave_ + 1).slot;
    }
    return true;
  }

 private:
  // Whether all L2 tasks of the blocks before `end_block` are done. Tasks of later blocks cannot be done before these.
  __device__ __forceinline__ bool products_done(int end_block) const {
    const Shape& s = p_.shape;
    bool done = true;
    for (int group = lane_; group < s.num_column_groups(); group += 32) {
      const uint32_t target = static_cast<uint32_t>(end_block) * TaskList::group_width(s, group) * kServiceWarps;
      done = done && ptx::load_acquire_gpu(p_.group_done(launch_) + group) >= target;
    }
    if (!__all_sync(~0u, done)) return false;
    __syncwarp();  // makes what single lanes have acquired visible to all lanes; a vote does not
    return true;
  }

  const MegaMoeParams& p_;
  const ExpertTable& table_;
  const int lane_;
  const uint32_t launch_;
  int wave_ = 0, end_;  // the wave that is being dispatched, and its last row + 1
};

}  // namespace hopper_moe
