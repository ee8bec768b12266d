// csrc/ptx/mbarrier.cuh on the emulated GPU.
#pragma once
#include <cuda_runtime.h>

namespace hopper_moe::ptx {

inline uint32_t smem_address(const void* pointer) { return emulator::shared_address(pointer); }

inline void mbarrier_init(uint32_t barrier, uint32_t num_arrivals) { emulator::barrier_init(barrier, num_arrivals); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t num_bytes) {
  emulator::barrier_arrive(barrier, num_bytes);
}

// Any lane may be the one.
inline bool elect_one() {
  struct Mine {
    bool elected;
  } mine{false};
  emulator::meet(~0u, "elect_one", &mine, [](void* const* lanes, uint32_t) {
    static_cast<Mine*>(lanes[emulator::Machine::get().random(emulator::kWarpSize)])->elected = true;
  });
  return mine.elected;
}

inline bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
  emulator::Machine::get().yield();
  return emulator::barrier_passed(barrier, parity);
}
inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  emulator::Machine::get().sleep("mbarrier_try_wait");
  return emulator::barrier_passed(barrier, parity);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }

}  // namespace hopper_moe::ptx
