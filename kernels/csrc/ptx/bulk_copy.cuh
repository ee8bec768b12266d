// Bulk asynchronous copies, no tensor map (PTX ISA: "cp.async.bulk"). Addresses and sizes are multiples of 16 bytes.
#pragma once
#include <cstdint>

namespace hopper_moe::ptx {

// L2 cache policies as `createpolicy` encodes them.
constexpr uint64_t kEvictFirst =
    0x12F0000000000000ull;  // for data that is read once: does not evict other data from L2
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;

// Global to shared by the async proxy; completes `num_bytes` on `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* global, uint32_t num_bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(smem),
      "l"(global), "r"(num_bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Shared to global by the async proxy, in this thread's current bulk group. Stores of other threads to `smem` have to
// be acquired and fenced (fence_async_shared) first.
__device__ __forceinline__ void bulk_store(void* global, uint32_t smem, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(smem), "r"(num_bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's bulk groups have not yet read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Waits until at most kPending of them are incomplete. What the others wrote is visible to this thread, so its next
// release publishes it.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace hopper_moe::ptx
