// The product of one unit row block (64 packed rows of a warpgroup) with one token tile over all of k, E4M3 weights from shared memory.
//
// Every 128 k the tensor cores accumulate from zero, then one FP32 fused multiply-add per output applies the weight block's scale, and at the end
// of a token's scale group one more the token's. (Of h a group is 128 k: there both scales are multiplied first.) The order of k never depends
// on the tile, so neither do the bits of a result.
#pragma once
#include "multiply.cuh"

namespace hopper_moe {

// FP8 sums are complete: their scales were applied block by block.
struct RowScales {
  __device__ __forceinline__ explicit RowScales(const uint8_t*) {}
  __device__ __forceinline__ static constexpr float low() { return 1.f; }
  __device__ __forceinline__ static constexpr float high() { return 1.f; }
};

// Consumes the stages of one pass over k. `last_stage(sum, address)` runs before the last stage is given back; it must not branch.
template <int N, bool kL1>
class MainLoop : private StageReader {
 public:
  using StageReader::StageReader;

  template <typename LastStage>
  __device__ __forceinline__ void run(float (&sum)[N / 2], int num_chunks, LastStage&& last_stage) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.f;
    wait_full();
    if constexpr (kL1) {
      run_groups(sum, num_chunks);
    } else {
      for (int chunk = 1; chunk < num_chunks; ++chunk) step<false>(sum, last_stage);
      step<true>(sum, last_stage);
    }
  }

 private:
  // Few tokens: memory sets the pace, a stage is given back before the next is waited for. Many: that wait is hidden behind the multiply.
  static constexpr bool kWaitAhead = N > 32;

  __device__ __forceinline__ void run_groups(float (&sum)[N / 2], int num_chunks) {
    for (int left = num_chunks; left > 0;) {
      const int num = min(left, kActGroup / kUnitK);
      left -= num;
      float group[N / 2];
      Stage stage = group_step<true>(group, left + num > 1);
#pragma unroll 1   // across a loop's back edge ptxas moves nothing that reads accumulators; in a straight line it does, and serialises the multiplies
      for (int i = 1; i < num; ++i) {
        next_stage(stage);
        stage = group_step<false>(group, left + num - i > 1);
      }
      promote<N>(sum, group, stage.data + stage_scales(N), me_.lane);
      if (left > 0) {
        next_stage(stage);
      } else {
        release(stage);
      }
    }
  }

  __device__ __forceinline__ void next_stage(const Stage& done) const {
    release(done);
    if constexpr (!kWaitAhead) wait_full();
  }

  // One chunk of a scale group of x: rows r and r + 8 are gate and up, of two weight blocks. The stage is still to be given back.
  template <bool kFirst>
  __device__ __forceinline__ Stage group_step(float (&group)[N / 2], bool more) {
    float d[N / 2];
    const Stage stage = take();
    multiply(d, stage.data);
    if (kWaitAhead && more) wait_full();
    const float2 block = ptx::load_shared_float2<stage_block_scales(N)>(stage.data);
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float scale = i % 4 < 2 ? block.x : block.y;
      group[i] = kFirst ? __fmul_rn(d[i], scale) : fmaf(d[i], scale, group[i]);
    }
    return stage;
  }

  // What a thread's columns are multiplied with: the token scales of its 8-token blocks times the weight block's.
  struct Scales {
    float2 token[N / 8];
    float2 block;
  };

  __device__ __forceinline__ void multiply(float (&d)[N / 2], uint32_t data) const {
    const uint32_t weights = data + stage_weights(N) + me_.warpgroup * kUnitBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int group = 0; group < 4; ++group) ptx::wgmma(d, ptx::wgmma_descriptor(weights, group), ptx::wgmma_descriptor(data, group), group > 0);
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ Scales load_scales(uint32_t data) const {
    Scales s;
    const uint32_t mine = data + stage_scales(N) + me_.lane % 4 * 8;
    for_each_constant<N / 8>([&](auto index) {
      constexpr int i = decltype(index)::value;
      s.token[i] = ptx::load_shared_float2<i * 32>(mine);
    });
    s.block = ptx::load_shared_float2<stage_block_scales(N)>(data);
    return s;
  }

  __device__ __forceinline__ void promote_block(float (&sum)[N / 2], const float (&d)[N / 2], const Scales& s) const {
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float2 scale = {__fmul_rn(s.token[i].x, s.block.x), __fmul_rn(s.token[i].y, s.block.x)};
      sum[4 * i + 0] = fmaf(d[4 * i + 0], scale.x, sum[4 * i + 0]);
      sum[4 * i + 1] = fmaf(d[4 * i + 1], scale.y, sum[4 * i + 1]);
      sum[4 * i + 2] = fmaf(d[4 * i + 2], scale.x, sum[4 * i + 2]);
      sum[4 * i + 3] = fmaf(d[4 * i + 3], scale.y, sum[4 * i + 3]);
    }
  }

  // One chunk of L2. Scales are loaded during the multiply: afterwards the other warpgroup's multiply would hold them up.
  template <bool kLast, typename LastStage>
  __device__ __forceinline__ void step(float (&sum)[N / 2], LastStage&& last_stage) {
    float d[N / 2];
    const Stage stage = take();
    multiply(d, stage.data);
    if constexpr (!kLast && kWaitAhead) wait_full();
    const Scales scales = load_scales(stage.data);
    ptx::wgmma_wait<0>();
    promote_block(sum, d, scales);
    if constexpr (kLast) last_stage(sum, stage.data);
    release(stage);
    if constexpr (!kLast && !kWaitAhead) wait_full();
  }
};

}  // namespace hopper_moe
