// The service warps: the epilogue of every pass as it arrives; while waiting for one, first rows to dispatch, then tokens to combine.
#pragma once
#include "combine.cuh"
#include "dispatch.cuh"

namespace hopper_moe {

class ServiceWarp {
 public:
  __device__ ServiceWarp(const MegaMoeParams& p, SharedStorage& smem, const SumsBarriers& sums, const TaskList& tasks, int warp, int lane,
                         uint32_t parity)
      : p_(p), smem_(smem), sums_(sums), tasks_(tasks), lane_(lane), warp_(warp), parity_(parity),
        num_rows_(smem.experts.slot_base[p.shape.num_local_experts]), row_(worker()), unit_(worker()) {}

  __device__ __forceinline__ int worker() const { return blockIdx.x + warp_ * gridDim.x; }
  __device__ __forceinline__ int num_workers() const { return kServiceWarps * gridDim.x; }

  __device__ __forceinline__ void run() {
    Epilogue epilogue(p_, smem_, sums_, warp_, lane_, parity_);
    int index = blockIdx.x, pass = 0;
    uint32_t phase = 0;
    while (index < tasks_.num_tasks || row_ < num_rows_ || group_ < last_group()) {
      if (index < tasks_.num_tasks && __all_sync(~0u, ptx::mbarrier_test_wait(sums_.full, phase))) {
        const Task task = tasks_.get(smem_.experts, p_, index);
        epilogue.run_pass(task, pass);
        phase ^= 1;
        if (task.is_l1 && pass == 0) {
          pass = 1;
        } else {
          pass = 0;
          index += gridDim.x;
        }
      } else if (!side_job()) {
        __nanosleep(50);
      }
    }
  }

 private:
  __device__ __forceinline__ int last_group() const { return p_.shape.num_column_groups() - 1; }

  // One row dispatched or one unit combined, if there is any to do now.
  __device__ __forceinline__ bool side_job() {
    if (row_ < num_rows_) {
      dispatch_row(p_, smem_.experts, p_.local<uint32_t>(p_.ws.x_ready) + parity_ * p_.shape.max_blocks(), row_, lane_);
      row_ += num_workers();
      return true;
    }
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
  const SumsBarriers& sums_;
  const TaskList& tasks_;
  const int lane_, warp_;
  const uint32_t parity_;
  const int num_rows_;
  int row_, group_ = 0, unit_;
};

}  // namespace hopper_moe
