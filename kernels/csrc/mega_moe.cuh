// The fused MoE kernel for SM90: dispatch, L1, SwiGLU, requantisation, L2 and combine in one persistent launch. See
// kernels/DESIGN.md.
#pragma once
#include <type_traits>

#include "products.cuh"
#include "service.cuh"

namespace hopper_moe {

constexpr int kMathRegisters = 224, kOtherRegisters = 56;
constexpr int kNumWarps = kMathWarps + kServiceWarps + 2;
constexpr int kNumThreads = 32 * kNumWarps;
// setmaxnreg distributes what the CTA got at launch, a multiple of 8 per thread; a request for more never returns.
static_assert(32 * (kMathWarps * kMathRegisters + (kNumWarps - kMathWarps) * kOtherRegisters) <=
              65536 / kNumThreads / 8 * 8 * kNumThreads);

// Roles of the warps: warpgroups 0 and 1 multiply; in the third, two service warps run the epilogue, one warp streams
// weights and one activations.
constexpr int kFirstProducerWarp = kMathWarps + kServiceWarps;

// Clears the counters of the other parity for the next launch; their last users have finished. `thread` of
// `num_threads` over the whole grid.
__device__ inline void clear_next_counters(const MegaMoeParams& p, uint32_t launch, int thread, int num_threads) {
  auto clear = [&](int64_t offset, int num) {
    uint32_t* counters = p.counters(offset, num, launch + 1);
    for (int i = thread; i < num; i += num_threads) counters[i] = 0;
  };
  clear(p.ws.expert_count, p.shape.num_experts);
  clear(p.ws.x_ready, p.shape.max_blocks());
  clear(p.ws.h_ready, p.shape.max_blocks());
  clear(p.ws.group_done, p.shape.num_column_groups());
  clear(p.ws.group_claimed, p.shape.num_column_groups());
  clear(p.ws.next_task, 1);
}

// A rank whose experts got no rows has no last task that would announce the results.
__device__ inline void announce_nothing(const MegaMoeParams& p, uint32_t launch, int warp, int lane) {
  for (int group = warp; group < p.shape.num_column_groups(); group += kServiceWarps)
    announce_results(p, group, launch, lane);
}

// Called once per CTA, after it has read the launch counter for the last time. The CTA need not be finished: the last
// caller may increment the counter.
__device__ inline void count_exit(const MegaMoeParams& p, uint32_t launch) {
  if (ptx::add_acq_rel_gpu(p.local<uint32_t>(p.ws.exit_count), 1) == gridDim.x - 1) {
    *p.local<uint32_t>(p.ws.exit_count) = 0;
    *p.local<uint32_t>(p.ws.epoch) = launch;
  }
}

// kFp8Combine: see Shape::fp8_combine.
template <bool kFp8Combine>
__global__ void __launch_bounds__(kNumThreads, 1) mega_moe_kernel(const __grid_constant__ MegaMoeParams p) {
  using Slots = std::conditional_t<kFp8Combine, E4m3Slots, Bf16Slots>;
  SharedStorage& smem = *reinterpret_cast<SharedStorage*>(ptx::dynamic_shared_memory());
  const int warp = warp_uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const Ring ring(smem.stages);
  const TileBarriers tile(smem);
  const TaskFeed feed(smem.task_slots, ptx::smem_address(smem.task_posted));
  if (threadIdx.x == 0) {
    ring.init();
    tile.init();
    feed.init();
    ptx::fence_mbarrier_init();
  }
  ptx::grid_dependency_wait();  // for pre-dispatch: tokens, lists and counts
  if (threadIdx.x == 0) smem.launch = __ldcg(p.local<uint32_t>(p.ws.epoch)) + 1;
  __syncthreads();
  const uint32_t launch = smem.launch;
  if (p.shape.num_ranks > 1) exchange_counts(p, launch);
  build_expert_table(smem.experts, p, launch);  // ends with __syncthreads
  const TaskList tasks(smem.experts, p);

  if (warp < kMathWarps) {
    ptx::set_max_registers_up<kMathRegisters>();
    dispatch_first<8>(p, smem.experts, launch, blockIdx.x + warp * gridDim.x, (kMathWarps + kServiceWarps) * gridDim.x,
                      lane);
    MathContext c{p, smem, tile, {warp / 4, warp % 4, lane}, StageCursor(ring)};
    run_math(c, feed);
    // Values that only combine needs are computed here, so that they take no registers during the products.
    combine_rest<Slots>(p, smem.experts.block_base[p.shape.num_local_experts], smem.launch,
                        warp * gridDim.x + blockIdx.x, kMathWarps * gridDim.x, lane);
  } else {
    ptx::set_max_registers_down<kOtherRegisters>();
    if (warp < kFirstProducerWarp) {
      const int part = warp - kMathWarps, num_threads = kServiceWarps * 32;
      clear_next_counters(p, launch, blockIdx.x * num_threads + part * 32 + lane, gridDim.x * num_threads);
      if (tasks.num_blocks == 0 && p.shape.num_ranks > 1 && blockIdx.x == 0) announce_nothing(p, launch, part, lane);
      EarlyCombiner<Slots> combiner(p, tasks.num_blocks, launch, lane);
      serve<Epilogue<kFp8Combine>>(p, smem, tile, tasks, combiner, feed, launch, part, lane);
    } else if (lane == 0) {
      if (warp == kFirstProducerWarp) {
        produce_weights(p, smem.experts, tasks, ring, feed, launch);
        count_exit(p, launch);
      } else {
        produce_activations(p, smem.experts, tasks, ring, feed, launch);
      }
    }
  }
}

}  // namespace hopper_moe
