// The product of one unit row block (64 packed rows of a warpgroup) with one token tile over all of k, E4M3 weights from shared memory.
//
// Every 128 k the tensor cores accumulate from zero, then one FP32 fused multiply-add per output applies the scales: of the token's group
// times of the weight block. The order of k never depends on the tile, so neither do the bits of a result.
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
    for (int chunk = 1; chunk < num_chunks; ++chunk) step<false>(sum, last_stage);
    step<true>(sum, last_stage);
  }

 private:
  // Few tokens: memory sets the pace, a stage is given back before the next is waited for. Many: that wait is hidden behind the multiply.
  static constexpr bool kWaitAhead = N > 32;

  // What a thread's columns are multiplied with: the token scales of its 8-token blocks, and the weight block's for rows r and r + 8.
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

  __device__ __forceinline__ void promote(float (&sum)[N / 2], const float (&d)[N / 2], const Scales& s) const {
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float2 low = {__fmul_rn(s.token[i].x, s.block.x), __fmul_rn(s.token[i].y, s.block.x)};
      const float2 high = kL1 ? float2{__fmul_rn(s.token[i].x, s.block.y), __fmul_rn(s.token[i].y, s.block.y)} : low;
      sum[4 * i + 0] = fmaf(d[4 * i + 0], low.x, sum[4 * i + 0]);
      sum[4 * i + 1] = fmaf(d[4 * i + 1], low.y, sum[4 * i + 1]);
      sum[4 * i + 2] = fmaf(d[4 * i + 2], high.x, sum[4 * i + 2]);
      sum[4 * i + 3] = fmaf(d[4 * i + 3], high.y, sum[4 * i + 3]);
    }
  }

  // One chunk. Scales are loaded during the multiply: afterwards the other warpgroup's multiply would hold them up.
  template <bool kLast, typename LastStage>
  __device__ __forceinline__ void step(float (&sum)[N / 2], LastStage&& last_stage) {
    float d[N / 2];
    const Stage stage = take();
    multiply(d, stage.data);
    if constexpr (!kLast && kWaitAhead) wait_full();
    const Scales scales = load_scales(stage.data);
    ptx::wgmma_wait<0>();
    promote(sum, d, scales);
    if constexpr (kLast) last_stage(sum, stage.data);
    release(stage);
    if constexpr (!kLast && !kWaitAhead) wait_full();
  }
};

}  // namespace hopper_moe
