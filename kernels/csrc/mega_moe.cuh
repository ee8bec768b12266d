// The fused MoE kernel for SM90: dispatch, L1, SwiGLU, requantisation, L2 and combine in one persistent launch. See kernels/README.md.
#pragma once
#include "service.cuh"

namespace hopper_moe {

constexpr int kMathRegisters = 224, kServiceRegisters = 56;
constexpr int kNumThreads = kMathThreads + 128;
// setmaxnreg shares out what the CTA got at launch, a multiple of 8 a thread; asking for more waits for ever.
static_assert(kMathThreads * kMathRegisters + 128 * kServiceRegisters <= 65536 / kNumThreads / 8 * 8 * kNumThreads);
constexpr int kServiceWarps = 2;    // one per math warpgroup; the two others of their warpgroup are the producers

template <int N>
__device__ __forceinline__ void run_task(MathContext& c, const Task& task) {
  if (task.is_l1) {
    run_l1<N>(c, task);
  } else {
    run_l2<N>(c, task);
  }
}

// Counters of the other parity are the next launch's: whoever used them has finished. `thread` of `num_threads` over the whole grid.
__device__ inline void clear_next_counters(const MegaMoeParams& p, uint32_t parity, int thread, int num_threads) {
  const uint32_t next = parity ^ 1;
  auto clear = [&](int64_t offset, int num) {
    uint32_t* counters = p.local<uint32_t>(offset) + next * num;
    for (int i = thread; i < num; i += num_threads) counters[i] = 0;
  };
  clear(p.ws.expert_count, p.shape.num_experts);
  clear(p.ws.x_ready, p.shape.max_blocks());
  clear(p.ws.h_ready, p.shape.max_blocks());
  clear(p.ws.group_done, p.shape.num_column_groups());
}

__global__ void __launch_bounds__(kNumThreads, 1) mega_moe_kernel(const __grid_constant__ MegaMoeParams p) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  SharedStorage& smem = *reinterpret_cast<SharedStorage*>(shared_memory);
  const int warp = warp_uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const Ring ring{smem.stages, ptx::smem_address(smem.full), ptx::smem_address(smem.empty)};
  const TileBarriers tiles(smem);
  if (threadIdx.x == 0) {
    ring.init();
    tiles.init();
    ptx::fence_mbarrier_init();
  }
  ptx::grid_dependency_wait();   // pre-dispatch: tokens, lists and counts
  const uint32_t parity = __ldcg(p.local<uint32_t>(p.ws.epoch)) & 1;
  build_expert_table(smem.experts, p, parity);   // ends with __syncthreads
  const TaskList tasks(smem.experts, p);
  uint32_t* group_done = p.local<uint32_t>(p.ws.group_done) + parity * p.shape.num_column_groups();
  const int last_group = p.shape.num_column_groups() - 1;

  if (warp >= kMathWarps) {
    ptx::set_max_registers_down<kServiceRegisters>();
    if (warp == kMathWarps) {
      if (lane == 0) produce_weights(p, smem.experts, tasks, ring);
    } else if (warp == kMathWarps + 1) {
      if (lane == 0) produce_activations(p, smem.experts, tasks, ring, parity);
    } else {
      const int part = warp - kMathWarps - 2;
      clear_next_counters(p, parity, (blockIdx.x * kServiceWarps + part) * 32 + lane, gridDim.x * kServiceWarps * 32);
      serve(p, smem, tasks, tiles, parity, part, kServiceWarps, lane);
    }
    __syncwarp();
    combine_group(p, tasks, group_done, last_group, blockIdx.x + warp * gridDim.x, kNumThreads / 32 * gridDim.x, lane);
  } else {
    ptx::set_max_registers_up<kMathRegisters>();
    MathContext c{p, smem, ring, tiles, {warp / 4, warp % 4, lane}};
    const int num_tasks = warp_uniform(tasks.num_tasks);
    for (int index = blockIdx.x; index < num_tasks; index += gridDim.x) {
      const Task task = tasks.get(smem.experts, p, index).uniform();
      switch (task.block.tile) {
        case 8: run_task<8>(c, task); break;
        case 16: run_task<16>(c, task); break;
        case 32: run_task<32>(c, task); break;
        case 64: run_task<64>(c, task); break;
        default: run_task<128>(c, task); break;
      }
    }
    combine_group(p, tasks, group_done, last_group, blockIdx.x + warp * gridDim.x, kNumThreads / 32 * gridDim.x, lane);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::fence_gpu();
    if (atomicAdd(p.local<uint32_t>(p.ws.exit_count), 1) == gridDim.x - 1) {
      *p.local<uint32_t>(p.ws.exit_count) = 0;
      *p.local<uint32_t>(p.ws.epoch) += 1;
    }
  }
}

}  // namespace hopper_moe
