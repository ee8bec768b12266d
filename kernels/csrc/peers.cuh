// Cross-rank flags of one launch: counts at the start, results per column group at the end.
//
// Every flag holds a launch number, so flags are never cleared. A rank may be one launch ahead of another, not more: it
// waits for the counts of all ranks before it accesses their memory, and for all rows of its tokens before it ends.
// Therefore everything that a peer reads here (tokens, lists) or writes here (combine slots) is complete before the
// pre-dispatch of the next launch. Only the counts need two copies.
#pragma once
#include "layout.cuh"
#include "ptx/memory.cuh"

namespace hopper_moe {

enum class PeerStep : uint32_t { kCounts = 1, kResults = 2 };  // texts: kernels/failure.py

// Reports the missing rank to the host, then ends the process's CUDA context: no later launch may compute with only
// some of the ranks.
__device__ __noinline__ void give_up(const MegaMoeParams& p, PeerStep step, int missing_rank, uint32_t launch) {
  if (atomicExch(p.local<uint32_t>(p.ws.gave_up), 1) == 0) {
    volatile PeerFailure* failure = p.failure;
    failure->step = static_cast<uint32_t>(step);
    failure->missing_rank = missing_rank;
    failure->layer = p.layer;
    failure->launch = launch;
    __threadfence_system();
    failure->reported = 1;
    __threadfence_system();
    __trap();
  }
  while (true) __nanosleep(1000);  // the trap of the reporting thread ends this one too
}

__device__ __forceinline__ bool has_reached(const uint32_t* flag, uint32_t launch) {
  return static_cast<int>(ptx::load_acquire_system(flag) - launch) >= 0;  // also correct when the number wraps around
}

__device__ __forceinline__ void wait_for_peer(const MegaMoeParams& p, const uint32_t* flag, uint32_t launch,
                                              PeerStep step, int rank) {
  const uint64_t begin = ptx::global_timer();
  while (!has_reached(flag, launch)) {
    if (ptx::global_timer() - begin > p.timeout_ns) give_up(p, step, rank, launch);
  }
}

// Sends every rank the counts of its experts and waits for the counts of all others. Called by all threads; ends with
// __syncthreads.
__device__ inline void exchange_counts(const MegaMoeParams& p, uint32_t launch) {
  const Shape& s = p.shape;
  const int to = blockIdx.x;
  if (to < s.num_ranks) {
    const uint32_t* counts = p.counters(p.ws.expert_count, s.num_experts, launch) + to * s.num_local_experts;
    uint32_t* received =
        p.peer<uint32_t>(to, p.ws.received_count) + (p.parity_of(launch) * s.num_ranks + s.rank) * s.num_local_experts;
    for (int i = threadIdx.x; i < s.num_local_experts; i += blockDim.x) received[i] = __ldcg(counts + i);
    __syncthreads();
    if (threadIdx.x == 0) ptx::store_release_system(p.peer<uint32_t>(to, p.ws.arrived) + s.rank, launch);
  }
  const int from = threadIdx.x;
  if (from < s.num_ranks) wait_for_peer(p, p.local<uint32_t>(p.ws.arrived) + from, launch, PeerStep::kCounts, from);
  __syncthreads();
}

// Called by one warp after it has observed that all rows of the group are stored.
__device__ __forceinline__ void announce_results(const MegaMoeParams& p, int group, uint32_t launch, int lane) {
  const Shape& s = p.shape;
  if (lane < s.num_ranks) {
    ptx::store_release_system(p.peer<uint32_t>(lane, p.ws.results_sent) + s.rank * s.num_column_groups() + group,
                              launch);
  }
}

}  // namespace hopper_moe
