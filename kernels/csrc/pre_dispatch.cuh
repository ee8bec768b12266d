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

// Position among 256 of the first of a lane's 8 features; the second four stand 16 further.
__device__ __forceinline__ int lane_position(int lane) { return lane * 8 / kUnitK * kUnitK + wgmma_position(lane * 8 % kUnitK); }

// One warp, one scale group of up to kActGroup features: 8 a lane of every 256. Of the last group `num_features` are there.
constexpr int kPieces = kActGroup / 256;

struct LaneFeatures {
  uint32_t words[kPieces][4];   // BF16; zeros behind the row's end

  __device__ __forceinline__ LaneFeatures(const uint16_t* in, int num_features, int lane) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (is_there(i, num_features, lane)) v = *reinterpret_cast<const uint4*>(in + i * 256 + lane * 8);
      words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
    }
  }
  __device__ __forceinline__ static bool is_there(int piece, int num_features, int lane) { return piece * 256 + lane * 8 < num_features; }
  // Of the lane's eight; a group of zeros has a finite 448 / amax.
  __device__ __forceinline__ float amax(int piece) const {
    float amax = kAmaxFloor;
#pragma unroll
    for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fmaxf(fabsf(ptx::bf16_low(words[piece][i])), fabsf(ptx::bf16_high(words[piece][i]))));
    return amax;
  }
};

__device__ __forceinline__ void quantize_group(const uint16_t* in, uint8_t* out, float* scale, int lane, int num_features) {
  const LaneFeatures x(in, num_features, lane);
  float amax = kAmaxFloor;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) amax = fmaxf(amax, x.amax(i));
#pragma unroll
  for (int step = 1; step < 32; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  const float inverse = __fdiv_rn(kE4m3Max, amax);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    uint32_t q[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t first = x.words[i][2 * j], second = x.words[i][2 * j + 1];
      q[j] = ptx::to_e4m3x2(__fmul_rn(ptx::bf16_low(first), inverse), __fmul_rn(ptx::bf16_high(first), inverse)) |
             static_cast<uint32_t>(ptx::to_e4m3x2(__fmul_rn(ptx::bf16_low(second), inverse), __fmul_rn(ptx::bf16_high(second), inverse))) << 16;
    }
    if (x.is_there(i, num_features, lane)) {
      uint8_t* at = out + i * 256 + lane_position(lane);
      *reinterpret_cast<uint32_t*>(at) = q[0];
      *reinterpret_cast<uint32_t*>(at + 16) = q[1];
    }
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
__device__ __forceinline__ void quantize_group_fp4(const uint16_t* in, uint8_t* out, int8_t* exponents, float* scale, int lane, int num_features) {
  const LaneFeatures x(in, num_features, lane);
  int exponent[kPieces], largest = e2m1_exponent(kAmaxFloor);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    float amax = x.amax(i);
#pragma unroll
    for (int step = 1; step < kFp4Group / 8; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
    exponent[i] = e2m1_exponent(amax);
    largest = max(largest, exponent[i]);
  }
  const int group_exponent = __reduce_max_sync(~0u, largest) - kFp4GroupShift;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const float inverse = __int_as_float((127 - exponent[i]) << 23);
    uint32_t nibbles = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = x.words[i][j];
      nibbles |= (to_e2m1(ptx::bf16_low(word) * inverse) | to_e2m1(ptx::bf16_high(word) * inverse) << 4) << 8 * j;
    }
    if (!x.is_there(i, num_features, lane)) continue;
    uint8_t* at = out + (i * 256 + lane_position(lane)) / 2;
    *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(nibbles);
    *reinterpret_cast<uint16_t*>(at + 8) = static_cast<uint16_t>(nibbles >> 16);
    if (lane % (kFp4Group / 8) == 0) exponents[(i * 256 + lane * 8) / kFp4Group] = static_cast<int8_t>(max(exponent[i] - group_exponent, kMinFp4Exponent));
  }
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
    const int num_features = s.hidden - group * kActGroup;
    if (s.fp4_dispatch) {
      quantize_group_fp4(p.hidden_states + first, at(p.ws.x) + first / 2, reinterpret_cast<int8_t*>(at(p.ws.x_exponent)) + first / kFp4Group, scale, lane, num_features);
    } else {
      quantize_group(p.hidden_states + first, at(p.ws.x) + first, scale, lane, num_features);
    }
  }
}

}  // namespace hopper_moe
