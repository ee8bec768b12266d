// csrc/ptx/memory.cuh on the emulated GPU.
#pragma once
#include <cuda_runtime.h>

namespace hopper_moe::ptx {

inline void fence_async_global() { emulator::proxy_fence(); }
inline void fence_async_shared() { emulator::proxy_fence(); }

inline void red_add_release_gpu(uint32_t* address, uint32_t value) {
  emulator::fetch_add(address, value, emulator::Order::kRelease);
}
inline uint32_t add_acq_rel_gpu(uint32_t* address, uint32_t value) {
  return emulator::fetch_add(address, value, emulator::Order::kAcquireRelease);
}
inline void store_release_system(uint32_t* address, uint32_t value) {
  emulator::store_release(address, value, emulator::Scope::kSystem);
}
inline uint32_t load_acquire_system(const uint32_t* address) {
  return emulator::load_acquire(address, emulator::Scope::kSystem);
}
inline uint32_t load_acquire_gpu(const uint32_t* address) {
  return emulator::load_acquire(address, emulator::Scope::kGpu);
}
inline void sync_warp(int barrier) { emulator::sync_warp(barrier); }
inline uint64_t global_timer() { return emulator::Machine::get().now(); }
inline void wait_at_least(const uint32_t* address, uint32_t target) {
  while (load_acquire_gpu(address) < target) emulator::Machine::get().sleep("wait_at_least");
}

inline uint4 load_l2(const void* address) { return *static_cast<const uint4*>(address); }

template <typename T>
T load_shared(uint32_t address) {
  T value;
  std::memcpy(&value, emulator::me().cta->at(address, sizeof value), sizeof value);
  return value;
}
template <int kOffset>
uint4 load_shared_v4(uint32_t address) {
  return load_shared<uint4>(address + kOffset);
}
template <int kOffset>
uint32_t load_shared_u8(uint32_t address) {
  return load_shared<uint8_t>(address + kOffset);
}
template <int kOffset>
float2 load_shared_float2(uint32_t address) {
  return load_shared<float2>(address + kOffset);
}

inline uint8_t* dynamic_shared_memory() { return emulator::me().cta->shared; }

inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}
template <int kRegisters>
void set_max_registers_up() {}
template <int kRegisters>
void set_max_registers_down() {}

}  // namespace hopper_moe::ptx
