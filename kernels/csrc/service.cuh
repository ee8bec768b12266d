// The service warps: the epilogue of every task as its tile arrives; while waiting for one, tokens to combine.
#pragma once
#include "combine.cuh"
#include "epilogue.cuh"

namespace hopper_moe {

class ServiceWarp {
 public:
  __device__ ServiceWarp(const MegaMoeParams& p, SharedStorage& smem, const TileBarriers& tile, const TaskList& tasks, int warp, int lane,
                         uint32_t parity)
      : p_(p), smem_(smem), tile_(tile), tasks_(tasks), lane_(lane), warp_(warp), parity_(parity),
        unit_(worker()) {}

  __device__ __forceinline__ int worker() const { return blockIdx.x + warp_ * gridDim.x; }
  __device__ __forceinline__ int num_workers() const { return kServiceWarps * gridDim.x; }

  __device__ __forceinline__ void run() {
    const Epilogue epilogue(p_, smem_, tile_, warp_, lane_, parity_);
    int index = blockIdx.x;
    uint32_t phase = 0;
    while (index < tasks_.num_tasks || group_ < last_group()) {
      if (index < tasks_.num_tasks && __all_sync(~0u, ptx::mbarrier_test_wait(tile_.full, phase))) {
        epilogue.run(tasks_.get(smem_.experts, p_, index));
        phase ^= 1;
        index += gridDim.x;
      } else if (!combine_some()) {
        __nanosleep(50);
      }
    }
  }

 private:
  __device__ __forceinline__ int last_group() const { return p_.shape.num_column_groups() - 1; }

  // One unit combined, if there is any to do now.
  __device__ __forceinline__ bool combine_some() {
    if (group_ >= last_group()) return false;
    const CombineGroup group(p_, tasks_, group_);
    if (unit_ < group.num_units) {
      const uint32_t* done = p_.local<uint32_t>(p_.ws.group_done) + parity_ * p_.shape.num_column_groups() + group_;
      if (!__all_sync(~0u, ptx::load_acquire_gpu(done) >= group.target)) return false;
      combine_unit(p_, group, unit_, lane_);
      unit_ += num_workers();
    } else {
      ++group_;
      unit_ = worker();
    }
    return true;
  }

  const MegaMoeParams& p_;
  SharedStorage& smem_;
  const TileBarriers& tile_;
  const TaskList& tasks_;
  const int lane_, warp_;
  const uint32_t parity_;
  int group_ = 0, unit_;
};

}  // namespace hopper_moe
