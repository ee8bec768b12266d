// The product of one unit row block (64 packed rows of a warpgroup) with one token tile over all of k.
//
// Per activation scale group (512 k of x, 128 k of h) the tensor cores accumulate from zero, then one FP32 fused multiply-add per output
// applies the scale. The order of k never depends on the tile, so neither do the bits of a result.
#pragma once
#include "decode.cuh"
#include "multiply.cuh"

namespace hopper_moe {

// Consumes the stages of one pass over k into `sum`. `meanwhile(piece)`, 0 .. kPassEndPieces - 1 as constants, is called in order while the tensor
// cores work on the first chunks, before anything is written to `sum`: there is time for what is left to do with the sums of the pass before. It
// may wait, but not branch otherwise; neither may `last_stage(sum, address)`, which runs before the last stage is given back.
template <int N, bool kL1>
class MainLoop : private StageReader {
 public:
  using StageReader::StageReader;

  template <typename Meanwhile, typename LastStage>
  __device__ __forceinline__ void run(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile, LastStage&& last_stage) {
    if constexpr (kChunks == 2) {
      for_each_constant<kPassEndPieces>(meanwhile);
      clear(sum);
      run_narrow(sum, num_chunks, last_stage);
    } else if constexpr (kL1) {
      run_wide_l1(sum, num_chunks, meanwhile);
    } else {
      run_wide_l2(sum, num_chunks, meanwhile, last_stage);
    }
  }

 private:
  static constexpr int kChunks = chunks_per_stage(N);

  __device__ __forceinline__ static uint32_t tile(const Stage& stage, int chunk) { return stage.data + chunk * N * kUnitK; }
  // The warpgroup's unit of a chunk of the stage at the cursor.
  __device__ __forceinline__ void decode(uint32_t (&a)[16], int chunk = 0) const {
    decode_unit(a, cursor_.stage().data + stage_weights(N) + (chunk * 2 + me_.warpgroup) * kUnitBytes, me_.warp, me_.lane);
  }

  // The assembler moves a decode past the wait for the multiply that it should overlap, unless a branch it cannot see through keeps the two
  // in different basic blocks: comparing what is left with an opaque zero, although always true, does that.
  __device__ __forceinline__ static int opaque_zero() {
    int zero = 0;
    asm volatile("" : "+r"(zero));
    return zero;
  }

  // Two chunks a stage (one in the last when the number of chunks is odd). While the tensor cores work on one stage the next is decoded. An L1
  // scale group is two stages, an L2 stage two groups.
  template <typename LastStage>
  __device__ __forceinline__ void run_narrow(float (&sum)[N / 2], int num_chunks, LastStage&& last_stage) {
    uint32_t a[2][2][16];
    float d[2][N / 2];
    const int zero = opaque_zero();
    wait_full();
    decode_stage(a[0]);
    int left = num_chunks;
    for (; left >= 4; left -= 4) {
      narrow_step<2, true, !kL1>(sum, d, a[0], a[1], left > zero, false, last_stage);
      narrow_step<2, !kL1, true>(sum, d, a[1], a[0], left > 4, left == 4, last_stage);
    }
    if (left == 3) {
      narrow_step<2, true, !kL1>(sum, d, a[0], a[1], left > zero, false, last_stage);
      narrow_step<1, !kL1, true>(sum, d, a[1], a[0], false, true, last_stage);
    } else if (left == 2) {
      narrow_step<2, true, true>(sum, d, a[0], a[1], false, true, last_stage);
    } else if (left == 1) {
      narrow_step<1, true, true>(sum, d, a[0], a[1], false, true, last_stage);
    }
  }

  // Of an odd last stage the second half holds stale bytes: decoded, never multiplied.
  __device__ __forceinline__ void decode_stage(uint32_t (&a)[2][16]) const {
    decode(a[0], 0);
    decode(a[1], 1);
  }

  // kBegins, kEnds: whether the stage's first chunk begins, and its last ends a scale group.
  template <int kNum, bool kBegins, bool kEnds, typename LastStage>
  __device__ __forceinline__ void narrow_step(float (&sum)[N / 2], float (&d)[2][N / 2], uint32_t (&now)[2][16], uint32_t (&next)[2][16], bool more,
                                              bool last, LastStage&& last_stage) {
    const Stage stage = take();
    ptx::wgmma_fence();
    multiply_chunk<N, kBegins>(d[0], now[0], tile(stage, 0));
    if constexpr (kNum == 2) multiply_chunk<N, !kL1>(d[kL1 ? 0 : 1], now[1], tile(stage, 1));
    ptx::wgmma_commit();
    if (more) {
      wait_full();
      decode_stage(next);
    }
    ptx::wgmma_wait<0>();
    if constexpr (kEnds) promote<N>(sum, d[0], stage.data + stage_scales(N), me_.lane);
    if constexpr (!kL1 && kNum == 2) promote<N>(sum, d[1], stage.data + stage_scales(N) + N * 4, me_.lane);
    if (last) last_stage(sum, stage.data);
    release(stage);
  }

