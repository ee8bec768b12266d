// From a finished BF16 tile in shared memory to what leaves the CTA, in the service warps. L1: E4M3 rows of h with one scale per 128
// features. L2: rows to the combine slots of their source ranks. Each service warp takes half of the rows; half a warp works on one row.
#pragma once
#include "peers.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/memory.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

// 16-byte chunk `chunk` of row `row` in a [rows][128 B] tile with 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

template <bool kFp8Combine>
class Epilogue {
 public:
  __device__ Epilogue(const MegaMoeParams& p, SharedStorage& smem, const TileBarriers& tile, int num_blocks, int warp, int lane, uint32_t launch)
      : p_(p), smem_(smem), tile_(tile), num_blocks_(num_blocks), warp_(warp), lane_(lane), launch_(launch) {}

  __device__ __forceinline__ void run(const Task& task) const {
    const int half = task.block.tile / kServiceWarps, first = warp_ * half, last = min(first + half, task.block.num_rows);
    if (task.is_l1) {
      store_h(task, first, last);
    } else if constexpr (kFp8Combine) {
      store_rows_as_e4m3(task, first, last);
    } else {
      store_rows(task, first, last);
    }
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(tile_.empty);
    const int group = task.tile / kGroupTiles;
    if (!task.is_l1 && p_.shape.num_ranks > 1) {
      finish_l2(group);
    } else if (lane_ == 0) {
      ptx::red_add_release_gpu(task.is_l1 ? p_.h_ready(launch_) + task.block.index : p_.group_done(launch_) + group, 1);   // carries what all lanes stored
    }
  }

 private:
  // Whoever finishes a column group's last task here tells all ranks.
  __device__ __forceinline__ void finish_l2(int group) const {
    const uint32_t target = static_cast<uint32_t>(num_blocks_) * TaskList::group_width(p_.shape, group) * kServiceWarps;
    bool last = false;
    if (lane_ == 0) last = ptx::add_acq_rel_gpu(p_.group_done(launch_) + group, 1) + 1 == target;
    if (__any_sync(~0u, last)) announce_results(p_, group, launch_, lane_);
  }

  __device__ __forceinline__ uint4 load(int row) const {
    return *reinterpret_cast<const uint4*>(smem_.tile + row * kTilePitch + lane_ % 16 * 16);
  }

  struct Quantized {
    uint2 q;       // this lane's 8 values
    float scale;   // of the row's 128
  };

  // 128 values of a row, 8 BF16 a lane of half a warp, as E4M3 with one scale.
  __device__ __forceinline__ Quantized quantize(uint4 v) const {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    float amax = kAmaxFloor;
#pragma unroll
    for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fmaxf(fabsf(ptx::bf16_low(words[i])), fabsf(ptx::bf16_high(words[i]))));
#pragma unroll
    for (int step = 1; step < 16; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xFFFFu << (lane_ & 16), amax, step));
    const float inverse = __fdiv_rn(kE4m3Max, amax);
    uint32_t q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = ptx::to_e4m3x2(ptx::bf16_low(words[i]) * inverse, ptx::bf16_high(words[i]) * inverse);
    return {make_uint2(q[0] | q[1] << 16, q[2] | q[3] << 16), __fdiv_rn(amax, kE4m3Max)};
  }

  __device__ __forceinline__ void store_h(const Task& task, int first, int last) const {
    const int tile = task.block.tile;
    uint8_t* out = p_.local<uint8_t>(p_.ws.pool_h) + int64_t{task.block.row} * p_.shape.intermediate + task.tile * tile * kUnitK;
    float* scales = p_.local<float>(p_.ws.pool_h_scale) + int64_t{task.block.row} * p_.shape.num_features_tiles() + task.tile * tile;
#pragma unroll 4
    for (int row = first + lane_ / 16; row < last; row += 2) {
      const Quantized v = quantize(load(row));
      *reinterpret_cast<uint2*>(out + swizzled(row, lane_ % 16 / 2) + lane_ % 2 * 8) = v.q;
      if (lane_ % 16 == 0) scales[row] = v.scale;
    }
    ptx::fence_async_global();   // h is read by bulk copies
  }

  __device__ __forceinline__ void store_rows(const Task& task, int first, int last) const {
    const uint32_t* slots = p_.local<uint32_t>(p_.ws.pool_slot) + task.block.row + first + lane_;
    const int column = task.tile * kRowTile + lane_ % 16 * 8;
    for (int begin = first; begin < last; begin += 32, slots += 32) {
      const uint32_t mine = begin + lane_ < last ? __ldcg(slots) : 0;
#pragma unroll 4
      for (int i = 0; i < 16; ++i) {
        const int row = begin + 2 * i + lane_ / 16;
        const uint32_t slot = __shfl_sync(~0u, mine, row - begin);
        if (row >= last) continue;
        uint16_t* out = p_.peer<uint16_t>(slot >> 24, p_.ws.combine) + int64_t{slot & 0xFFFFFFu} * p_.shape.hidden + column;
        *reinterpret_cast<uint4*>(out) = load(row);
      }
    }
  }

  __device__ __forceinline__ void store_rows_as_e4m3(const Task& task, int first, int last) const {
    const Shape& s = p_.shape;
    const uint32_t* slots = p_.local<uint32_t>(p_.ws.pool_slot) + task.block.row;
    const int column = task.tile * kRowTile + lane_ % 16 * 8;
#pragma unroll 2
    for (int row = first + lane_ / 16; row < last; row += 2) {
      const uint32_t slot = __ldcg(slots + row);
      const int64_t number = slot & 0xFFFFFFu;
      const Quantized v = quantize(load(row));
      *reinterpret_cast<uint2*>(p_.peer<uint8_t>(slot >> 24, p_.ws.combine) + number * s.hidden + column) = v.q;
      if (lane_ % 16 == 0) p_.peer<float>(slot >> 24, p_.ws.combine_scale)[number * s.num_combine_groups() + task.tile] = v.scale;
    }
  }

  const MegaMoeParams& p_;
  SharedStorage& smem_;
  const TileBarriers& tile_;
  const int num_blocks_, warp_, lane_;
  const uint32_t launch_;
};

}  // namespace hopper_moe
