// Memory map of the fused MoE: packed weights, workspace, order of tasks. Host and device include it, so sizes and
// addresses come from the same code. quantization/layout.py provides the constants as -D defines.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace hopper_moe {

constexpr int kUnitRows = HM_UNIT_ROWS;  // packed rows of one weight unit, and rows of one WGMMA
constexpr int kUnitK = HM_UNIT_K;        // k of one unit, and of one activation tile
// Each weight format has its own library: 4 bits (E2M1 nibbles with scale deltas) or 8 bits (E4M3 with one FP32 scale
// per 128 x 128 block).
constexpr bool kFp8Weights = HM_WEIGHT_BITS == 8;
constexpr bool kWideScales = HM_WIDE_SCALES;  // 4 bits: decoded to E5M2 instead of E4M3 (contract section 3)
constexpr int kUnitBytes = kFp8Weights ? HM_FP8_UNIT_BYTES : HM_UNIT_BYTES;
constexpr int kUnitNibbleBytes = kUnitRows * kUnitK / 2;
constexpr int kHGroup = HM_H_GROUP;              // features per activation scale of h (x has one scale a token)
constexpr int kFp4Group = HM_MXFP4_GROUP;        // features per exponent of an FP4 token
constexpr int kCombineGroup = HM_COMBINE_GROUP;  // columns per scale of an FP8 combine slot
// weight = e2m1 * 2**(delta - kBaseShift) * 2**(base + kBaseShift - 127)
constexpr int kBaseShift = kWideScales ? HM_WIDE_BASE_SHIFT : HM_BASE_SHIFT;
constexpr float kE4m3Max = HM_E4M3_MAX;  // the largest value of a group after scaling
// For exponents <= 0.
__host__ __device__ constexpr float power_of_two(int exponent) {
  return exponent == 0 ? 1.f : power_of_two(exponent + 1) / 2;
}
constexpr float kAmaxFloor = power_of_two(HM_AMAX_FLOOR_EXPONENT);  // keeps kE4m3Max / amax finite for a group of zeros
static_assert(kUnitRows == 64 && kUnitK == 128 && kHGroup == 128 && kCombineGroup == 128,
              "the kernels are written for this contract");

constexpr int kRowTile = 2 * kUnitRows;        // rows of a weight tile: one unit for each math warpgroup
constexpr int kRowTileBytes = 2 * kUnitBytes;  // per k block
constexpr int kBlockScaleBytes =
    kFp8Weights ? 4 * HM_FP8_SCALES_PER_BLOCK : 0;      // the FP32 scales of a row tile and k block
constexpr int kMaxExperts = HM_MAX_EXPERTS;             // experts of all ranks together
constexpr int kMaxLocalExperts = HM_MAX_LOCAL_EXPERTS;  // experts of one rank
constexpr int kMaxRanks = HM_MAX_RANKS;
constexpr int kMaxTokenTile = 128;
constexpr int kGroupTiles = 4;  // row tiles of one column group; L2 finishes and combine starts by group

// Position of feature `k` of a block of 128 in the rows that the products read: x, h and FP8 weights (layout.py:
// wgmma_position). Four consecutive features stay adjacent; eight whose first is a multiple of eight go to p .. p + 3
// and p + 16 .. p + 19.
__host__ __device__ constexpr int wgmma_position(int k) { return k / 8 % 4 * 32 + k / 4 % 2 * 16 + k / 32 * 4 + k % 4; }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Shape {
  int hidden, intermediate, top_k;
  int num_experts;                      // of all ranks
  int num_local_experts, first_expert;  // of this rank
  int num_ranks, rank;
  int capacity;      // tokens per rank that fit in the workspace
  int wave_rows;     // pool rows of one wave; a launch with more rows reuses the pools, wave by wave
  int fp8_combine;   // slots are sent as E4M3 with a scale per kCombineGroup columns, not as BF16
  int fp4_dispatch;  // tokens are sent as E2M1 with an exponent per kFp4Group features, not as E4M3

  __host__ __device__ int num_features_tiles() const { return intermediate / kHGroup; }  // L1 tasks of one token block
  __host__ __device__ int num_row_tiles() const { return hidden / kRowTile; }            // L2 tasks of one token block
  __host__ __device__ int num_column_groups() const { return ceil_div(num_row_tiles(), kGroupTiles); }
  __host__ __device__ int list_stride() const { return capacity * top_k; }
  // The rows of every expert are padded to a whole token tile.
  __host__ __device__ int64_t max_rows() const {
    return int64_t{num_ranks} * capacity * top_k + int64_t{num_local_experts} * kMaxTokenTile;
  }
  __host__ __device__ int max_blocks() const {
    return static_cast<int>(max_rows() / 8);
  }  // token tiles are at least 8 wide
  // The last block of a wave may extend beyond it.
  __host__ __device__ int64_t pool_rows() const { return int64_t{wave_rows} + kMaxTokenTile; }
  __host__ __device__ int token_bytes() const { return fp4_dispatch ? hidden / 2 : hidden; }
  __host__ __device__ int num_token_exponents() const { return fp4_dispatch ? hidden / kFp4Group : 0; }
  __host__ __device__ int num_combine_groups() const { return fp8_combine ? hidden / kCombineGroup : 0; }
};

