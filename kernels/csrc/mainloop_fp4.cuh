// Product of one unit row block (64 packed rows of a warpgroup) with one token tile, or a pair of them, over all of k.
//
// L1: the tensor cores accumulate over all of k; then every sum is multiplied by the scale of its token. L2: for each
// scale group of h (128 k) they start from zero, and one FP32 fused multiply-add per output applies the scale. The
// order of k does not depend on the tile, so the bits of a result do not either.
#pragma once
#include "decode.cuh"
#include "multiply.cuh"

namespace hopper_moe {

// The assembler moves a decode past the wait for the multiply that it should overlap, unless they are in different
// basic blocks. A branch that always goes the same way but compares with an opaque zero keeps them apart.
__device__ __forceinline__ int opaque_zero() {
  int zero = 0;
  asm volatile("" : "+r"(zero));
  return zero;
}

// A scale group's sums times the scales of their tokens, added to `sum` or, for the first group, stored.
template <int N, bool kFirst = false>
__device__ __forceinline__ void promote(float (&sum)[N / 2], const float (&d)[N / 2], uint32_t scales, int lane) {
  for_each_token<N>(scales, lane, [&](int j, float scale) { sum[j] = fmaf(d[j], scale, kFirst ? 0.f : sum[j]); });
}

// A math thread, which decodes the units of its warpgroup.
template <int N>
class UnitReader : protected StageReader {
 protected:
  using StageReader::StageReader;

  static constexpr int kChunks = chunks_per_stage(N);
  __device__ __forceinline__ static uint32_t tile(const Stage& stage, int chunk = 0) {
    return stage.data + chunk * N * kUnitK;
  }
  // Decodes the warpgroup's unit of a chunk of the stage at the cursor.
  __device__ __forceinline__ void decode(uint32_t (&a)[16], int chunk = 0) const {
    decode_unit(a, cursor_.stage().data + stage_weights(N) + (chunk * 2 + me_.warpgroup) * kUnitBytes, me_.warp,
                me_.lane);
  }
};

// Consumes the stages of one pass over k into `sum` and applies the factors of the rows. `meanwhile(piece)`, with the
// constants 0 .. kPassEndPieces - 1, is called in order while the tensor cores work on the first chunks and before
// `sum` is written; it finishes the previous pass. It may wait but must not branch otherwise.
template <int N, bool kL1>
class MainLoop : private UnitReader<N> {
  using Reader = UnitReader<N>;
  using Reader::cursor_, Reader::me_, Reader::wait_full, Reader::take, Reader::release, Reader::tile, Reader::decode,
      Reader::kChunks;

 public:
  using Reader::Reader;

  template <typename Meanwhile>
  __device__ __forceinline__ void run(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile) {
    if constexpr (kChunks == 2) {
      for_each_constant<kPassEndPieces>(meanwhile);
      clear(sum);
      run_narrow(sum, num_chunks);
    } else if constexpr (kL1) {
      run_wide_l1(sum, num_chunks, meanwhile);
    } else {
      run_wide_l2(sum, num_chunks, meanwhile);
    }
  }

 private:
  // Two chunks per stage (one in the last if the number of chunks is odd). The next stage is decoded while the tensor
  // cores work on the current one.
  __device__ __forceinline__ void run_narrow(float (&sum)[N / 2], int num_chunks) {
    uint32_t a[2][2][16];
    const int zero = opaque_zero();
    wait_full();
    decode_stage(a[0]);
    int left = num_chunks;
    for (; left >= 4; left -= 4) {
      narrow_step<2>(sum, a[0], a[1], left > zero, false);
      narrow_step<2>(sum, a[1], a[0], left > 4, left == 4);
    }
    if (left == 3) {
      narrow_step<2>(sum, a[0], a[1], left > zero, false);
      narrow_step<1>(sum, a[1], a[0], false, true);
    } else if (left == 2) {
      narrow_step<2>(sum, a[0], a[1], false, true);
    } else if (left == 1) {
      narrow_step<1>(sum, a[0], a[1], false, true);
    }
  }

