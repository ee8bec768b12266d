// Assignment of tokens to blocks and the order of tasks. Every CTA derives the same table from the expert counts, so
// CTAs need not communicate.
#pragma once
#include "layout.cuh"

namespace hopper_moe {

struct ExpertTable {                     // in shared memory; entry [num_local_experts] holds the totals
  int slot_base[kMaxLocalExperts + 1];   // valid rows before the expert
  int row_base[kMaxLocalExperts + 1];    // pool rows (padded) before the expert
  int block_base[kMaxLocalExperts + 1];  // token blocks before the expert
  int unit_base[kMaxLocalExperts + 1];   // L1 units before the expert, if blocks are paired
  int rank_count[kMaxExperts];           // [rank][local expert]: rows from each source rank
  int warp_total[4][16];
};

struct TokenBlock {
  int expert, index;  // local expert; block number over all experts
  int row;            // first pool row, relative to the start of its wave
  int tile;           // N: rows of the tile, padding included
  int num_rows;       // valid rows
};

// Largest i with base[i] <= value, base non-decreasing and base[0] == 0.
__device__ __forceinline__ int find_expert(const int* base, int num_experts, int value) {
  int low = 0, high = num_experts;  // base[low] <= value < base[high]
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    if (base[mid] <= value)
      low = mid;
    else
      high = mid;
  }
  return low;
}

__device__ __forceinline__ int tail_tile(const TileTable& tiles, int num_rows) {
  return tiles.tail_tile[(num_rows + 7) / 8];
}

// Inclusive scan of four values over the first num_local_experts threads of the CTA, stored as exclusive prefixes.
// Called by all threads.
__device__ inline void build_expert_table(ExpertTable& table, const MegaMoeParams& p, uint32_t launch) {
  const Shape& s = p.shape;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int num_counts = s.num_ranks * s.num_local_experts;
  const uint32_t* counts = s.num_ranks == 1 ? p.counters(p.ws.expert_count, s.num_experts, launch) + s.first_expert
                                            : p.counters(p.ws.received_count, num_counts, launch);
  for (int i = thread; i < num_counts; i += blockDim.x) table.rank_count[i] = static_cast<int>(__ldcg(counts + i));
  __syncthreads();
  int carry[4] = {0, 0, 0, 0};
  for (int first = 0; first < s.num_local_experts; first += blockDim.x) {
    const int expert = first + thread;
    int value[4] = {0, 0, 0, 0};
    if (expert < s.num_local_experts) {
      int count = 0;
      for (int rank = 0; rank < s.num_ranks; ++rank) count += table.rank_count[rank * s.num_local_experts + expert];
      const int full = count / p.tiles.max_tile, rest = count - full * p.tiles.max_tile;
      value[0] = count;
      value[1] = full * p.tiles.max_tile + (rest ? tail_tile(p.tiles, rest) : 0);
      value[2] = full + (rest > 0);
      const int widest =
          p.tiles.max_tile == kMaxTokenTile ? full + (rest && tail_tile(p.tiles, rest) == kMaxTokenTile) : 0;
      value[3] = value[2] - widest / 2;
    }
    int inclusive[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      inclusive[i] = value[i];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, inclusive[i], step);
        if (lane >= step) inclusive[i] += below;
      }
      if (lane == 31) table.warp_total[i][warp] = inclusive[i];
    }
    __syncthreads();
    int* bases[4] = {table.slot_base, table.row_base, table.block_base, table.unit_base};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int before = carry[i], total = carry[i];
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        if (w < warp) before += table.warp_total[i][w];
        total += table.warp_total[i][w];
      }
      if (expert < s.num_local_experts) {
        bases[i][expert] = before + inclusive[i] - value[i];
        if (expert == s.num_local_experts - 1) bases[i][s.num_local_experts] = before + inclusive[i];
      }
      carry[i] = total;
    }
    __syncthreads();
  }
}

// Waves. The pools hold `wave_rows` rows (and the end of one more block). Wave w consists of the blocks that start at
// rows w * wave_rows and above; its rows are dispatched when all products of the previous wave are done. Usually there
// is one wave; a skewed batch needs more.
__device__ __forceinline__ int row_in_wave(const MegaMoeParams& p, int row) {
  return row < p.shape.wave_rows ? row : row % p.shape.wave_rows;
}

__device__ __forceinline__ int wave_of_block(const ExpertTable& table, const MegaMoeParams& p, int block) {
  const int expert = find_expert(table.block_base, p.shape.num_local_experts, block);
  return (table.row_base[expert] + (block - table.block_base[expert]) * p.tiles.max_tile) / p.shape.wave_rows;
}

