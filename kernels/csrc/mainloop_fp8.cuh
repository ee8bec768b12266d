// Product of one unit row block (64 packed rows of a warpgroup) with one token tile over all of k, with E4M3 weights
// from shared memory.
//
// The tensor cores accumulate every 128 k from zero; one FP32 fused multiply-add per output applies the scale of the
// weight block, and the token's scale follows at the end. In L2, where h has a scale per 128 k, both scales are
// multiplied first. The order of k does not depend on the tile, so the bits of a result do not either.
#pragma once
#include "multiply.cuh"

namespace hopper_moe {

// FP8 sums are complete: block scales have been applied during the loop.
struct RowScales {
  __device__ __forceinline__ explicit RowScales(const uint8_t*) {}
  __device__ __forceinline__ static constexpr float low() { return 1.f; }
  __device__ __forceinline__ static constexpr float high() { return 1.f; }
};

// See mainloop_fp4.cuh for `meanwhile`.
template <int N, bool kL1>
class MainLoop : private StageReader {
 public:
  using StageReader::StageReader;

  template <typename Meanwhile>
  __device__ __forceinline__ void run(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile) {
    if constexpr (kWaitAhead) {
      run_pass(sum, num_chunks, meanwhile);
    } else {
      for_each_constant<kPassEndPieces>(
          meanwhile);  // runs first: other warps wait for its result, and the first stage may take long
      run_pass(sum, num_chunks, [](auto) {});
    }
  }

 private:
  // Few tokens are bound by memory, so a stage is released before the next is waited for. With many tokens that wait is
  // hidden behind the multiply.
  static constexpr bool kWaitAhead = N > 32;

  template <typename Meanwhile>
  __device__ __forceinline__ void run_pass(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile) {
    wait_full();
    if constexpr (kL1) {
      run_l1(sum, num_chunks, meanwhile);
    } else if (num_chunks == 1) {
      step<true, true>(sum, meanwhile);
    } else {
      step<true, false>(sum, meanwhile);
      for (int chunk = 2; chunk < num_chunks; ++chunk) step<false, false>(sum, [](auto) {});
      step<false, true>(sum, [](auto) {});
    }
  }

  // Rows r and r + 8 are gate and up, from two weight blocks.
  template <typename Meanwhile>
  __device__ __forceinline__ void run_l1(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile) {
    float total[N / 2];
    Stage stage = block_step<true>(total, num_chunks > 1, meanwhile);
#pragma unroll 1  // ptxas does not move reads of accumulators across a loop's back edge; unrolled, it does and
                  // serialises the multiplies
    for (int left = num_chunks - 1; left > 0; --left) {
      next_stage(stage);
      stage = block_step<false>(total, left > 1, [](auto) {});
    }
    finish<N>(sum, total, stage, me_.lane);
    release(stage);
  }

  __device__ __forceinline__ void next_stage(const Stage& done) const {
    release(done);
    if constexpr (!kWaitAhead) wait_full();
  }

  // One chunk of L1. Does not release the stage.
  template <bool kBegins, typename Meanwhile>
  __device__ __forceinline__ Stage block_step(float (&total)[N / 2], bool more, Meanwhile&& meanwhile) {
    float d[N / 2];
    const Stage stage = take();
    multiply(d, stage.data);
    for_each_constant<kPassEndPieces>(meanwhile);
    if (kWaitAhead && more) wait_full();
    const float2 block = ptx::load_shared_float2<stage_block_scales(N)>(stage.data);
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float scale = i % 4 < 2 ? block.x : block.y;
      total[i] = kBegins ? __fmul_rn(d[i], scale) : fmaf(d[i], scale, total[i]);
    }
    return stage;
  }

  // The factors of a thread's columns: token scales of its 8-token blocks times the scale of the weight block.
  struct Scales {
    float2 token[N / 8];
    float2 block;
  };

  __device__ __forceinline__ void multiply(float (&d)[N / 2], uint32_t data) const {
    const uint32_t weights = data + stage_weights(N) + me_.warpgroup * kUnitBytes;
    ptx::wgmma_fence();
    ptx::wgmma_begin(d, ptx::wgmma_descriptor(weights, 0), ptx::wgmma_descriptor(data, 0));
#pragma unroll
    for (int step = 1; step < 4; ++step)
      ptx::wgmma(d, ptx::wgmma_descriptor(weights, step), ptx::wgmma_descriptor(data, step));
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

  template <bool kFirst>
  __device__ __forceinline__ void promote_block(float (&sum)[N / 2], const float (&d)[N / 2], const Scales& s) const {
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float2 scale = {__fmul_rn(s.token[i].x, s.block.x), __fmul_rn(s.token[i].y, s.block.x)};
#pragma unroll
      for (int j = 4 * i; j < 4 * i + 4; ++j) sum[j] = fmaf(d[j], j % 2 ? scale.y : scale.x, kFirst ? 0.f : sum[j]);
    }
  }

  // One chunk of L2. Scales are loaded during the multiply; afterwards they would have to wait for the multiply of the
  // other warpgroup.
  template <bool kFirst, bool kLast, typename Meanwhile>
  __device__ __forceinline__ void step(float (&sum)[N / 2], Meanwhile&& meanwhile) {
    float d[N / 2];
    const Stage stage = take();
    multiply(d, stage.data);
    for_each_constant<kPassEndPieces>(meanwhile);
    if constexpr (!kLast && kWaitAhead) wait_full();
    const Scales scales = load_scales(stage.data);
    ptx::wgmma_wait<0>();
    promote_block<kFirst>(sum, d, scales);
    if constexpr (kLast) finish<N>(sum, sum, stage, me_.lane);
    release(stage);
    if constexpr (!kLast && !kWaitAhead) wait_full();
  }
};

}  // namespace hopper_moe
