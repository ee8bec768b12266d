// The math warpgroups: products, and all work that needs only the sums in a thread's own registers. Work that crosses
// threads is left to the service warps, which run concurrently with the next product.
#pragma once
#if HM_WEIGHT_BITS == 8
#include "mainloop_fp8.cuh"
#else
#include "mainloop_fp4.cuh"
#endif
#include "ptx/arithmetic.cuh"
#include "shared_storage.cuh"

namespace hopper_moe {

struct MathContext {
  const MegaMoeParams& p;
  SharedStorage& smem;
  const TileBarriers& tile;
  MathThread me;
  StageCursor cursor;
  uint32_t num_tasks_done = 0;

  __device__ __forceinline__ int row_in_tile() const { return me.warpgroup * kUnitRows + me.warp * 16 + me.lane / 4; }
  __device__ __forceinline__ void wait_tile() const { ptx::mbarrier_wait(tile.empty, (num_tasks_done & 1) ^ 1); }
  __device__ __forceinline__ void hand_over_tile() {
    ptx::mbarrier_arrive(tile.full);
    ++num_tasks_done;
  }
  // The thread's 16-byte chunk (eight features) of a row of h, for a pass.
  __device__ __forceinline__ int h_chunk(int pass) const { return pass * 8 + me.warpgroup * 4 + me.warp; }
  // Shared address of a lane's row of an 8 x 8 block: token `token`, 16-byte chunk `chunk` (8 columns).
  __device__ __forceinline__ uint32_t tile_address(int token, int chunk) const {
    return ptx::smem_address(smem.tile) + token * kTilePitch + chunk * 16;
  }
};

constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = ptx::min_nan(gate, limit);
  up = ptx::max_nan(ptx::min_nan(up, limit), -limit);
  return gate * ptx::reciprocal(1.f + ptx::exp2(-gate * kLog2E)) * up;
}

// The next task, as needed by the math warps.
struct MathTask {
  int code, first_row;  // as in TaskSlot

  __device__ __forceinline__ explicit MathTask(TaskFeed& feed) {
    const TaskSlot& slot = feed.next();
    code = warp_uniform(slot.code);
    first_row = warp_uniform(slot.first_row);
  }
};

// The work that remains for the sums of a pass, in kPassEndPieces pieces that are called during the first products of
// the next pass.
struct PassEnd {
  bool there = false;
  int pass = 0;
  float low = 0.f, high = 0.f;  // scales of the rows r and r + 8

  __device__ __forceinline__ void begin(int its_pass, const RowScales& scales) {
    there = true;
    pass = its_pass;
    low = scales.low();
    high = scales.high();
  }
};

// Rows r and r + 8 of a thread are gate and up of one feature; returns h of it for two tokens.
__device__ __forceinline__ uint32_t features_of(const float* v, float low, float high, float limit) {
  return ptx::to_bf16x2(swiglu(v[0] * low, v[2] * high, limit), swiglu(v[1] * low, v[3] * high, limit));
}

// Stores half a tile: a tile has two passes.
template <int N, int kPiece>
__device__ __forceinline__ void end_l1_pass(MathContext& c, const float (&sum)[N / 2], const PassEnd& end) {
  constexpr int kBlocks = N >= 32 ? 4 : N / 8;  // 8 x 8 blocks of one store
  constexpr int i = kPiece * kBlocks;
  const float limit = c.p.swiglu_limit;
  if (kPiece == 0 && end.pass == 0) c.wait_tile();
  if constexpr (i < N / 8) {
    const int chunk = c.h_chunk(end.pass);
    uint32_t h[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      h[j] = features_of(sum + 4 * (i + j), end.low, end.high, limit);
    }
    ptx::store_matrix_transposed(c.tile_address(8 * i + c.me.lane % (8 * kBlocks), chunk), h);
  }
  if (kPiece == kPassEndPieces - 1 && end.pass == 1) c.hand_over_tile();
}

// Stores 128 output columns; the sums include the routing weights.
template <int N, int kPiece>
__device__ __forceinline__ void end_l2_pass(MathContext& c, const float (&sum)[N / 2], const PassEnd& end) {
  constexpr int kBlocks = N >= 16 ? 4 : 2;  // two of them (rows r and r + 8) per 8 tokens
  constexpr int kStores = N / 8 / (kBlocks / 2), kFirst = kStores * kPiece / kPassEndPieces,
                kLast = kStores * (kPiece + 1) / kPassEndPieces;  // of a piece
  const int block = c.me.lane / 8 % kBlocks, chunk = (c.me.warpgroup * 4 + c.me.warp) * 2 + block % 2;
  if (kPiece == 0) c.wait_tile();
#pragma unroll
  for (int i = kFirst * (kBlocks / 2); i < kLast * (kBlocks / 2); i += kBlocks / 2) {
    uint32_t y[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j) {
      const float* v = sum + 4 * (i + j);
      y[2 * j] = ptx::to_bf16x2(v[0] * end.low, v[1] * end.low);
      y[2 * j + 1] = ptx::to_bf16x2(v[2] * end.high, v[3] * end.high);
    }
    ptx::store_matrix_transposed(c.tile_address(8 * (i + block / 2) + c.me.lane % 8, chunk), y);
  }
  if (kPiece == kPassEndPieces - 1) c.hand_over_tile();
}