  // The second half of an odd last stage holds stale bytes, which are decoded and never multiplied.
  __device__ __forceinline__ void decode_stage(uint32_t (&a)[2][16]) const {
    decode(a[0], 0);
    decode(a[1], 1);
  }

  template <int kNum>
  __device__ __forceinline__ void narrow_step(float (&sum)[N / 2], uint32_t (&now)[2][16], uint32_t (&next)[2][16],
                                              bool more, bool last) {
    float d[2][N / 2];  // L2: one per scale group
    const Stage stage = take();
    ptx::wgmma_fence();
    multiply_chunk<N, !kL1>(kL1 ? sum : d[0], now[0], tile(stage, 0));
    if constexpr (kNum == 2) multiply_chunk<N, !kL1>(kL1 ? sum : d[1], now[1], tile(stage, 1));
    ptx::wgmma_commit();
    if (more) {
      wait_full();
      decode_stage(next);
    }
    ptx::wgmma_wait<0>();
    if constexpr (!kL1) {
      promote<N>(sum, d[0], stage.data + stage_scales(N), me_.lane);
      if constexpr (kNum == 2) promote<N>(sum, d[1], stage.data + stage_scales(N) + N * 4, me_.lane);
    }
    if (last) finish<N>(sum, sum, stage, me_.lane);
    release(stage);
  }

  __device__ __forceinline__ static void clear(float (&values)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) values[i] = 0.f;
  }

  // One chunk per stage; the next multiply is queued behind the previous one without draining it.
  template <typename Meanwhile>
  __device__ __forceinline__ void run_wide_l1(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile) {
    uint32_t a[2][16];
    float d[N / 2];
    const int zero = opaque_zero();
    Stage stage{};
    int left = num_chunks;
    wait_full();
    decode(a[0]);
    if (left >= kPassEndPieces) {
      wide_chunks<kPassEndPieces, true>(d, a, left, zero, stage, meanwhile);
      left -= kPassEndPieces;
      for (; left >= 2; left -= 2) wide_chunks<2, false>(d, a, left, zero, stage, [](auto) {});
      if (left > 0) wide_chunks<1, false>(d, a, left, zero, stage, [](auto) {});
      ptx::wgmma_wait<0>();
    } else {
      for_each_constant<kPassEndPieces>(meanwhile);
      few_chunks(d, a[0], left, stage);
    }
    finish<N>(sum, d, stage, me_.lane);
    release(stage);
  }

  // kFirst: these chunks begin the sums, and `stage`, the previously multiplied one, does not exist yet.
  template <int kNum, bool kFirst, typename Meanwhile>
  __device__ __forceinline__ void wide_chunks(float (&d)[N / 2], uint32_t (&a)[2][16], int left, int zero, Stage& stage,
                                              Meanwhile&& meanwhile) {
    for_each_constant<kNum>([&](auto index) {
      constexpr int i = decltype(index)::value;
      const Stage before = stage;
      stage = take();
      ptx::wgmma_fence();
      multiply_chunk<N, kFirst && i == 0>(d, a[i % 2], tile(stage));
      ptx::wgmma_commit();
      meanwhile(index);
      if constexpr (!kFirst || i > 0) {
        ptx::wgmma_wait<1>();
        this->release(before);
      }
      if (i + 1 < kNum ? left > zero : left > kNum) {
        wait_full();
        decode(a[(i + 1) % 2]);
      }
    });
  }

  // For a hidden size of less than kPassEndPieces chunks, with the first unit decoded; not optimised. Does not release
  // the last stage.
  __device__ __forceinline__ void few_chunks(float (&d)[N / 2], uint32_t (&a)[16], int left, Stage& stage) {
    clear(d);
    while (true) {
      stage = take();
      ptx::wgmma_fence();
      multiply_chunk<N, false>(d, a, tile(stage));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (--left == 0) return;
      release(stage);
      wait_full();
      decode(a);
    }
  }

