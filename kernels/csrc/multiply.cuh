// What the product loops of all weight formats share: indices of a math thread, and the multiply of one chunk.
#pragma once
#include <utility>

#include "pipeline.cuh"
#include "ptx/wgmma.cuh"

namespace hopper_moe {

// The work that remains for a pass's sums is divided into this many pieces, done during the first products of the next
// pass.
constexpr int kPassEndPieces = 4;

struct MathThread {
  int warpgroup, warp, lane;  // warp: 0..3 within the warpgroup
};

// A math thread's position in the ring. Waiting for and releasing stages does not depend on their content.
class StageReader {
 public:
  __device__ StageReader(StageCursor& cursor, const MathThread& me) : cursor_(cursor), me_(me) {}

 protected:
  __device__ __forceinline__ void wait_full() const { cursor_.wait_full(); }
  // Returns the stage at the cursor and advances the cursor.
  __device__ __forceinline__ Stage take() const {
    const Stage stage = cursor_.stage();
    cursor_.advance();
    return stage;
  }
  __device__ __forceinline__ void release(const Stage& stage) const {
    __syncwarp();
    if (ptx::elect_one()) ptx::mbarrier_arrive(stage.empty());
  }

  StageCursor& cursor_;
  const MathThread me_;
};

// Calls f(std::integral_constant<int, i>) for i = 0 .. kNum - 1: an unrolled loop with a constant index.
template <typename F, int... I>
__device__ __forceinline__ void for_each_constant(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int kNum, typename F>
__device__ __forceinline__ void for_each_constant(F&& f) {
  for_each_constant(f, std::make_integer_sequence<int, kNum>{});
}

// The products of one chunk, which begin the sums `d` or are added to them.
template <int N, bool kBegins>
__device__ __forceinline__ void multiply_chunk(float (&d)[N / 2], const uint32_t* a, uint32_t tile_address) {
  for_each_constant<4>([&](auto step) {
    constexpr int i = decltype(step)::value;
    if constexpr (kBegins && i == 0) {
      ptx::wgmma_begin(d, a + 4 * i, ptx::wgmma_descriptor(tile_address, i));
    } else {
      ptx::wgmma(d, a + 4 * i, ptx::wgmma_descriptor(tile_address, i));
    }
  });
}

// Calls f(j, factor of the token of accumulator j) for all j; `factors`: shared address of N floats.
template <int N, typename F>
__device__ __forceinline__ void for_each_token(uint32_t factors, int lane, F&& f) {
  const uint32_t mine = factors + lane % 4 * 8;
  for_each_constant<N / 8>([&](auto index) {
    constexpr int i = decltype(index)::value;
    const float2 factor = ptx::load_shared_float2<i * 32>(mine);
#pragma unroll
    for (int j = 4 * i; j < 4 * i + 4; ++j) f(j, j % 2 ? factor.y : factor.x);
  });
}

// The sums `d` of a pass times the factors of their tokens' rows.
template <int N>
__device__ __forceinline__ void finish(float (&sum)[N / 2], const float (&d)[N / 2], const Stage& last, int lane) {
  for_each_token<N>(last.data + stage_row_factors(N), lane,
                    [&](int j, float factor) { sum[j] = __fmul_rn(d[j], factor); });
}

}  // namespace hopper_moe
