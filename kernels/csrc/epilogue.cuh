// From FP32 sums to what leaves the CTA: L1 -> SwiGLU -> E4M3 tile of h; L2 -> routing weight -> BF16 combine slots.
#pragma once
#include "mainloop.cuh"
#include "ptx/memory.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

constexpr uint32_t kMathBarrier = 1;         // both math warpgroups; kMathBarrier + 1 + warpgroup: one of them
constexpr float kAmaxFloor = 7.8886090522101181e-31f;   // 2**-100
constexpr float kE4m3Max = 448.f;

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = ptx::min_nan(gate, limit);
  up = ptx::max_nan(ptx::min_nan(up, limit), -limit);
  return gate * ptx::reciprocal(1.f + __expf(-gate)) * up;
}

// 16-byte chunk `chunk` of row `row` in a [rows][128 B] tile with 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

struct MathContext {
  const MegaMoeParams& p;
  SharedStorage& smem;
  const Ring& ring;
  uint32_t tile_full, tile_empty;    // barrier addresses
  MathThread me;
  StageCursor cursor;
  uint32_t num_tiles_stored = 0;     // L1 tiles this CTA has handed to the service warp

  __device__ __forceinline__ int thread() const { return (me.warpgroup * 4 + me.warp) * 32 + me.lane; }
  // The scratch region is free once the copy engine has read the previous L1 tile.
  __device__ __forceinline__ void wait_scratch() const { ptx::mbarrier_wait(tile_empty, (num_tiles_stored & 1) ^ 1); }
};

// 128 features (two halves of 64) of one token block: product, activation, quantisation.
template <int N>
__device__ __forceinline__ void run_l1(MathContext& c, const Task& task) {
  const Shape& s = c.p.shape;
  const int thread = c.thread(), lane = c.me.lane;
  const int num_chunks = s.hidden / kUnitK;
  float* stash = reinterpret_cast<float*>(c.smem.scratch);
  float h[N / 4];
  for (int half = 0; half < 2; ++half) {
    const uint8_t* base = c.p.w13_base + int64_t{task.block.expert} * 2 * s.intermediate + task.tile * 256 + half * kRowTile +
                          c.me.warpgroup * kUnitRows + c.me.warp * 16 + lane / 4;
    const uint8_t gate_base = __ldg(base), up_base = __ldg(base + 8);
    float sum[N / 2];
    MainLoop<N, true>(c.ring, c.cursor, c.me).run(sum, num_chunks, [](const uint8_t*) {});
    const float gate_scale = row_scale(gate_base), up_scale = row_scale(up_base);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int at = 4 * (i / 2) + i % 2;
      h[i] = swiglu(sum[at] * gate_scale, sum[at + 2] * up_scale, c.p.swiglu_limit);
    }
    if (half == 0) {
      c.wait_scratch();
#pragma unroll
      for (int i = 0; i < N / 4; ++i) stash[i * kMathThreads + thread] = h[i];
    }
  }
  float first[N / 4];
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    first[i] = stash[i * kMathThreads + thread];
    float amax = fmaxf(fabsf(first[i]), fabsf(h[i]));
#pragma unroll
    for (int step = 4; step < 32; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
    if (lane < 4) c.smem.warp_amax[thread / 32][8 * (i / 2) + 2 * lane + i % 2] = amax;
  }
  ptx::named_barrier(kMathBarrier, kMathThreads);
  if (thread < N) {
    float amax = kAmaxFloor;
#pragma unroll
    for (int w = 0; w < kMathWarps; ++w) amax = fmaxf(amax, c.smem.warp_amax[w][thread]);
    c.smem.h_scale[thread] = __fdiv_rn(amax, kE4m3Max);
    c.smem.inverse_scale[thread] = __fdiv_rn(kE4m3Max, amax);
  }
  ptx::named_barrier(kMathBarrier, kMathThreads);
  const int feature = c.me.warpgroup * 32 + c.me.warp * 8 + lane / 4;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int token = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
    const float inverse = c.smem.inverse_scale[token];
    const uint16_t q = ptx::to_e4m3x2(first[i] * inverse, h[i] * inverse);
    c.smem.scratch[swizzled(token, feature / 16) + feature % 16] = static_cast<uint8_t>(q);
    c.smem.scratch[swizzled(token, feature / 16 + 4) + feature % 16] = static_cast<uint8_t>(q >> 8);
  }
  ptx::fence_async_shared();
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(c.tile_full);
  ++c.num_tiles_stored;
}

