// Pre-dispatch: one launch from BF16 rows and routing to the inputs of the fused kernel, which are E4M3 rows with
// scales and a list of slots per expert.
#pragma once
#include "layout.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/memory.cuh"

namespace hopper_moe {

struct PreDispatchParams {
  Shape shape;
  Workspace ws;
  const uint16_t* hidden_states;  // BF16 [num_tokens][hidden]
  const int*
      topk_ids;  // [num_tokens][top_k], global ids; negative ones and ids outside expert_begin .. expert_end are masked
  const float* topk_weights;    // [num_tokens][top_k]
  const int* num_valid_tokens;  // device, may be null: rows from it on are masked (CUDA graphs with changing counts)
  float routed_scaling_factor;
  int num_tokens, num_padded_tokens;  // rows from num_tokens to num_padded_tokens get ids of -1
  int expert_begin, expert_end;       // range of ids that the ranks of this launch own
  uint8_t* workspace;
};

constexpr int kPreDispatchThreads = 256;
constexpr int kFp4GroupShift = 6;     // the largest E2M1 value of a token, 6 * 2**6 = 384, is below E4M3's maximum
constexpr int kMinFp4Exponent = -20;  // 6 * 2**-20 and everything smaller is far below half the smallest E4M3 number

// Position of feature `first` of a row, a multiple of 8, and of the three after it; the next four are 16 positions
// further.
__device__ __forceinline__ int position_of(int first) {
  return first / kUnitK * kUnitK + wgmma_position(first % kUnitK);
}

// Eight consecutive features of a token, held by one thread.
struct Features {
  uint32_t words[4];  // BF16

  __device__ __forceinline__ explicit Features(const uint16_t* in) {
    const uint4 v = *reinterpret_cast<const uint4*>(in);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  __device__ __forceinline__ float amax() const {
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      amax = fmaxf(amax, fmaxf(fabsf(ptx::bf16_low(words[i])), fabsf(ptx::bf16_high(words[i]))));
    return amax;
  }
};

// max|x| of the CTA's token, in every thread; at least kAmaxFloor, so that 448 / amax is finite.
__device__ __forceinline__ float token_amax(const uint16_t* in, int hidden) {
  __shared__ float of_warp[kPreDispatchThreads / 32];
  float amax = kAmaxFloor;
  for (int first = threadIdx.x * 8; first < hidden; first += kPreDispatchThreads * 8)
    amax = fmaxf(amax, Features(in + first).amax());
#pragma unroll
  for (int step = 1; step < 32; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kPreDispatchThreads / 32; ++warp) amax = fmaxf(amax, of_warp[warp]);
  return amax;
}

// Quantises eight features to E4M3; `inverse` is 448 / amax.
__device__ __forceinline__ void quantize(const Features& x, uint8_t* out, float inverse) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t first = x.words[2 * half], second = x.words[2 * half + 1];
    const uint32_t low =
        ptx::to_e4m3x2(__fmul_rn(ptx::bf16_low(first), inverse), __fmul_rn(ptx::bf16_high(first), inverse));
    const uint32_t high =
        ptx::to_e4m3x2(__fmul_rn(ptx::bf16_low(second), inverse), __fmul_rn(ptx::bf16_high(second), inverse));
    *reinterpret_cast<uint32_t*>(out + 16 * half) = low | high << 16;  // the second four are 16 positions further
  }
}

// Smallest e with 6 * 2**e >= amax, the largest E2M1 value being 6 = 1.5 * 2**2.
__device__ __forceinline__ int e2m1_exponent(float amax) {
  const uint32_t bits = __float_as_uint(amax);
  return static_cast<int>(bits >> 23) - 127 - 2 + ((bits & 0x7FFFFFu) > 0x400000u);
}

// Nearest E2M1 code of a value in -6..6; ties go to the even code.
__device__ __forceinline__ uint32_t to_e2m1(float v) {
  const float a = fabsf(v);
  const uint32_t code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.f);
  return code | (__float_as_uint(v) >> 31) << 3;
}