// Byte offsets in a rank's workspace. Peers access the first part; the second is private.
struct Workspace {
  // Control counters, zero before the first launch.
  int64_t epoch;           // u32: launches so far; its parity selects the counters in use
  int64_t exit_count;      // u32: CTAs of the current launch that will not read `epoch` again
  int64_t gave_up;         // u32: nonzero once a thread has reported a missing peer
  int64_t arrived;         // u32 [num_ranks]: last launch whose counts that rank has sent
  int64_t results_sent;    // u32 [num_ranks][column groups]: last launch whose rows of the group that rank has sent
  int64_t received_count;  // u32 [2][num_ranks][num_local_experts]: slots that each rank sends to this rank's experts
  int64_t expert_count;    // u32 [2][num_experts]: slots of this rank's tokens by expert
  int64_t x_ready;         // u32 [2][max_blocks]: pool rows written
  int64_t h_ready;         // u32 [2][max_blocks]: (L1 task, service warp) pairs finished
  int64_t group_done;      // u32 [2][column groups]: (L2 task, service warp) pairs finished
  int64_t group_claimed;   // u32 [2][column groups]: combine units that have been claimed
  int64_t next_task;       // u32 [2]: tasks taken
  int64_t control_bytes;   // bytes of the counters above
  // Tokens of this rank, written by pre-dispatch.
  int64_t slot_list;      // u32 [num_experts][list_stride]: token * top_k + slot
  int64_t x;              // E4M3 [capacity][hidden], or E2M1 [capacity][hidden / 2], low nibble first; blocks of 128 in
                          // wgmma_position order
  int64_t x_exponent;     // i8 [capacity][token exponents]: a value is e2m1 * 2**exponent * x_scale
  int64_t x_scale;        // f32 [capacity]
  int64_t topk_ids;       // i32 [capacity][top_k]
  int64_t topk_weights;   // f32 [capacity][top_k]
  int64_t combine;        // BF16, or E4M3, [capacity][top_k][hidden]: written by the ranks of the slots' experts
  int64_t combine_scale;  // f32 [capacity][top_k][combine groups]
  // Pools of this rank's experts. A token block of N rows that its wave places at row r begins at r times the row size.
  int64_t pool_x;        // E4M3 [block][hidden / 128][N][128], wgmma_position order, 128-byte swizzle
  int64_t pool_x_scale;  // f32  [row]
  int64_t pool_weight;   // f32  [row]: routing weight
  int64_t pool_slot;     // u32  [row]: source rank << 24 | token * top_k + slot
  int64_t pool_h;        // E4M3 [block][intermediate / 128][N][128], the same order and swizzle
  int64_t pool_h_scale;  // f32  [block][intermediate / 128][N]
  int64_t num_bytes;

