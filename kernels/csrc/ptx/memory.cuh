// Fences, flags and cached loads. Each function is one instruction; its comment states what it orders.
#pragma once
#include <cstdint>

namespace hopper_moe::ptx {

// Orders this thread's generic-proxy accesses to global memory against async-proxy accesses (bulk copies). The writing
// thread executes it before the release that publishes the data; the reading thread after its acquire.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The same for shared memory that bulk copies read: executed by the issuing thread, after it has acquired the stores of
// other threads.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Release at GPU scope for everything that this thread did or has observed.
__device__ __forceinline__ void red_add_release_gpu(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// The same with acquire; returns the previous value.
__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

// Release at system scope, for peers: everything that this thread did or has observed, including stores of other SMs to
// that peer.
__device__ __forceinline__ void store_release_system(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Acquire at system scope, for what a peer has released.
__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Nanoseconds since a fixed moment, the same on all SMs of a GPU. Orders nothing.
__device__ __forceinline__ uint64_t global_timer() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

__device__ __forceinline__ uint32_t load_acquire_gpu(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// __syncwarp as a named barrier of 32 threads: the same memory ordering among the lanes, but ptxas treats the warp as
// converged. `barrier`: 1..15, used by this warp only.
__device__ __forceinline__ void sync_warp(int barrier) {
  asm volatile("barrier.cta.sync.aligned %0, 32;" ::"r"(barrier) : "memory");
}

// Polls with pauses: hundreds of warps may poll one address, and the increments that they wait for go through the same
// L2 slice.
__device__ __forceinline__ void wait_at_least(const uint32_t* address, uint32_t target) {
  while (load_acquire_gpu(address) < target) __nanosleep(64);
}

// Loads 16 bytes from L2, bypassing this SM's L1, which is not coherent with stores of other SMs in this launch.
__device__ __forceinline__ uint4 load_l2(const void* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// Loads from shared memory with a 32-bit address and a constant offset: no 64-bit pointers and no additions in loops
// that are limited by both.
template <int kOffset>
__device__ __forceinline__ uint4 load_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address), "n"(kOffset));
  return v;
}
template <int kOffset>
__device__ __forceinline__ uint32_t load_shared_u8(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(kOffset));
  return v;
}
template <int kOffset>
__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v.x), "=f"(v.y) : "r"(address), "n"(kOffset));
  return v;
}

// The CTA's dynamic shared memory; its size is set at launch.
__device__ __forceinline__ uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  return shared_memory;
}

// Programmatic dependent launch: wait for the grids that this one depends on; let dependents start their prologue.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void grid_dependency_launch() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

template <int kRegisters>
__device__ __forceinline__ void set_max_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace hopper_moe::ptx
