// Pre-dispatch: one launch from BF16 rows and routing to what the fused kernel reads: E4M3 rows with scales, the list of slots per expert.
#pragma once
#include "layout.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/memory.cuh"

namespace hopper_moe {

struct PreDispatchParams {
  Shape shape;
  Workspace ws;
  const uint16_t* hidden_states;        // BF16 [num_tokens][hidden]
  const int* topk_ids;                  // [num_tokens][top_k], global ids; negative or foreign: masked
  const float* topk_weights;            // [num_tokens][top_k]
  const int* num_valid_tokens;          // device, may be null: rows from it on are masked (CUDA graphs with changing counts)
  float routed_scaling_factor;
  int num_tokens, num_padded_tokens;    // rows in between get ids of -1
  int expert_begin, expert_end;         // ids that any rank of this launch owns
  uint8_t* workspace;
};

constexpr int kPreDispatchThreads = 256;
constexpr int kFp4GroupShift = 6;       // the group's largest E2M1 value, 6 * 2**6 = 384, still fits E4M3
constexpr int kMinFp4Exponent = -20;    // 6 * 2**-20 is far below half the smallest E4M3 number, as is everything smaller

// Position in its group of the first of a lane's 8 features; the second four stand 16 further.
__device__ __forceinline__ int lane_position(int lane) { return lane * 8 / kUnitK * kUnitK + wgmma_position(lane * 8 % kUnitK); }

// One warp, one scale group of up to 256 features: 8 a lane.
__device__ __forceinline__ void quantize_group(const uint16_t* in, uint8_t* out, float* scale, int lane, bool active) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (active) v = *reinterpret_cast<const uint4*>(in + lane * 8);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  float amax = kAmaxFloor;   // a zero group has a finite 448 / amax
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fmaxf(fabsf(ptx::bf16_low(words[i])), fabsf(ptx::bf16_high(words[i]))));
#pragma unroll
  for (int step = 1; step < 32; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  const float inverse = __fdiv_rn(kE4m3Max, amax);
  uint32_t q[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    q[i] = ptx::to_e4m3x2(__fmul_rn(ptx::bf16_low(words[2 * i]), inverse), __fmul_rn(ptx::bf16_high(words[2 * i]), inverse)) |
           static_cast<uint32_t>(ptx::to_e4m3x2(__fmul_rn(ptx::bf16_low(words[2 * i + 1]), inverse), __fmul_rn(ptx::bf16_high(words[2 * i + 1]), inverse)))
               << 16;
  }
  if (active) {
    uint8_t* at = out + lane_position(lane);
    *reinterpret_cast<uint32_t*>(at) = q[0];
    *reinterpret_cast<uint32_t*>(at + 16) = q[1];
  }
  if (lane == 0) *scale = __fdiv_rn(amax, kE4m3Max);
}

// Smallest e with 6 * 2**e >= amax, the largest E2M1 value being 6 = 1.5 * 2**2.
__device__ __forceinline__ int e2m1_exponent(float amax) {
  const uint32_t bits = __float_as_uint(amax);
  return static_cast<int>(bits >> 23) - 127 - 2 + ((bits & 0x7FFFFFu) > 0x400000u);
}

// Nearest E2M1 code of a value in -6..6; halfway goes to the even code.
__device__ __forceinline__ uint32_t to_e2m1(float v) {
  const float a = fabsf(v);
  const uint32_t code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.f);
  return code | (__float_as_uint(v) >> 31) << 3;
}

// The same for FP4 dispatch: E2M1 with an exponent per 32 features, relative to the group's E4M3 scale (contract section 1, options).
__device__ __forceinline__ void quantize_group_fp4(const uint16_t* in, uint8_t* out, int8_t* exponents, float* scale, int lane, bool active) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (active) v = *reinterpret_cast<const uint4*>(in + lane * 8);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  float amax = kAmaxFloor;
#pragma unroll
  for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fmaxf(fabsf(ptx::bf16_low(words[i])), fabsf(ptx::bf16_high(words[i]))));
#pragma unroll
  for (int step = 1; step < kFp4Group / 8; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  const int exponent = e2m1_exponent(amax);
  const int group_exponent = __reduce_max_sync(~0u, exponent) - kFp4GroupShift;
  const float inverse = __int_as_float((127 - exponent) << 23);
  uint32_t nibbles = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    nibbles |= (to_e2m1(ptx::bf16_low(words[i]) * inverse) | to_e2m1(ptx::bf16_high(words[i]) * inverse) << 4) << 8 * i;
  }
  if (active) {
    uint8_t* at = out + lane_position(lane) / 2;
    *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(nibbles);
    *reinterpret_cast<uint16_t*>(at + 8) = static_cast<uint16_t>(nibbles >> 16);
  }
  if (active && lane % (kFp4Group / 8) == 0) exponents[lane / (kFp4Group / 8)] = static_cast<int8_t>(max(exponent - group_exponent, kMinFp4Exponent));
  if (lane == 0) *scale = __int_as_float((group_exponent + 127) << 23);
}

__global__ void __launch_bounds__(kPreDispatchThreads) pre_dispatch_kernel(const __grid_constant__ PreDispatchParams p) {
  ptx::grid_dependency_launch();
  ptx::grid_dependency_wait();   // inputs, and the counters of the previous launch of the fused kernel
  const Shape& s = p.shape;
  const int token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto at = [&](int64_t offset) { return p.workspace + offset; };
  const bool valid = token < p.num_tokens && (p.num_valid_tokens == nullptr || token < *p.num_valid_tokens);
  if (threadIdx.x < s.top_k) {
    const int slot = token * s.top_k + threadIdx.x;
    const int id = valid ? p.topk_ids[slot] : -1;
    const bool routed = id >= p.expert_begin && id < p.expert_end;
    reinterpret_cast<int*>(at(p.ws.topk_ids))[slot] = routed ? id : -1;
    reinterpret_cast<float*>(at(p.ws.topk_weights))[slot] = routed ? p.topk_weights[slot] * p.routed_scaling_factor : 0.f;
    if (routed) {
      const uint32_t parity = *reinterpret_cast<const uint32_t*>(at(p.ws.epoch)) & 1;
      const uint32_t position = atomicAdd(reinterpret_cast<uint32_t*>(at(p.ws.expert_count)) + parity * s.num_experts + id, 1u);
      reinterpret_cast<uint32_t*>(at(p.ws.slot_list))[int64_t{id} * s.list_stride() + position] = slot;
    }
  }
  if (!valid) return;
  const int num_groups = s.num_scale_groups();
  for (int group = warp; group < num_groups; group += kPreDispatchThreads / 32) {
    const int64_t first = int64_t{token} * s.hidden + group * kActGroup;
    float* scale = reinterpret_cast<float*>(at(p.ws.x_scale)) + token * num_groups + group;
    const bool active = group * kActGroup + lane * 8 < s.hidden;
    if (s.fp4_dispatch) {
      quantize_group_fp4(p.hidden_states + first, at(p.ws.x) + first / 2, reinterpret_cast<int8_t*>(at(p.ws.x_exponent)) + first / kFp4Group, scale, lane, active);
    } else {
      quantize_group(p.hidden_states + first, at(p.ws.x) + first, scale, lane, active);
    }
  }
}

}  // namespace hopper_moe
