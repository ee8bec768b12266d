// The service warps: the epilogue of every task when its tile is ready; in between rows to dispatch, then tokens to
// combine.
#pragma once
#include "combine.cuh"
#include "dispatch.cuh"
#include "epilogue.cuh"

namespace hopper_moe {

template <typename Epilogue, typename Combiner>
__device__ __forceinline__ void serve(const MegaMoeParams& p, SharedStorage& smem, const TileBarriers& tile,
                                      const TaskList& tasks, Combiner& combiner, TaskFeed feed, uint32_t launch,
                                      int part, int lane) {
  const int num_service = kServiceWarps * gridDim.x;
  dispatch_first<4>(p, smem.experts, launch, blockIdx.x + (kMathWarps + part) * gridDim.x,
                    (kMathWarps + kServiceWarps) * gridDim.x, lane);
  const Epilogue epilogue(p, smem, tile, tasks.num_blocks, part, lane, launch);
  const DispatchPlan plan(p, smem.experts);
  WaveGate gate(p, smem.experts, launch, lane);
  RowQueue rows(p, smem.experts, plan.num_first + blockIdx.x + part * gridDim.x, num_service, plan.num_rows, lane);
  uint32_t phase = 0;
  Task task;
  // Computed before the tile is ready, because the math warps wait for everything that follows.
  auto next_task = [&] {
    const int index = warp_uniform(feed.next().index);
    const bool there = index < tasks.num_tasks;
    if (there) task = tasks.get(smem.experts, p, index);
    return there;
  };
  bool has_task = next_task();
  while (true) {
    if (has_task && __all_sync(~0u, ptx::mbarrier_test_wait(tile.full, phase))) {
      epilogue.run(task);
      phase ^= 1;
      if (task.is_pair) {
        task.block = token_block(smem.experts, p, task.block.index + 1);
        task.is_pair = false;
      } else {
        has_task = next_task();
      }
    } else if (!rows.empty()) {
      if (gate.admits(rows.index())) {
        dispatch_row<4>(p, rows.pop(), launch, lane);
      } else {
        __nanosleep(50);
      }
    } else if (has_task && (combiner.finished() || task.is_l1 || combiner.group() >= task.tile / kGroupTiles)) {
      ptx::mbarrier_try_wait(
          tile.full,
          phase);  // rows of this task's group cannot be complete yet: suspends until the tile is ready or a time limit
    } else if (combiner.finished()) {
      return;
    } else if (!combiner.step()) {
      __nanosleep(50);
    }
  }
}

}  // namespace hopper_moe
