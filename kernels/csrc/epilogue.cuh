// Epilogue in the service warps, from a finished BF16 tile in shared memory. L1: E4M3 rows of h with one scale per 128
// features, to the pool. L2: rows to the combine slots of their source ranks. Each service warp takes half of the rows.
#pragma once
#include "peers.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/memory.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

// 16-byte chunk `chunk` of row `row` in a [rows][128 B] tile with 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

template <bool kFp8Combine>
class Epilogue {
 public:
  __device__ Epilogue(const MegaMoeParams& p, SharedStorage& smem, const TileBarriers& tile, int num_blocks, int warp,
                      int lane, uint32_t launch)
      : p_(p), smem_(smem), tile_(tile), num_blocks_(num_blocks), warp_(warp), lane_(lane), launch_(launch) {}

  __device__ __forceinline__ void run(const Task& task) const {
    const int half = task.block.tile / kServiceWarps, first = warp_ * half,
              last = min(first + half, task.block.num_rows);
    if (task.is_l1) {
      store_h(task, first, last);
    } else if constexpr (kFp8Combine) {
      store_rows_as_e4m3(task, first, last);
    } else {
      store_rows(task, first, last);
    }
    __syncwarp();
    const int group = task.tile / kGroupTiles;
    if (!task.is_l1 && p_.shape.num_ranks > 1) {
      finish_l2(group);
    } else if (lane_ == 0) {
      ptx::red_add_release_gpu(task.is_l1 ? p_.h_ready(launch_) + task.block.index : p_.group_done(launch_) + group,
                               1);  // also publishes what the other lanes stored
    }
  }

 private:
  // The warp that finishes the last task of a column group on this rank announces it to all ranks.
  __device__ __forceinline__ void finish_l2(int group) const {
    const uint32_t target = static_cast<uint32_t>(num_blocks_) * TaskList::group_width(p_.shape, group) * kServiceWarps;
    bool last = false;
    if (lane_ == 0) last = ptx::add_acq_rel_gpu(p_.group_done(launch_) + group, 1) + 1 == target;
    if (!__any_sync(~0u, last)) return;
    __syncwarp();  // makes what lane 0 has acquired visible to the releases of the other lanes; a vote does not
    announce_results(p_, group, launch_, lane_);
  }

  // Called after the tile has been read: the math warps may overwrite it.
  __device__ __forceinline__ void give_back_tile() const {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(tile_.empty);
  }

  // Eight rows are quantised at once, with four lanes a row: lane q of these holds features 32 i + 8 q .. + 7, i = 0 ..
  // 3, whose positions are 32 q .. 32 q + 31 (wgmma_position). A row costs two shuffles and an eighth of the latency of
  // a division.
  static constexpr int kRowsAtOnce = 8;

  struct Quantized {
    uint32_t q[4][2];  // four features each
    float scale;       // of the row's 128 values
  };

  __device__ __forceinline__ int lane_row() const { return lane_ / 4; }
  __device__ __forceinline__ int quarter() const { return lane_ % 4; }

  // Rows beyond the last valid row hold stale bytes; they are quantised like the others and never stored.
  __device__ __forceinline__ Quantized quantize(int row) const {
    const uint8_t* mine = smem_.tile + row * kTilePitch + quarter() * 16;
    uint32_t words[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(mine + i * 64);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
    uint32_t largest = ptx::abs_bf16x2(words[0]);
#pragma unroll
    for (int i = 1; i < 16; ++i) largest = ptx::max_bf16x2(largest, ptx::abs_bf16x2(words[i]));
    float amax = fmaxf(kAmaxFloor, fmaxf(ptx::bf16_low(largest), ptx::bf16_high(largest)));
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
    const float inverse = __fdiv_rn(kE4m3Max, amax);
    Quantized v;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t low =
          ptx::to_e4m3x2(ptx::bf16_low(words[2 * i]) * inverse, ptx::bf16_high(words[2 * i]) * inverse);
      const uint32_t high =
          ptx::to_e4m3x2(ptx::bf16_low(words[2 * i + 1]) * inverse, ptx::bf16_high(words[2 * i + 1]) * inverse);
      v.q[i / 2][i % 2] = low | high << 16;
    }
    v.scale = __fdiv_rn(amax, kE4m3Max);
    return v;
  }

  __device__ __forceinline__ void store_h(const Task& task, int first, int last) const {
    const int tile = task.block.tile;
    uint8_t* out =
        p_.local<uint8_t>(p_.ws.pool_h) + int64_t{task.block.row} * p_.shape.intermediate + task.tile * tile * kUnitK;
    float* scales = p_.local<float>(p_.ws.pool_h_scale) + int64_t{task.block.row} * p_.shape.num_features_tiles() +
                    task.tile * tile;
    for (int begin = first; begin < last; begin += kRowsAtOnce) {
      const int row = begin + lane_row();
      const Quantized v = quantize(row);
      if (row < last) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint4*>(out + swizzled(row, 2 * quarter() + half)) =
              make_uint4(v.q[0][half], v.q[1][half], v.q[2][half], v.q[3][half]);
        }
        if (quarter() == 0) scales[row] = v.scale;
      }
    }
    give_back_tile();
    ptx::fence_async_global();  // bulk copies read h
  }

  // The copy engine writes a row of 256 bytes to its slot; each lane issues one row.
  __device__ __forceinline__ void store_rows(const Task& task, int first, int last) const {
    ptx::fence_async_shared();  // covers what the math warps stored and this lane has acquired
    const uint32_t* slots = p_.local<uint32_t>(p_.ws.pool_slot) + task.block.row;
    const int column = task.tile * kRowTile;
    for (int row = first + lane_; row < last; row += 32) {
      const uint32_t slot = __ldcg(slots + row);
      uint16_t* out =
          p_.peer<uint16_t>(slot >> 24, p_.ws.combine) + int64_t{slot & 0xFFFFFFu} * p_.shape.hidden + column;
      ptx::bulk_store(out, ptx::smem_address(smem_.tile + row * kTilePitch), kRowTile * 2);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    give_back_tile();
    ptx::bulk_wait<0>();
  }

  __device__ __forceinline__ void store_rows_as_e4m3(const Task& task, int first, int last) const {
    const Shape& s = p_.shape;
    const uint32_t* slots = p_.local<uint32_t>(p_.ws.pool_slot) + task.block.row;
    for (int begin = first; begin < last; begin += kRowsAtOnce) {
      const int row = begin + lane_row();
      const uint32_t slot = row < last ? __ldcg(slots + row) : 0;
      const Quantized v = quantize(row);
      if (row < last) {
        const int64_t number = slot & 0xFFFFFFu;
        uint8_t* out =
            p_.peer<uint8_t>(slot >> 24, p_.ws.combine) + number * s.hidden + task.tile * kRowTile + quarter() * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) *reinterpret_cast<uint2*>(out + 32 * i) = make_uint2(v.q[i][0], v.q[i][1]);
        if (quarter() == 0)
          p_.peer<float>(slot >> 24, p_.ws.combine_scale)[number * s.num_combine_groups() + task.tile] = v.scale;
      }
    }
    give_back_tile();
  }

  const MegaMoeParams& p_;
  SharedStorage& smem_;
  const TileBarriers& tile_;
  const int num_blocks_, warp_, lane_;
  const uint32_t launch_;
};

}  // namespace hopper_moe
