// csrc/ptx/wgmma.cuh on the emulated GPU.
#pragma once
#include <cuda_runtime.h>

namespace hopper_moe::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_multiplies(); }
template <int kPending>
void wgmma_wait() {
  emulator::wait_multiplies(kPending);
}

inline uint64_t wgmma_descriptor(uint32_t smem, int step) {
  constexpr uint32_t kHigh = 1u << 30 | 1024 >> 4;
  return uint64_t{kHigh} << 32 | ((smem >> 4) + (1u << 16) + 2 * step);
}

constexpr bool kE5m2Registers = HM_WIDE_SCALES;

template <int kSums>
void wgmma_begin(float (&d)[kSums], const uint32_t* a, uint64_t b) {
  emulator::issue_multiply(2 * kSums, true, kE5m2Registers, d, a, 0, b);
}
template <int kSums>
void wgmma_begin(float (&d)[kSums], uint64_t a, uint64_t b) {
  emulator::issue_multiply(2 * kSums, true, false, d, nullptr, a, b);
}
template <int kSums>
void wgmma(float (&d)[kSums], const uint32_t* a, uint64_t b) {
  emulator::issue_multiply(2 * kSums, false, kE5m2Registers, d, a, 0, b);
}
template <int kSums>
void wgmma(float (&d)[kSums], uint64_t a, uint64_t b) {
  emulator::issue_multiply(2 * kSums, false, false, d, nullptr, a, b);
}

}  // namespace hopper_moe::ptx
