// From FP32 sums to what leaves the CTA: L1 -> SwiGLU -> E4M3 tile of h; L2 -> routing weight -> BF16 combine slots.
#pragma once
#include "mainloop.cuh"
#include "ptx/memory.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

constexpr uint32_t kMathBarrier = 1;         // named barrier of both math warpgroups
constexpr int kL2TileBytes = kMaxTokenTile * 128;   // one warpgroup's half of the scratch
constexpr float kAmaxFloor = 7.8886090522101181e-31f;   // 2**-100
constexpr float kE4m3Max = 448.f;

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = ptx::min_nan(gate, limit);
  up = ptx::max_nan(ptx::min_nan(up, limit), -limit);
  return gate * ptx::reciprocal(1.f + __expf(-gate)) * up;
}

// 16-byte chunk `chunk` of row `row` in a [rows][128 B] tile with 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Hand-over of `scratch` from warpgroup w to service warp w: math waits until the previous tile has left, writes, arrives on full[w]; the
// service warp sends, arrives on empty[w]. One completion a task on every barrier, so the task count gives the parity. An L1 tile belongs to
// both warpgroups and lies in the first one's half: service warp 0 waits for both and sends it, and both warpgroups wait for empty[0] before
// the next one. (In L2 a warpgroup may wait for its own barrier only: the other's may already be a phase ahead.)
struct TileBarriers {
  uint32_t full[2], empty[2];

  __device__ explicit TileBarriers(SharedStorage& smem)
      : full{ptx::smem_address(&smem.tile_full[0]), ptx::smem_address(&smem.tile_full[1])},
        empty{ptx::smem_address(&smem.tile_empty[0]), ptx::smem_address(&smem.tile_empty[1])} {}
  __device__ void init() const {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(full[i], kMathWarps / 2);
      ptx::mbarrier_init(empty[i], 1);
    }
  }
};

struct MathContext {
  const MegaMoeParams& p;
  SharedStorage& smem;
  const Ring& ring;
  const TileBarriers& tiles;
  MathThread me;
  StageCursor cursor;
  uint32_t num_tasks_done = 0;

  __device__ __forceinline__ int thread() const { return (me.warpgroup * 4 + me.warp) * 32 + me.lane; }
  __device__ __forceinline__ void wait_scratch(int part) const { ptx::mbarrier_wait(tiles.empty[part], (num_tasks_done & 1) ^ 1); }
  __device__ __forceinline__ void hand_over_scratch() {
    __syncwarp();
    if (me.lane == 0) ptx::mbarrier_arrive(tiles.full[me.warpgroup]);
    ++num_tasks_done;
  }
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
      c.wait_scratch(0);
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
  ptx::fence_async_shared();   // the tile leaves by bulk copy
  c.hand_over_scratch();
}

// 128 output columns of one token block: product, routing weight, BF16 rows and their slots to the service warp.
template <int N>
__device__ __forceinline__ void run_l2(MathContext& c, const Task& task) {
  const Shape& s = c.p.shape;
  const int lane = c.me.lane, thread = c.me.warp * 32 + lane;   // in the warpgroup
  const int first_row = task.tile * kRowTile + c.me.warpgroup * kUnitRows;
  const uint8_t* base = c.p.w2_base + int64_t{task.block.expert} * s.hidden + first_row + c.me.warp * 16 + lane / 4;
  const uint8_t low_base = __ldg(base), high_base = __ldg(base + 8);
  uint32_t slot = 0;
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
    slot = reinterpret_cast<const uint32_t*>(rows + N * 4)[thread % N];   // no branch: the compiler would serialise the WGMMAs around it
  });
  const float low_scale = row_scale(low_base), high_scale = row_scale(high_base);
  c.wait_scratch(c.me.warpgroup);
  if (thread < N) c.smem.slots[c.me.warpgroup][thread] = slot;
  const uint32_t tile_address = ptx::smem_address(c.smem.scratch + c.me.warpgroup * kL2TileBytes);
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
  c.hand_over_scratch();
}

}  // namespace hopper_moe
