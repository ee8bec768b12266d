// From FP32 sums to what leaves the CTA, in the service warps. L1: SwiGLU, requantisation, rows of h. L2: routing weight, BF16 rows to the
// combine slots of their source ranks. Each service warp takes every kServiceWarps-th token group (8 tokens) of a tile with all its rows, so
// nothing crosses warps.
#pragma once
#include "decode.cuh"
#include "ptx/memory.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

constexpr float kAmaxFloor = 7.8886090522101181e-31f;   // 2**-100
constexpr float kE4m3Max = 448.f;

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = ptx::min_nan(gate, limit);
  up = ptx::max_nan(ptx::min_nan(up, limit), -limit);
  return gate * ptx::reciprocal(1.f + __expf(-gate)) * up;
}

// 16-byte chunk `chunk` of row `row` in a [rows][128 B] tile with 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

class Epilogue {
 public:
  __device__ Epilogue(const MegaMoeParams& p, SharedStorage& smem, const SumsBarriers& sums, int warp, int lane, uint32_t parity)
      : p_(p), smem_(smem), sums_(sums), warp_(warp), lane_(lane),
        h_ready_(p.local<uint32_t>(p.ws.h_ready) + parity * p.shape.max_blocks()),
        group_done_(p.local<uint32_t>(p.ws.group_done) + parity * p.shape.num_column_groups()) {}

  // One pass's sums have arrived: turns them into what follows and gives the buffer back.
  __device__ __forceinline__ void run_pass(const Task& task, int pass) {
    if (!task.is_l1) {
      run_l2(task);
    } else {
      activate(task, pass);
      if (pass == 1) quantize(task);
    }
    release_sums();
    if (!task.is_l1) {
      if (lane_ == 0) ptx::red_add_release_gpu(group_done_ + task.tile / kGroupTiles, 1);   // carries all lanes' rows
    } else if (pass == 1) {
      ptx::fence_async_global();   // every lane's rows of h are read by bulk copies
      __syncwarp();
      if (lane_ == 0) ptx::red_add_release_gpu(h_ready_ + task.block.index, 1);
    }
  }

 private:
  __device__ __forceinline__ void release_sums() const {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(sums_.empty);
  }
  __device__ __forceinline__ float4* fragment(int math_warp, int group, int num_groups) const {
    return smem_.sums + (math_warp * num_groups + group) * 32 + lane_;
  }
  // BF16 h of one fragment, two tokens a word: the first pass's is kept beside, the second's replaces its sums.
  __device__ __forceinline__ uint32_t* h_word(int pass, int math_warp, int group, int num_groups) const {
    return pass == 0 ? smem_.first_pass + (group * kMathWarps + math_warp) * 32 + lane_
                     : reinterpret_cast<uint32_t*>(fragment(math_warp, group, num_groups));
  }

  // One pass of an L1 task: h = BF16(SwiGLU) of 64 features.
  __device__ __forceinline__ void activate(const Task& task, int pass) {
    const int num_groups = task.block.tile / 8;
#pragma unroll 1
    for (int group = warp_; group < num_groups; group += kServiceWarps) {
#pragma unroll 4
      for (int w = 0; w < kMathWarps; ++w) {
        const float4 v = *fragment(w, group, num_groups);
        *h_word(pass, w, group, num_groups) =
            ptx::to_bf16x2(swiglu(v.x, v.z, p_.swiglu_limit), swiglu(v.y, v.w, p_.swiglu_limit));
      }
    }
  }

  __device__ __forceinline__ void quantize(const Task& task) {
    const int num_groups = task.block.tile / 8;
#pragma unroll 1
    for (int group = warp_; group < num_groups; group += kServiceWarps) {
      float amax0 = kAmaxFloor, amax1 = kAmaxFloor;
#pragma unroll
      for (int i = 0; i < 2 * kMathWarps; ++i) {
        const uint32_t h = *h_word(i / kMathWarps, i % kMathWarps, group, num_groups);
        amax0 = fmaxf(amax0, fabsf(bf16_low(h)));
        amax1 = fmaxf(amax1, fabsf(bf16_high(h)));
      }
      quantize_group(task, group, num_groups, amax0, amax1);
    }
  }