  __device__ __forceinline__ static void clear(float (&values)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) values[i] = 0.f;
  }

  // One chunk a stage. A scale group is several: the next multiply is queued behind the one before without draining it.
  template <typename Meanwhile>
  __device__ __forceinline__ void run_wide_l1(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile) {
    uint32_t a[2][16];
    const int zero = opaque_zero();
    wait_full();
    decode(a[0]);
    int left = num_chunks;
    if (left >= kPerGroup) {
      wide_group<true>(sum, a, left, zero, meanwhile);
      left -= kPerGroup;
    } else {
      for_each_constant<kPassEndPieces>(meanwhile);
      clear(sum);
    }
    for (; left >= kPerGroup; left -= kPerGroup) wide_group<false>(sum, a, left, zero, [](auto) {});
    if (left > 0) wide_rest(sum, a[0], left);
  }

  static constexpr int kPerGroup = kActGroup / kUnitK;
  static_assert(kPerGroup == kPassEndPieces);

  template <bool kFirst, typename Meanwhile>
  __device__ __forceinline__ void wide_group(float (&sum)[N / 2], uint32_t (&a)[2][16], int left, int zero, Meanwhile&& meanwhile) {
    float d[N / 2];
    Stage stage{};
    for_each_constant<kPerGroup>([&](auto index) {
      constexpr int i = decltype(index)::value;
      const Stage before = stage;
      stage = take();
      ptx::wgmma_fence();
      multiply_chunk<N, i == 0>(d, a[i % 2], tile(stage, 0));
      ptx::wgmma_commit();
      meanwhile(index);
      if (i > 0) {
        ptx::wgmma_wait<1>();
        release(before);
      }
      if (i + 1 < kPerGroup ? left > zero : left > kPerGroup) {
        wait_full();
        decode(a[(i + 1) % 2]);
      }
    });
    ptx::wgmma_wait<0>();
    promote<N, kFirst>(sum, d, stage.data + stage_scales(N), me_.lane);
    release(stage);
  }

  // The last scale group when it is smaller, whose first unit is decoded: no hurry.
  __device__ __forceinline__ void wide_rest(float (&sum)[N / 2], uint32_t (&a)[16], int left) {
    float d[N / 2];
    clear(d);
    for (; left > 0; --left) {
      const Stage stage = take();
      ptx::wgmma_fence();
      multiply_chunk<N, false>(d, a, tile(stage, 0));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (left == 1) promote<N>(sum, d, stage.data + stage_scales(N), me_.lane);
      release(stage);
      if (left > 1) {
        wait_full();
        decode(a);
      }
    }
  }

  // One chunk per scale group: the next one is decoded during the multiply, the sum promoted after it.
  template <typename Meanwhile, typename LastStage>
  __device__ __forceinline__ void run_wide_l2(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile, LastStage&& last_stage) {
    uint32_t a[2][16];
    const int zero = opaque_zero();
    wait_full();
    decode(a[0]);
    int left = num_chunks;
    if (left == 1) {
      wide_step<true, true>(sum, a[0], a[1], false, meanwhile, last_stage);
      return;
    }
    wide_step<true, false>(sum, a[0], a[1], left > zero, meanwhile, last_stage);
    for (--left; left > 2; left -= 2) {
      wide_step<false, false>(sum, a[1], a[0], left > zero, [](auto) {}, last_stage);
      wide_step<false, false>(sum, a[0], a[1], left > zero, [](auto) {}, last_stage);
    }
    if (left == 2) {
      wide_step<false, false>(sum, a[1], a[0], left > zero, [](auto) {}, last_stage);
      wide_step<false, true>(sum, a[0], a[1], false, [](auto) {}, last_stage);
    } else {
      wide_step<false, true>(sum, a[1], a[0], false, [](auto) {}, last_stage);
    }
  }

  template <bool kFirst, bool kLast, typename Meanwhile, typename LastStage>
  __device__ __forceinline__ void wide_step(float (&sum)[N / 2], uint32_t (&now)[16], uint32_t (&next)[16], bool more,
                                            Meanwhile&& meanwhile, LastStage&& last_stage) {
    float d[N / 2];
    const Stage stage = take();
    ptx::wgmma_fence();
    multiply_chunk<N, true>(d, now, tile(stage, 0));
    ptx::wgmma_commit();
    for_each_constant<kPassEndPieces>(meanwhile);
    if (more) {
      wait_full();
      decode(next);
    }
    ptx::wgmma_wait<0>();
    promote<N, kFirst>(sum, d, stage.data + stage_scales(N), me_.lane);
    if constexpr (kLast) last_stage(sum, stage.data);
    release(stage);
  }
};

}  // namespace hopper_moe
