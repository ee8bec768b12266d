// The product of one unit row block (64 packed rows of a warpgroup) with one token tile over all of k.
//
// Per activation scale group (512 k of x, 128 k of h) the tensor cores accumulate from zero, then one FP32 fused multiply-add per output
// applies the scale. The order of k never depends on the tile, so neither do the bits of a result.
#pragma once
#include "decode.cuh"
#include "multiply.cuh"

namespace hopper_moe {

// Consumes the stages of one pass over k. `last_stage(sum, address)` runs before the last stage is given back; it must not branch.
template <int N, bool kL1>
class MainLoop : private StageReader {
 public:
  using StageReader::StageReader;

  template <typename LastStage>
  __device__ __forceinline__ void run(float (&sum)[N / 2], int num_chunks, LastStage&& last_stage) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[i] = 0.f;
    if constexpr (kChunks == 2) {
      run_narrow(sum, num_chunks, last_stage);
    } else {
      run_wide(sum, num_chunks, last_stage);
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
    multiply_chunk<N>(d[0], now[0], tile(stage, 0), !kBegins);
    if constexpr (kNum == 2) multiply_chunk<N>(d[kL1 ? 0 : 1], now[1], tile(stage, 1), kL1);
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

  // One chunk a stage.
  template <typename LastStage>
  __device__ __forceinline__ void run_wide(float (&sum)[N / 2], int num_chunks, LastStage&& last_stage) {
    if constexpr (kL1) {
      run_wide_l1(sum, num_chunks);
    } else {
      run_wide_l2(sum, num_chunks, last_stage);
    }
  }

  // A scale group is several chunks: the next multiply is queued behind the one before without draining it.
  __device__ __forceinline__ void run_wide_l1(float (&sum)[N / 2], int num_chunks) {
    constexpr int kPerGroup = kActGroup / kUnitK;
    uint32_t a[2][16];
    float d[N / 2];
    const int zero = opaque_zero();
    wait_full();
    decode(a[0]);
    int left = num_chunks;
    for (; left >= kPerGroup; left -= kPerGroup) {
      Stage stage{};
#pragma unroll
      for (int i = 0; i < kPerGroup; ++i) {
        const Stage before = stage;
        stage = take();
        ptx::wgmma_fence();
        multiply_chunk<N>(d, a[i % 2], tile(stage, 0), i > 0);
        ptx::wgmma_commit();
        if (i > 0) {
          ptx::wgmma_wait<1>();
          release(before);
        }
        if (i + 1 < kPerGroup ? left > zero : left > kPerGroup) {
          wait_full();
          decode(a[(i + 1) % 2]);
        }
      }
      ptx::wgmma_wait<0>();
      promote<N>(sum, d, stage.data + stage_scales(N), me_.lane);
      release(stage);
    }
    if (left > 0) run_wide_rest(sum, d, a[0], left);
  }

  // The last scale group when it is smaller, whose first unit is decoded: no hurry.
  __device__ __forceinline__ void run_wide_rest(float (&sum)[N / 2], float (&d)[N / 2], uint32_t (&a)[16], int left) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.f;
    for (; left > 0; --left) {
      const Stage stage = take();
      ptx::wgmma_fence();
      multiply_chunk<N>(d, a, tile(stage, 0), true);
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
  template <typename LastStage>
  __device__ __forceinline__ void run_wide_l2(float (&sum)[N / 2], int num_chunks, LastStage&& last_stage) {
    uint32_t a[2][16];
    const int zero = opaque_zero();
    wait_full();
    decode(a[0]);
    int left = num_chunks;
    for (; left > 2; left -= 2) {
      wide_step(sum, a[0], a[1], left > zero, false, last_stage);
      wide_step(sum, a[1], a[0], left > zero, false, last_stage);
    }
    if (left == 2) {
      wide_step(sum, a[0], a[1], true, false, last_stage);
      wide_step(sum, a[1], a[0], false, true, last_stage);
    } else {
      wide_step(sum, a[0], a[1], false, true, last_stage);
    }
  }

  template <typename LastStage>
  __device__ __forceinline__ void wide_step(float (&sum)[N / 2], uint32_t (&now)[16], uint32_t (&next)[16], bool more, bool last,
                                            LastStage&& last_stage) {
    float d[N / 2];
    const Stage stage = take();
    ptx::wgmma_fence();
    multiply_chunk<N>(d, now, tile(stage, 0), false);
    ptx::wgmma_commit();
    if (more) {
      wait_full();
      decode(next);
    }
    ptx::wgmma_wait<0>();
    promote<N>(sum, d, stage.data + stage_scales(N), me_.lane);
    if (last) last_stage(sum, stage.data);
    release(stage);
  }
};

}  // namespace hopper_moe