// 128 output columns of one token block: product, routing weight, rows to their source rank's combine slots.
template <int N>
__device__ __forceinline__ void run_l2(MathContext& c, const Task& task, uint32_t* group_done) {
  const Shape& s = c.p.shape;
  const int lane = c.me.lane, thread = c.me.warp * 32 + lane;   // in the warpgroup
  const int first_row = task.tile * kRowTile + c.me.warpgroup * kUnitRows;
  const uint8_t* base = c.p.w2_base + int64_t{task.block.expert} * s.hidden + first_row + c.me.warp * 16 + lane / 4;
  const uint8_t low_base = __ldg(base), high_base = __ldg(base + 8);
  float sum[N / 2];
  MainLoop<N, false>(c.ring, c.cursor, c.me).run(sum, s.intermediate / kUnitK, [&](const uint8_t* stage) {
    const uint8_t* rows = stage + stage_rows(N);
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float2 weight = *reinterpret_cast<const float2*>(rows + (8 * i + 2 * (lane % 4)) * 4);
      sum[4 * i] *= weight.x;
      sum[4 * i + 1] *= weight.y;
      sum[4 * i + 2] *= weight.x;
      sum[4 * i + 3] *= weight.y;
    }
    if (thread < N) c.smem.slots[c.me.warpgroup][thread] = reinterpret_cast<const uint32_t*>(rows + N * 4)[thread];
  });
  const float low_scale = row_scale(low_base), high_scale = row_scale(high_base);
  c.wait_scratch();
  uint8_t* tile = c.smem.scratch + c.me.warpgroup * (kMaxTokenTile * 128);
  const uint32_t tile_address = ptx::smem_address(tile);
  const uint32_t chunk = 2 * c.me.warp + lane / 8 % 2;
  if constexpr (N == 8) {
    ptx::store_matrix_x2_transposed(tile_address + swizzled(lane % 8, chunk), ptx::to_bf16x2(sum[0] * low_scale, sum[1] * low_scale),
                                    ptx::to_bf16x2(sum[2] * high_scale, sum[3] * high_scale));
  } else {
#pragma unroll
    for (int i = 0; i < N / 8; i += 2) {
      const float* v = sum + 4 * i;
      ptx::store_matrix_x4_transposed(
          tile_address + swizzled(8 * i + lane / 16 * 8 + lane % 8, chunk), ptx::to_bf16x2(v[0] * low_scale, v[1] * low_scale),
          ptx::to_bf16x2(v[2] * high_scale, v[3] * high_scale), ptx::to_bf16x2(v[4] * low_scale, v[5] * low_scale),
          ptx::to_bf16x2(v[6] * high_scale, v[7] * high_scale));
    }
  }
  const uint32_t barrier = kMathBarrier + 1 + c.me.warpgroup;
  ptx::named_barrier(barrier, 128);
  for (int row = thread / 8; row < task.block.num_rows; row += 16) {
    const uint32_t slot = c.smem.slots[c.me.warpgroup][row];
    uint16_t* out = c.p.peer<uint16_t>(slot >> 24, c.p.ws.combine) + int64_t{slot & 0xFFFFFFu} * s.hidden + first_row + thread % 8 * 8;
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(tile + swizzled(row, thread % 8));
  }
  // All rows of this warpgroup are stored and the scratch is free; the release below carries the other threads' stores with it.
  ptx::named_barrier(barrier, 128);
  if (thread == 0) {
    ptx::fence_gpu();
    ptx::red_add_release_gpu(group_done + task.tile / kGroupTiles, 1);
  }
}

}  // namespace hopper_moe
