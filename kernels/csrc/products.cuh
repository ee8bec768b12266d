// The math warpgroups: products only. Everything after the FP32 sums happens in the service warps, while the next product runs.
#pragma once
#include "mainloop.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

struct MathContext {
  SharedStorage& smem;
  const Ring& ring;
  const SumsBarriers& sums;
  MathThread me;
  const MegaMoeParams& p;
  StageCursor cursor;
  uint32_t num_passes = 0;
};

// One pass over k for 128 packed rows: L1 tasks take two (64 features each), L2 tasks one.
template <int N, bool kL1>
__device__ __forceinline__ void run_pass(MathContext& c, int first_row) {
  const uint8_t* base = (kL1 ? c.p.w13_base : c.p.w2_base) + first_row + c.me.warpgroup * kUnitRows + c.me.warp * 16 + c.me.lane / 4;
  const uint8_t base0 = __ldg(base), base1 = __ldg(base + 8);
  float sum[N / 2];
  MainLoop<N, kL1>(c.ring, c.cursor, c.me).run(sum, (kL1 ? c.p.shape.hidden : c.p.shape.intermediate) / kUnitK);
  const float scale0 = row_scale(base0), scale1 = row_scale(base1);
  ptx::mbarrier_wait(c.sums.empty, (c.num_passes & 1) ^ 1);
  const uint32_t out = ptx::smem_address(c.smem.sums) + ((c.me.warpgroup * 4 + c.me.warp) * (N / 8) * 32 + c.me.lane) * 16;
#pragma unroll
  for (int i = 0; i < N / 8; ++i) {
    ptx::store_shared_float4(out + i * 512, sum[4 * i] * scale0, sum[4 * i + 1] * scale0, sum[4 * i + 2] * scale1, sum[4 * i + 3] * scale1);
  }
  __syncwarp();
  if (c.me.lane == 0) ptx::mbarrier_arrive(c.sums.full);
  __syncwarp();
  ++c.num_passes;
}

template <int N>
__device__ __forceinline__ void run_task(MathContext& c, bool is_l1, int first_row) {
  if (is_l1) {
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) run_pass<N, true>(c, first_row + pass * kRowTile);
  } else {
    run_pass<N, false>(c, first_row);
  }
}

__device__ __forceinline__ void run_math(MathContext& c, int num_tasks) {
  int sequence = 0;
  for (int index = blockIdx.x; index < num_tasks; index += gridDim.x, ++sequence) {
    ptx::mbarrier_wait(c.ring.full_barrier(c.cursor.stage), c.cursor.phase);
    const int code = warp_uniform(c.ring.task_slots[sequence % kNumTaskSlots].code);
    const int first_row = warp_uniform(c.ring.task_slots[sequence % kNumTaskSlots].first_row);
    const bool is_l1 = code % 2;
    switch (code / 2) {
      case 8: run_task<8>(c, is_l1, first_row); break;
      case 16: run_task<16>(c, is_l1, first_row); break;
      case 32: run_task<32>(c, is_l1, first_row); break;
      case 64: run_task<64>(c, is_l1, first_row); break;
      default: run_task<128>(c, is_l1, first_row); break;
    }
  }
}

}  // namespace hopper_moe
