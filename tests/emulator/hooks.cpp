// What -fsanitize=thread calls before the accesses of the code that is compiled with it.
#include "machine.hpp"

namespace {

void access(void* address, size_t num_bytes, bool is_write, void* code) {
  emulator::Machine::get().on_access(address, num_bytes, is_write, code);
}

}  // namespace

#define HM_HOOK(NAME, NUM_BYTES, IS_WRITE) \
  extern "C" void __tsan_##NAME(void* address) { access(address, NUM_BYTES, IS_WRITE, __builtin_return_address(0)); }
#define HM_HOOKS(NUM_BYTES) HM_HOOK(read##NUM_BYTES, NUM_BYTES, false) HM_HOOK(write##NUM_BYTES, NUM_BYTES, true)
#define HM_UNALIGNED(NUM_BYTES) \
  HM_HOOK(unaligned_read##NUM_BYTES, NUM_BYTES, false) HM_HOOK(unaligned_write##NUM_BYTES, NUM_BYTES, true)
// clang-format off: these end without a semicolon
HM_HOOKS(1)
HM_HOOKS(2) HM_HOOKS(4) HM_HOOKS(8) HM_HOOKS(16) HM_UNALIGNED(2) HM_UNALIGNED(4) HM_UNALIGNED(8) HM_UNALIGNED(16)
    // clang-format on

    extern "C" void __tsan_read_range(void* address, size_t num_bytes) {
  access(address, num_bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t num_bytes) {
  access(address, num_bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}

// Atomics of the host's own libraries: whatever the order asked for, this one.
extern "C" uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
extern "C" uint64_t __tsan_atomic64_load(const volatile uint64_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
extern "C" uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* address, uint32_t value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
extern "C" uint64_t __tsan_atomic64_fetch_add(volatile uint64_t* address, uint64_t value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
extern "C" uint64_t __tsan_atomic64_fetch_sub(volatile uint64_t* address, uint64_t value, int) {
  return __atomic_fetch_sub(address, value, __ATOMIC_SEQ_CST);
}
extern "C" void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
