// Fences, flags and cached loads. Each function is one instruction; the comment says what it orders.
#pragma once
#include <cstdint>

namespace hopper_moe::ptx {

// Orders this thread's generic-proxy accesses to global memory against async-proxy ones (bulk copies). The thread that wrote must execute it
// itself, before the release that publishes the data; the thread that reads, after its acquire.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The same for shared memory that bulk copies read: by the thread that issues them, after it has acquired what others stored.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Release at GPU scope for everything this thread did or has observed.
__device__ __forceinline__ void red_add_release_gpu(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// The same, and acquire; returns the value before.
__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

// Release at system scope, for peers: everything this thread did or has observed, other SMs' stores to that peer included.
__device__ __forceinline__ void store_release_system(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Acquire at system scope, for what a peer has released.
__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Nanoseconds since some fixed moment, the same on all SMs of a GPU; orders nothing.
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

// Polls with pauses: hundreds of warps may wait on one address, and the increments they wait for go through the same L2 slice.
__device__ __forceinline__ void wait_at_least(const uint32_t* address, uint32_t target) {
  while (load_acquire_gpu(address) < target) __nanosleep(64);
}

// 16 bytes from L2, never from this SM's L1 (which is not coherent with other SMs' stores in this launch).
__device__ __forceinline__ uint4 load_l2(const void* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
  return v;
}

// Loads from shared memory by 32-bit address and constant offset: no 64-bit pointers and no additions in loops that are short of both.
template <int kOffset>
__device__ __forceinline__ uint4 load_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address), "n"(kOffset));
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

// The CTA's dynamic shared memory, whose size is the launch's.
__device__ __forceinline__ uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  return shared_memory;
}

// Programmatic dependent launch: wait for the grids this one depends on / let dependents start their prologue.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void set_max_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace hopper_moe::ptx