// Quantises eight features to E2M1 for FP4 dispatch, with one exponent per 32 features (four lanes) relative to the
// token's E4M3 scale, whose exponent is `token_exponent` (contract section 1, options).
__device__ __forceinline__ void quantize_fp4(const Features& x, uint8_t* out, int8_t* relative_exponent,
                                             int token_exponent) {
  const uint32_t group = 0xFu << threadIdx.x % 32 / 4 * 4;
  float amax = fmaxf(kAmaxFloor, x.amax());
#pragma unroll
  for (int step = 1; step < kFp4Group / 8; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(group, amax, step));
  const int exponent = e2m1_exponent(amax);
  const float inverse = __int_as_float((127 - exponent) << 23);
  uint32_t nibbles = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    nibbles |= (to_e2m1(ptx::bf16_low(x.words[j]) * inverse) | to_e2m1(ptx::bf16_high(x.words[j]) * inverse) << 4)
               << 8 * j;
  }
  *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(nibbles);
  *reinterpret_cast<uint16_t*>(out + 8) = static_cast<uint16_t>(nibbles >> 16);
  if (threadIdx.x % (kFp4Group / 8) == 0)
    *relative_exponent = static_cast<int8_t>(max(exponent - token_exponent, kMinFp4Exponent));
}

__global__ void __launch_bounds__(kPreDispatchThreads)
    pre_dispatch_kernel(const __grid_constant__ PreDispatchParams p) {
  ptx::grid_dependency_launch();
  ptx::grid_dependency_wait();  // for the inputs and the counters of the previous launch of the fused kernel
  const Shape& s = p.shape;
  const int token = blockIdx.x;
  auto at = [&](int64_t offset) { return p.workspace + offset; };
  const bool valid = token < p.num_tokens && (p.num_valid_tokens == nullptr || token < *p.num_valid_tokens);
  if (threadIdx.x < s.top_k) {
    const int slot = token * s.top_k + threadIdx.x;
    const int id = valid ? p.topk_ids[slot] : -1;
    const bool routed = id >= p.expert_begin && id < p.expert_end;
    reinterpret_cast<int*>(at(p.ws.topk_ids))[slot] = routed ? id : -1;
    reinterpret_cast<float*>(at(p.ws.topk_weights))[slot] =
        routed ? p.topk_weights[slot] * p.routed_scaling_factor : 0.f;
    if (routed) {
      const uint32_t parity = *reinterpret_cast<const uint32_t*>(at(p.ws.epoch)) & 1;
      const uint32_t position =
          atomicAdd(reinterpret_cast<uint32_t*>(at(p.ws.expert_count)) + parity * s.num_experts + id, 1u);
      reinterpret_cast<uint32_t*>(at(p.ws.slot_list))[int64_t{id} * s.list_stride() + position] = slot;
    }
  }
  if (!valid) return;
  const int64_t row = int64_t{token} * s.hidden;
  const uint16_t* in = p.hidden_states + row;
  const float amax = token_amax(in, s.hidden);
  float* scale = reinterpret_cast<float*>(at(p.ws.x_scale)) + token;
  if (s.fp4_dispatch) {
    const int exponent = e2m1_exponent(amax) - kFp4GroupShift;
    for (int first = threadIdx.x * 8; first < s.hidden; first += kPreDispatchThreads * 8) {
      const int64_t to = row + position_of(first);
      quantize_fp4(Features(in + first), at(p.ws.x) + to / 2,
                   reinterpret_cast<int8_t*>(at(p.ws.x_exponent)) + (row + first) / kFp4Group, exponent);
    }
    if (threadIdx.x == 0) *scale = __int_as_float((exponent + 127) << 23);
  } else {
    const float inverse = __fdiv_rn(kE4m3Max, amax);
    for (int first = threadIdx.x * 8; first < s.hidden; first += kPreDispatchThreads * 8) {
      quantize(Features(in + first), at(p.ws.x) + row + position_of(first), inverse);
    }
    if (threadIdx.x == 0) *scale = __fdiv_rn(amax, kE4m3Max);
  }
}

}  // namespace hopper_moe
