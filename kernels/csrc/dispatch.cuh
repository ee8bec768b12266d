// Rows from their source ranks into the expert pools, in the layout that the products read.
#pragma once
#include "epilogue.cuh"

namespace hopper_moe {

// Where a pool row comes from and goes to. Rows are counted over the valid rows of all local experts; an expert's are ordered by source rank.
struct PoolRow {
  int rank, slot;              // source: slot = token * top_k + k
  int block, block_row, row;   // block number, its first pool row, the row inside it
  int tile;

  __device__ PoolRow(const MegaMoeParams& p, const ExpertTable& table, int index) {
    const Shape& s = p.shape;
    const int expert = find_expert(table.slot_base, s.num_local_experts, index), position = index - table.slot_base[expert];
    int from = position;
    rank = 0;
    while (from >= table.rank_count[rank * s.num_local_experts + expert]) from -= table.rank_count[rank++ * s.num_local_experts + expert];
    slot = __ldcg(p.peer<int>(rank, p.ws.slot_list) + int64_t{s.first_expert + expert} * s.list_stride() + from);
    const int in_expert = position / p.tiles.max_tile, first = in_expert * p.tiles.max_tile;
    const int rest = table.slot_base[expert + 1] - table.slot_base[expert] - first;
    tile = rest >= p.tiles.max_tile ? p.tiles.max_tile : tail_tile(p.tiles, rest);
    block = table.block_base[expert] + in_expert;
    block_row = table.row_base[expert] + first;
    row = position - first;
  }
};

// All rows, expert by expert as the products need them, shared out over `num_workers` warps of the grid. kInFlight 16-byte loads a lane
// hide the latency; a row is counted as ready only after the next row's loads are on their way, since the release waits for its stores.
template <int kInFlight>
__device__ inline void dispatch(const MegaMoeParams& p, const ExpertTable& table, uint32_t parity, int worker, int num_workers, int lane) {
  const Shape& s = p.shape;
  uint32_t* x_ready = p.local<uint32_t>(p.ws.x_ready) + parity * s.max_blocks();
  const int num_rows = table.slot_base[s.num_local_experts], groups = s.num_scale_groups(), num_chunks = s.hidden / 16;
  uint32_t* stored = nullptr;
  auto count_stored = [&] {
    __syncwarp();
    if (stored != nullptr && lane == 0) ptx::red_add_release_gpu(stored, 1);
  };
  for (int index = worker; index < num_rows; index += num_workers) {
    const PoolRow to(p, table, index);
    const int token = to.slot / s.top_k;
    const uint8_t* source = p.peer<uint8_t>(to.rank, p.ws.x) + int64_t{token} * s.hidden;
    uint8_t* pool = p.local<uint8_t>(p.ws.pool_x) + int64_t{to.block_row} * s.hidden;
    float scale = 0.f;
    if (lane < groups) scale = __ldcg(p.peer<float>(to.rank, p.ws.x_scale) + int64_t{token} * groups + lane);
    const float weight = __ldcg(p.peer<float>(to.rank, p.ws.topk_weights) + to.slot);
    for (int first = 0; first < num_chunks; first += 32 * kInFlight) {
      uint4 v[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int chunk = first + i * 32 + lane;
        if (chunk < num_chunks) v[i] = ptx::load_l2(source + chunk * 16);
      }
      if (first == 0) count_stored();
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int chunk = first + i * 32 + lane;
        if (chunk < num_chunks) *reinterpret_cast<uint4*>(pool + int64_t{chunk / 8} * to.tile * kUnitK + swizzled(to.row, chunk % 8)) = v[i];
      }
    }
    float* pool_scale = p.local<float>(p.ws.pool_x_scale) + int64_t{to.block_row} * groups;
    if (lane < groups) pool_scale[lane * to.tile + to.row] = scale;
    for (int group = lane + 32; group < groups; group += 32) {
      pool_scale[group * to.tile + to.row] = __ldcg(p.peer<float>(to.rank, p.ws.x_scale) + int64_t{token} * groups + group);
    }
    if (lane == 0) {
      p.local<float>(p.ws.pool_weight)[to.block_row + to.row] = weight;
      p.local<uint32_t>(p.ws.pool_slot)[to.block_row + to.row] = static_cast<uint32_t>(to.rank) << 24 | static_cast<uint32_t>(to.slot);
    }
    ptx::fence_async_global();   // the rows are read by bulk copies
    stored = x_ready + to.block;
  }
  count_stored();
}

}  // namespace hopper_moe