// First block of a wave, and its first row counted over valid rows only; the totals for waves beyond the last.
struct WaveBegin {
  int block, slot;
  __device__ WaveBegin(const ExpertTable& table, const MegaMoeParams& p, int wave) {
    const int num_experts = p.shape.num_local_experts, row = wave * p.shape.wave_rows;
    if (row >= table.row_base[num_experts]) {
      block = table.block_base[num_experts];
      slot = table.slot_base[num_experts];
      return;
    }
    const int expert = find_expert(table.row_base, num_experts, row);
    const int in_expert = ceil_div(row - table.row_base[expert], p.tiles.max_tile);
    block = table.block_base[expert] + in_expert;
    slot = min(table.slot_base[expert] + in_expert * p.tiles.max_tile, table.slot_base[expert + 1]);
  }
};

__device__ __forceinline__ TokenBlock token_block(const ExpertTable& table, const MegaMoeParams& p, int index) {
  const int expert = find_expert(table.block_base, p.shape.num_local_experts, index);
  const int first = (index - table.block_base[expert]) * p.tiles.max_tile;
  const int rest = table.slot_base[expert + 1] - table.slot_base[expert] - first;
  const bool full = rest >= p.tiles.max_tile;
  return {expert, index, row_in_wave(p, table.row_base[expert] + first),
          full ? p.tiles.max_tile : tail_tile(p.tiles, rest), full ? p.tiles.max_tile : rest};
}

// The compiler keeps WGMMAs asynchronous only on paths that it can prove uniform over a warp. Values from shared memory
// are not, until they are broadcast.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(~0u, value, 0); }

struct Task {
  bool is_l1, is_pair;  // a pair: this block and the next one
  TokenBlock block;
  int tile;  // L1: tile of 128 features (256 rows of w13). L2: tile of 128 rows of w2
  int wave;
};

// L1 takes two neighbouring blocks of an expert with the widest tile as one unit. Each weight is decoded once for both,
// which saves energy, and large batches are power-limited. It does not pay with few tasks (each takes twice as long)
// and is not possible where the next block may belong to another wave. FP8 weights need no decoding and two sets of
// sums.
constexpr bool kPairsBlocks = !kFp8Weights;

// Order of tasks, wave by wave: all L1 tasks unit by unit, then all L2 tasks by column group. The tokens of one group
// are combined while the products of the next run, and the L2 tasks of an expert start long after its L1 tasks.
struct TaskList {
  int num_blocks, num_tasks;
  bool one_wave, pairs;

  __device__ TaskList(const ExpertTable& table, const MegaMoeParams& p)
      : num_blocks(table.block_base[p.shape.num_local_experts]) {
    const int l1_per_unit = p.shape.num_features_tiles();
    one_wave = table.row_base[p.shape.num_local_experts] <= p.shape.wave_rows;
    pairs = kPairsBlocks && one_wave && num_blocks * l1_per_unit >= p.tiles.pair_from * static_cast<int>(gridDim.x);
    num_tasks = (pairs ? table.unit_base[p.shape.num_local_experts] : num_blocks) * l1_per_unit +
                num_blocks * p.shape.num_row_tiles();
  }

  __device__ static int group_width(const Shape& s, int group) {
    return min(kGroupTiles, s.num_row_tiles() - group * kGroupTiles);
  }

  __device__ Task get(const ExpertTable& table, const MegaMoeParams& p, int index) const {
    const int l1_per_unit = p.shape.num_features_tiles();
    int wave = 0, first = 0, last = num_blocks;  // blocks of the wave that the task belongs to
    if (!one_wave) {
      const int per_block = l1_per_unit + p.shape.num_row_tiles();
      wave = wave_of_block(table, p, index / per_block);
      first = WaveBegin(table, p, wave).block;
      last = WaveBegin(table, p, wave + 1).block;
      index -= first * per_block;
    }
    const int num_l1 = (pairs ? table.unit_base[p.shape.num_local_experts] : last - first) * l1_per_unit;
    if (index < num_l1) {
      const int unit = index / l1_per_unit, tile = index - unit * l1_per_unit;
      if (!pairs) return {true, false, token_block(table, p, first + unit), tile, wave};
      const int expert = find_expert(table.unit_base, p.shape.num_local_experts, unit),
                in_expert = unit - table.unit_base[expert];
      const int num_pairs = table.block_base[expert + 1] - table.block_base[expert] -
                            (table.unit_base[expert + 1] - table.unit_base[expert]);
      return {true, in_expert < num_pairs,
              token_block(table, p, table.block_base[expert] + in_expert + min(in_expert, num_pairs)), tile, wave};
    }
    index -= num_l1;
    const int per_group = (last - first) * kGroupTiles, group = index / per_group;
    const int rest = index - group * per_group, width = group_width(p.shape, group), block = rest / width;
    return {false, false, token_block(table, p, first + block), group * kGroupTiles + rest - block * width, wave};
  }
};

}  // namespace hopper_moe