  // One chunk per scale group: the next chunk is decoded during the multiply, the sum promoted after it.
  template <typename Meanwhile>
  __device__ __forceinline__ void run_wide_l2(float (&sum)[N / 2], int num_chunks, Meanwhile&& meanwhile) {
    uint32_t a[2][16];
    const int zero = opaque_zero();
    wait_full();
    decode(a[0]);
    int left = num_chunks;
    if (left == 1) {
      wide_step<true, true>(sum, a[0], a[1], false, meanwhile);
      return;
    }
    wide_step<true, false>(sum, a[0], a[1], left > zero, meanwhile);
    for (--left; left > 2; left -= 2) {
      wide_step<false, false>(sum, a[1], a[0], left > zero, [](auto) {});
      wide_step<false, false>(sum, a[0], a[1], left > zero, [](auto) {});
    }
    if (left == 2) {
      wide_step<false, false>(sum, a[1], a[0], left > zero, [](auto) {});
      wide_step<false, true>(sum, a[0], a[1], false, [](auto) {});
    } else {
      wide_step<false, true>(sum, a[1], a[0], false, [](auto) {});
    }
  }

  template <bool kFirst, bool kLast, typename Meanwhile>
  __device__ __forceinline__ void wide_step(float (&sum)[N / 2], uint32_t (&now)[16], uint32_t (&next)[16], bool more,
                                            Meanwhile&& meanwhile) {
    float d[N / 2];
    const Stage stage = take();
    ptx::wgmma_fence();
    multiply_chunk<N, true>(d, now, tile(stage));
    ptx::wgmma_commit();
    for_each_constant<kPassEndPieces>(meanwhile);
    if (more) {
      wait_full();
      decode(next);
    }
    ptx::wgmma_wait<0>();
    promote<N, kFirst>(sum, d, stage.data + stage_scales(N), me_.lane);
    if constexpr (kLast) finish<N>(sum, sum, stage, me_.lane);
    release(stage);
  }
};

// L1 of a pair of token blocks. A chunk takes two stages, each with the widest tile of one block; the first also holds
// the weights. Each unit is decoded once for both.
class PairLoop : private UnitReader<kMaxTokenTile> {
 public:
  using UnitReader::UnitReader;

  // The sums of the two blocks.
  using Sums = float[2][kMaxTokenTile / 2];

  __device__ __forceinline__ void run(Sums& sum, int num_chunks) {
    uint32_t a[2][16];
    const int zero = opaque_zero();
    Stages now{};
    int left = num_chunks;
    wait_full();
    decode(a[0]);
    step<true>(sum, a[0], a[1], left > 1, now);
    for (--left; left >= 2; left -= 2) {
      step<false>(sum, a[1], a[0], left > zero, now);
      step<false>(sum, a[0], a[1], left > 2, now);
    }
    if (left > 0) step<false>(sum, a[1], a[0], false, now);
    ptx::wgmma_wait<0>();
    finish<N>(sum[0], sum[0], now.first, me_.lane);
    finish<N>(sum[1], sum[1], now.second, me_.lane);
    release(now.first);
    release(now.second);
  }

 private:
  static constexpr int N = kMaxTokenTile;
  struct Stages {
    Stage first, second;
  };

  // Queues the products of this chunk, then waits for those of the previous one.
  template <bool kBegins>
  __device__ __forceinline__ void step(Sums& sum, uint32_t (&unit)[16], uint32_t (&next)[16], bool more,
                                       Stages& now) const {
    const Stages before = now;
    now.first = take();
    ptx::wgmma_fence();
    multiply_chunk<N, kBegins>(sum[0], unit, tile(now.first));
    wait_full();
    now.second = take();
    ptx::wgmma_fence();
    multiply_chunk<N, kBegins>(sum[1], unit, tile(now.second));
    ptx::wgmma_commit();
    if constexpr (!kBegins) {
      ptx::wgmma_wait<1>();
      release(before.first);
      release(before.second);
    }
    if (more) {
      wait_full();
      decode(next);
    }
  }
};

}  // namespace hopper_moe