  // Eight tokens x 128 features. A lane holds tokens 2q and 2q + 1 (q = lane % 4) of feature lane / 4 of every eight.
  __device__ __forceinline__ void quantize_group(const Task& task, int group, int num_groups, float amax0, float amax1) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      amax0 = fmaxf(amax0, __shfl_xor_sync(~0u, amax0, step));
      amax1 = fmaxf(amax1, __shfl_xor_sync(~0u, amax1, step));
    }
    const float inverse0 = __fdiv_rn(kE4m3Max, amax0), inverse1 = __fdiv_rn(kE4m3Max, amax1);
    const int tile = task.block.tile;
    const int64_t row = task.block.row;
    if (lane_ < 4) {
      float* scale = p_.local<float>(p_.ws.pool_h_scale) + row * p_.shape.num_features_tiles() + task.tile * tile + group * 8 + lane_ * 2;
      *reinterpret_cast<float2*>(scale) = make_float2(__fdiv_rn(amax0, kE4m3Max), __fdiv_rn(amax1, kE4m3Max));
    }
    uint8_t* bytes = smem_.transpose[warp_];
    uint8_t* mine = bytes + lane_ % 4 * 2 * kTransposePitch + lane_ / 4;
    __syncwarp();   // the previous group's rows have been read
#pragma unroll 4
    for (int w = 0; w < kMathWarps; ++w) {
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
        const uint32_t h = *h_word(pass, w, group, num_groups);
        const uint16_t q = ptx::to_e4m3x2(bf16_low(h) * inverse0, bf16_high(h) * inverse1);
        mine[pass * 64 + w * 8] = static_cast<uint8_t>(q);
        mine[pass * 64 + w * 8 + kTransposePitch] = static_cast<uint8_t>(q >> 8);
      }
    }
    __syncwarp();
    const int token = lane_ / 4;
    uint8_t* out = p_.local<uint8_t>(p_.ws.pool_h) + row * p_.shape.intermediate + task.tile * tile * kUnitK;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = lane_ % 4 + i * 4;
      *reinterpret_cast<uint4*>(out + swizzled(group * 8 + token, chunk)) = *reinterpret_cast<const uint4*>(bytes + token * kTransposePitch + chunk * 16);
    }
  }

  __device__ __forceinline__ void run_l2(const Task& task) {
    const Shape& s = p_.shape;
    const int num_groups = task.block.tile / 8, first_row = task.tile * kRowTile;
    const float* weights = p_.local<float>(p_.ws.pool_weight) + task.block.row;
    const uint32_t* slots = p_.local<uint32_t>(p_.ws.pool_slot) + task.block.row;
    const uint32_t transpose = ptx::smem_address(smem_.transpose[warp_]);
    for (int row = lane_; row < task.block.tile; row += 32) {
      smem_.row_weight[warp_][row] = __ldcg(weights + row);
      smem_.row_slot[warp_][row] = __ldcg(slots + row);
    }
#pragma unroll 1
    for (int group = warp_; group < num_groups; group += kServiceWarps) {
      __syncwarp();   // the previous group's rows have been read
      const int token = group * 8 + lane_ / 4;
      const float2 weight = *reinterpret_cast<const float2*>(&smem_.row_weight[warp_][group * 8 + lane_ % 4 * 2]);
      const uint32_t slot = smem_.row_slot[warp_][token];
#pragma unroll
      for (int w = 0; w < kMathWarps; w += 2) {
        uint32_t pair[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 v = *fragment(w + i, group, num_groups);
          pair[2 * i] = ptx::to_bf16x2(v.x * weight.x, v.y * weight.y);
          pair[2 * i + 1] = ptx::to_bf16x2(v.z * weight.x, v.w * weight.y);
        }
        ptx::store_matrix_x4_transposed(transpose + lane_ % 8 * kTransposePitch + (w * 2 + lane_ / 8) * 16, pair[0], pair[1], pair[2], pair[3]);
      }
      __syncwarp();
      if (token < task.block.num_rows) {
        uint16_t* out = p_.peer<uint16_t>(slot >> 24, p_.ws.combine) + int64_t{slot & 0xFFFFFFu} * s.hidden + first_row;
        const uint8_t* row = smem_.transpose[warp_] + lane_ / 4 * kTransposePitch;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int chunk = lane_ % 4 + i * 4;
          *reinterpret_cast<uint4*>(out + chunk * 8) = *reinterpret_cast<const uint4*>(row + chunk * 16);
        }
      }
    }
  }

  const MegaMoeParams& p_;
  SharedStorage& smem_;
  const SumsBarriers& sums_;
  const int warp_, lane_;
  uint32_t *h_ready_, *group_done_;
};

}  // namespace hopper_moe