  explicit Workspace(const Shape& s) {
    int64_t at = 0;
    auto take = [&at](int64_t num_bytes) {
      const int64_t begin = at;
      at = (at + num_bytes + 1023) / 1024 * 1024;
      return begin;
    };
    epoch = take(4);
    exit_count = take(4);
    gave_up = take(4);
    arrived = take(int64_t{4} * s.num_ranks);
    results_sent = take(int64_t{4} * s.num_ranks * s.num_column_groups());
    received_count = take(int64_t{8} * s.num_ranks * s.num_local_experts);
    expert_count = take(int64_t{8} * s.num_experts);
    x_ready = take(int64_t{8} * s.max_blocks());
    h_ready = take(int64_t{8} * s.max_blocks());
    group_done = take(int64_t{8} * s.num_column_groups());
    group_claimed = take(int64_t{8} * s.num_column_groups());
    next_task = take(8);
    control_bytes = at;
    slot_list = take(int64_t{4} * s.num_experts * s.list_stride());
    x = take(int64_t{s.capacity} * s.token_bytes());
    x_exponent = take(int64_t{s.capacity} * s.num_token_exponents());
    x_scale = take(int64_t{4} * s.capacity);
    topk_ids = take(int64_t{4} * s.capacity * s.top_k);
    topk_weights = take(int64_t{4} * s.capacity * s.top_k);
    combine = take(int64_t{s.fp8_combine ? 1 : 2} * s.capacity * s.top_k * s.hidden);
    combine_scale = take(int64_t{4} * s.capacity * s.top_k * s.num_combine_groups());
    pool_x = take(s.pool_rows() * s.hidden);
    pool_x_scale = take(4 * s.pool_rows());
    pool_weight = take(4 * s.pool_rows());
    pool_slot = take(4 * s.pool_rows());
    pool_h = take(s.pool_rows() * s.intermediate);
    pool_h_scale = take(4 * s.pool_rows() * (s.intermediate / kHGroup));
    num_bytes = at;
  }
};

// How the tokens of an expert are divided: blocks of `max_tile`, then one block of tail_tile[ceil(rest / 8)]. From
// `pair_from` L1 tasks per CTA on, L1 takes two blocks of kMaxTokenTile at once.
struct TileTable {
  int max_tile, pair_from;
  uint8_t tail_tile[kMaxTokenTile / 8 + 1];
};

// Report to the host, written before a rank stops because of a missing peer.
struct PeerFailure {
  uint32_t reported;  // 1 once the other fields are valid
  uint32_t step;      // a PeerStep
  uint32_t missing_rank, layer, launch;
};

struct MegaMoeParams {
  Shape shape;
  Workspace ws;
  TileTable tiles;
  float swiglu_limit;  // +inf for no clamp
  int num_tokens;
  const uint8_t *w13_packed, *w13_base, *w2_packed, *w2_base;  // FP8 weights: `base` are the block scales
  uint16_t* y;                                                 // BF16 [num_tokens][hidden]
  uint8_t* rank_base[kMaxRanks];                               // workspaces of all ranks
  int layer;                                                   // for messages
  uint64_t timeout_ns;                                         // how long to wait for a peer
  PeerFailure* failure;                                        // pinned host memory

  template <typename T>
  __device__ T* local(int64_t offset) const {
    return reinterpret_cast<T*>(rank_base[shape.rank] + offset);
  }
  // The copy of `num` counters that this launch uses; there are two, selected by the parity of the launch.
  __device__ uint32_t* counters(int64_t offset, int num, uint32_t launch) const {
    return local<uint32_t>(offset) + parity_of(launch) * num;
  }
  __device__ static uint32_t parity_of(uint32_t launch) { return ~launch & 1; }  // launches are numbered from 1
  __device__ uint32_t* x_ready(uint32_t launch) const { return counters(ws.x_ready, shape.max_blocks(), launch); }
  __device__ uint32_t* h_ready(uint32_t launch) const { return counters(ws.h_ready, shape.max_blocks(), launch); }
  __device__ uint32_t* group_done(uint32_t launch) const {
    return counters(ws.group_done, shape.num_column_groups(), launch);
  }
  __device__ uint32_t* group_claimed(uint32_t launch) const {
    return counters(ws.group_claimed, shape.num_column_groups(), launch);
  }
  template <typename T>
  __device__ T* peer(int rank, int64_t offset) const {
    return reinterpret_cast<T*>(rank_base[rank] + offset);
  }
};

}  // namespace hopper_moe