// Computes this task and all that follow with the same code. L1: 128 features in two passes of 128 packed rows.
template <int N>
__device__ __forceinline__ void run_l1(MathContext& c, TaskFeed& feed, MathTask& task) {
  const int code = task.code;
  float sum[N / 2] = {};
  PassEnd end;
  auto piece_of_end = [&](auto piece) {
    if (end.there) end_l1_pass<N, decltype(piece)::value>(c, sum, end);
  };
  do {
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const RowScales scales(c.p.w13_base + task.first_row + pass * kRowTile + c.row_in_tile());
      MainLoop<N, true>(c.cursor, c.me).run(sum, c.p.shape.hidden / kUnitK, piece_of_end);
      end.begin(pass, scales);
    }
    task = MathTask(feed);
  } while (task.code == code);
  for_each_constant<kPassEndPieces>(piece_of_end);
}

#if HM_WEIGHT_BITS == 4
// L1 of pairs. A pass produces half of the h tile of both blocks. The tiles go to the service warps one after the
// other, a pass apart, so that these have a pass of time for each. What waits is kept as BF16, like the results of the
// other tiles after the last product of a task.
class PairResults {
 public:
  __device__ __forceinline__ explicit PairResults(MathContext& c) : c_(c) {}

  __device__ __forceinline__ void end_first_pass(const PairLoop::Sums& sum, const RowScales& scales) {
    hand_over_second();
    convert(half_[0], sum[0], scales);
    convert(half_[1], sum[1], scales);
  }

  __device__ __forceinline__ void end_second_pass(const PairLoop::Sums& sum, const RowScales& scales) {
    c_.wait_tile();
    store(half_[0], 0);
    convert(half_[0], sum[0], scales);
    store(half_[0], 1);
    c_.hand_over_tile();
#pragma unroll
    for (int i = 0; i < kWords; ++i) half_[0][i] = half_[1][i];
    convert(half_[1], sum[1], scales);
    there_ = true;
  }

  // Hands over the second block's tile, if there is one.
  __device__ __forceinline__ void hand_over_second() {
    if (!there_) return;
    c_.wait_tile();
    store(half_[0], 0);
    store(half_[1], 1);
    c_.hand_over_tile();
    there_ = false;
  }

 private:
  static constexpr int kWords = kMaxTokenTile / 8;

  __device__ __forceinline__ void convert(uint32_t (&half)[kWords], const float (&sum)[kMaxTokenTile / 2],
                                          const RowScales& scales) const {
    const float low = scales.low(), high = scales.high(), limit = c_.p.swiglu_limit;
#pragma unroll
    for (int i = 0; i < kWords; ++i) half[i] = features_of(sum + 4 * i, low, high, limit);
  }

  __device__ __forceinline__ void store(const uint32_t (&half)[kWords], int pass) const {
    const int chunk = c_.h_chunk(pass);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint32_t h[4] = {half[i], half[i + 1], half[i + 2], half[i + 3]};
      ptx::store_matrix_transposed(c_.tile_address(8 * i + c_.me.lane, chunk), h);
    }
  }

  MathContext& c_;
  uint32_t half_[2][kWords];  // after a first pass: its half of either block; after a second: both halves of the second
                              // block
  bool there_ = false;        // whether half_ holds the second block
};

__device__ __forceinline__ void run_l1_pairs(MathContext& c, TaskFeed& feed, MathTask& task) {
  const int code = task.code, num_chunks = c.p.shape.hidden / kUnitK;
  PairResults results(c);
  PairLoop::Sums sum;
  PairLoop loop(c.cursor, c.me);
  do {
    const uint8_t* base = c.p.w13_base + task.first_row + c.row_in_tile();
    const RowScales first(base), second(base + kRowTile);
    loop.run(sum, num_chunks);
    results.end_first_pass(sum, first);
    loop.run(sum, num_chunks);
    results.end_second_pass(sum, second);
    task = MathTask(feed);
  } while (task.code == code);
  results.hand_over_second();
}
#endif

// L2: 128 output columns times the routing weight.
template <int N>
__device__ __forceinline__ void run_l2(MathContext& c, TaskFeed& feed, MathTask& task) {
  const int code = task.code;
  float sum[N / 2] = {};
  PassEnd end;
  auto piece_of_end = [&](auto piece) {
    if (end.there) end_l2_pass<N, decltype(piece)::value>(c, sum, end);
  };
  do {
    const RowScales scales(c.p.w2_base + task.first_row + c.row_in_tile());
    MainLoop<N, false>(c.cursor, c.me).run(sum, c.p.shape.intermediate / kUnitK, piece_of_end);
    end.begin(0, scales);
    task = MathTask(feed);
  } while (task.code == code);
  for_each_constant<kPassEndPieces>(piece_of_end);
}

template <int N>
__device__ __forceinline__ void run_tasks(MathContext& c, TaskFeed& feed, MathTask& task) {
  if (task.code % 2) {
    run_l1<N>(c, feed, task);
  } else {
    run_l2<N>(c, feed, task);
  }
}

__device__ __forceinline__ void run_math(MathContext& c, TaskFeed feed) {
  MathTask task(feed);
  while (task.code != 0) {
    switch (task.code % kTaskKinds / 2) {
      case 8:
        run_tasks<8>(c, feed, task);
        break;
      case 16:
        run_tasks<16>(c, feed, task);
        break;
      case 32:
        run_tasks<32>(c, feed, task);
        break;
      case 64:
        run_tasks<64>(c, feed, task);
        break;
      case 96:
        run_tasks<96>(c, feed, task);
        break;
#if HM_WEIGHT_BITS == 4
      case 2 * kMaxTokenTile:
        run_l1_pairs(c, feed, task);
        break;
#endif
      default:
        run_tasks<128>(c, feed, task);
        break;
    }
  }
}

}  // namespace hopper_moe
