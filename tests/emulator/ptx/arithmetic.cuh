// csrc/ptx/arithmetic.cuh on the emulated GPU.
#pragma once
#include <cuda_fp16.h>

namespace hopper_moe::ptx {

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return r;
}

inline float min_nan(float a, float b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::fmin(a, b); }
inline float max_nan(float a, float b) { return std::isnan(a) ? a : std::isnan(b) ? b : std::fmax(a, b); }
inline float reciprocal(float x) { return 1.f / x; }
inline float exp2(float x) { return std::exp2(x); }

inline uint16_t to_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(emulator::to_e4m3(low) | emulator::to_e4m3(high) << 8);
}
inline float2 from_e4m3x2(uint16_t pair) { return {emulator::from_e4m3(pair & 0xFF), emulator::from_e4m3(pair >> 8)}; }
inline uint16_t scale_e4m3x2(uint16_t pair, __half2 factor) {
  const float2 v = from_e4m3x2(pair);
  return to_e4m3x2(v.x * factor.x, v.y * factor.y);
}

inline uint32_t to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

// Lane 8 * m + j gives the address of matrix m's row j, which receives column j of the fragment.
template <int kMatrices>
void store_matrix_transposed(uint32_t smem, const uint32_t (&r)[kMatrices]) {
  struct Mine {
    uint32_t address;
    const uint32_t* r;
  } mine{smem, r};
  emulator::meet(~0u, "stmatrix", &mine, [](void* const* lanes, uint32_t) {
    const emulator::Cta& cta = *emulator::me().cta;
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const uint32_t* fragment = static_cast<Mine*>(lanes[lane])->r;
      for (int i = 0; i < 2 * kMatrices; ++i) {
        const int matrix = i / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
        const uint32_t to = static_cast<Mine*>(lanes[8 * matrix + column])->address + 2 * row;
        const auto value = static_cast<uint16_t>(fragment[matrix] >> 16 * (i % 2));
        *reinterpret_cast<uint16_t*>(cta.at(to, 2)) = value;
      }
    }
  });
}

inline float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
inline uint32_t abs_bf16x2(uint32_t pair) { return pair & 0x7FFF7FFFu; }
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  return to_bf16x2(std::fmax(bf16_low(a), bf16_low(b)), std::fmax(bf16_high(a), bf16_high(b)));
}

}  // namespace hopper_moe::ptx
