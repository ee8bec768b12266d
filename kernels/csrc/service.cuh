// The service warps: the epilogue of every task as its tile arrives; while waiting for one, tokens to combine.
#pragma once
#include "combine.cuh"
#include "epilogue.cuh"

namespace hopper_moe {

__device__ __forceinline__ void serve(const Epilogue& epilogue, Combiner& combiner, const MegaMoeParams& p, const SharedStorage& smem,
                                      const TileBarriers& tile, const TaskList& tasks) {
  uint32_t phase = 0;
  for (int index = blockIdx.x; index < tasks.num_tasks; index += gridDim.x, phase ^= 1) {
    while (!__all_sync(~0u, ptx::mbarrier_test_wait(tile.full, phase))) {
      if (!combiner.step(false)) __nanosleep(50);
    }
    epilogue.run(tasks.get(smem.experts, p, index));
  }
}

}  // namespace hopper_moe
