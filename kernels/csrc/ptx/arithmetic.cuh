// Arithmetic instructions that CUDA C++ does not offer, or not with the rounding of the contract.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

namespace hopper_moe::ptx {

// Byte permute: result byte i = byte (selector nibble i, low 3 bits) of {b, a}.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// min / max that propagate NaN instead of replacing it by the clamp.
__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// 1/x within 1 ulp; 1/inf = 0, which silu needs for large negative inputs.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// 2**x within 2 ulp; results below 2**-126 are 0, which does not change 1 + 2**x.
__device__ __forceinline__ float exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Two FP32 to two E4M3, round to nearest even, low byte = `low`.
__device__ __forceinline__ uint16_t to_e4m3x2(float low, float high) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}

// Two E4M3 to two FP32, exact; x = low byte.
__device__ __forceinline__ float2 from_e4m3x2(uint16_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

// Two E4M3 times a power of two, to the nearest E4M3 (ties to even); the products are exact in FP16 down to 2**-24.
__device__ __forceinline__ uint16_t scale_e4m3x2(uint16_t pair, __half2 factor) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&halves), factor);
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(r) : "r"(*reinterpret_cast<const uint32_t*>(&product)));
  return r;
}

// Two FP32 to two BF16, round to nearest even, low half = `low`.
__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Stores one, two or four 8x8 b16 matrices from accumulator fragments to shared memory, transposed: memory row j of
// matrix m, whose address is given by lane 8 * m + j, receives column j of the fragment.
__device__ __forceinline__ void store_matrix_transposed(uint32_t smem, const uint32_t (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(smem), "r"(r[0]) : "memory");
}
__device__ __forceinline__ void store_matrix_transposed(uint32_t smem, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem), "r"(r[0]), "r"(r[1])
               : "memory");
}
__device__ __forceinline__ void store_matrix_transposed(uint32_t smem, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Magnitudes of two BF16, and the larger magnitudes of two pairs (a number wins against NaN).
__device__ __forceinline__ uint32_t abs_bf16x2(uint32_t pair) { return pair & 0x7FFF7FFFu; }
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// BF16 halves of a word as FP32.
__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

}  // namespace hopper_moe::ptx
