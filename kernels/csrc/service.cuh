// The service warps: the epilogue of every task as its tile arrives; while waiting for one, rows to dispatch, then tokens to combine.
#pragma once
#include "combine.cuh"
#include "dispatch.cuh"
#include "epilogue.cuh"

namespace hopper_moe {

constexpr int kMinTokensToCombineEarly = 256;

template <typename Epilogue, typename Combiner>
__device__ __forceinline__ void serve(const MegaMoeParams& p, SharedStorage& smem, const TileBarriers& tile, const TaskList& tasks,
                                      Combiner& combiner, TaskFeed feed, uint32_t launch, int part, int lane) {
  const int num_service = kServiceWarps * gridDim.x;
  dispatch_first<4>(p, smem.experts, launch, blockIdx.x + (kMathWarps + part) * gridDim.x, (kMathWarps + kServiceWarps) * gridDim.x, lane);
  const Epilogue epilogue(p, smem, tile, tasks.num_blocks, part, lane, launch);
  const DispatchPlan plan(p, smem.experts);
  WaveGate gate(p, smem.experts, launch, lane);
  // With few tokens a look at the combine counters takes longer than it could save: tiles are then answered at once, tokens combined at the end.
  const bool combines = p.num_tokens >= kMinTokensToCombineEarly;
  int row = plan.num_first + blockIdx.x + part * gridDim.x, index = feed.next().index;
  uint32_t phase = 0;
  while (index < tasks.num_tasks || row < plan.num_rows) {
    if (index < tasks.num_tasks && __all_sync(~0u, ptx::mbarrier_test_wait(tile.full, phase))) {
      epilogue.run(tasks.get(smem.experts, p, index));
      phase ^= 1;
      index = warp_uniform(feed.next().index);
    } else if (row < plan.num_rows && gate.admits(row)) {
      dispatch_row<4>(p, smem.experts, launch, row, lane);
      row += num_service;
    } else if (!combines) {
      ptx::mbarrier_try_wait(tile.full, phase);   // sleeps until the tile is there, or a while
    } else if (!combiner.step(false)) {
      __nanosleep(50);
    }
  }
}

}  // namespace hopper_moe
