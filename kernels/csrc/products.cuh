// The math warpgroups: products, and what can be done to a sum in the register it is in. Everything that crosses threads is left to the
// service warps, which work while the next product runs.
#pragma once
#if HM_WEIGHT_BITS == 8
#include "mainloop_fp8.cuh"
#else
#include "mainloop_fp4.cuh"
#endif
#include "ptx/arithmetic.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

struct MathContext {
  const MegaMoeParams& p;
  SharedStorage& smem;
  const TileBarriers& tile;
  MathThread me;
  StageCursor cursor;
  uint32_t num_tasks_done = 0;

  __device__ __forceinline__ int row_in_tile() const { return me.warpgroup * kUnitRows + me.warp * 16 + me.lane / 4; }
  __device__ __forceinline__ void wait_tile() const { ptx::mbarrier_wait(tile.empty, (num_tasks_done & 1) ^ 1); }
  __device__ __forceinline__ void hand_over_tile() {
    __syncwarp();
    if (me.lane == 0) ptx::mbarrier_arrive(tile.full);
    __syncwarp();
    ++num_tasks_done;
  }
  // Shared address where a lane's row of an 8 x 8 block goes: token `token`, 16-byte chunk `chunk` (8 columns).
  __device__ __forceinline__ uint32_t tile_address(int token, int chunk) const {
    return ptx::smem_address(smem.tile) + token * kTilePitch + chunk * 16;
  }
};

constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = ptx::min_nan(gate, limit);
  up = ptx::max_nan(ptx::min_nan(up, limit), -limit);
  return gate * ptx::reciprocal(1.f + ptx::exp2(-gate * kLog2E)) * up;
}

// 128 features in two passes of 128 packed rows: a thread's rows r and r + 8 are gate and up of one feature.
template <int N>
__device__ __forceinline__ void run_l1(MathContext& c, int first_row) {
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const RowScales scales(c.p.w13_base + first_row + pass * kRowTile + c.row_in_tile());
    float sum[N / 2];
    MainLoop<N, true>(c.cursor, c.me).run(sum, c.p.shape.hidden / kUnitK, [](const float (&)[N / 2], uint32_t) {});
    const float gate_scale = scales.low(), up_scale = scales.high(), limit = c.p.swiglu_limit;
    if (pass == 0) c.wait_tile();
    constexpr int kBlocks = N >= 32 ? 4 : N / 8;   // 8 x 8 blocks of one store
    const int chunk = pass * 8 + c.me.warpgroup * 4 + c.me.warp;
#pragma unroll
    for (int i = 0; i < N / 8; i += kBlocks) {
      uint32_t h[kBlocks];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float* v = sum + 4 * (i + j);
        h[j] = ptx::to_bf16x2(swiglu(v[0] * gate_scale, v[2] * up_scale, limit), swiglu(v[1] * gate_scale, v[3] * up_scale, limit));
      }
      ptx::store_matrix_transposed(c.tile_address(8 * i + c.me.lane % (8 * kBlocks), chunk), h);
    }
  }
  c.hand_over_tile();
}

// 128 output columns, times the routing weight.
template <int N>
__device__ __forceinline__ void run_l2(MathContext& c, int first_row) {
  const RowScales scales(c.p.w2_base + first_row + c.row_in_tile());
  float sum[N / 2];
  MainLoop<N, false>(c.cursor, c.me).run(sum, c.p.shape.intermediate / kUnitK, [&](float (&sum)[N / 2], uint32_t stage) {
    const uint32_t weights = stage + stage_row_weights(N) + c.me.lane % 4 * 8;
    for_each_constant<N / 8>([&](auto index) {
      constexpr int i = decltype(index)::value;
      const float2 weight = ptx::load_shared_float2<i * 32>(weights);
      sum[4 * i] *= weight.x;
      sum[4 * i + 1] *= weight.y;
      sum[4 * i + 2] *= weight.x;
      sum[4 * i + 3] *= weight.y;
    });
  });
  const float low = scales.low(), high = scales.high();
  c.wait_tile();
  constexpr int kBlocks = N >= 16 ? 4 : 2;   // two of them (rows r and r + 8) per 8 tokens
  const int block = c.me.lane / 8 % kBlocks, chunk = (c.me.warpgroup * 4 + c.me.warp) * 2 + block % 2;
#pragma unroll
  for (int i = 0; i < N / 8; i += kBlocks / 2) {
    uint32_t y[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j) {
      const float* v = sum + 4 * (i + j);
      y[2 * j] = ptx::to_bf16x2(v[0] * low, v[1] * low);
      y[2 * j + 1] = ptx::to_bf16x2(v[2] * high, v[3] * high);
    }
    ptx::store_matrix_transposed(c.tile_address(8 * (i + block / 2) + c.me.lane % 8, chunk), y);
  }
  c.hand_over_tile();
}

template <int N>
__device__ __forceinline__ void run_task(MathContext& c, bool is_l1, int first_row) {
  if (is_l1) {
    run_l1<N>(c, first_row);
  } else {
    run_l2<N>(c, first_row);
  }
}

__device__ __forceinline__ void run_math(MathContext& c, TaskFeed feed) {
  while (true) {
    const TaskSlot& slot = feed.next();
    const int code = warp_uniform(slot.code), first_row = warp_uniform(slot.first_row);
    if (code == 0) break;
    const bool is_l1 = code % 2;
    switch (code / 2) {
      case 8: run_task<8>(c, is_l1, first_row); break;
      case 16: run_task<16>(c, is_l1, first_row); break;
      case 32: run_task<32>(c, is_l1, first_row); break;
      case 64: run_task<64>(c, is_l1, first_row); break;
      case 96: run_task<96>(c, is_l1, first_row); break;
      default: run_task<128>(c, is_l1, first_row); break;
    }
  }
}

}  // namespace hopper_moe
