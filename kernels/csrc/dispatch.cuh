// Rows from their source ranks into the expert pools, in the layout that the products read.
#pragma once
#include "epilogue.cuh"

namespace hopper_moe {

// One warp copies pool row `index` (counted over valid rows, expert by expert) from its source rank and counts it as ready.
__device__ inline void dispatch_row(const MegaMoeParams& p, const ExpertTable& table, uint32_t* x_ready, int index, int lane) {
  const Shape& s = p.shape;
  const int expert = find_expert(table.slot_base, s.num_local_experts, index);
  const int position = index - table.slot_base[expert];
  int rank = 0, from = position;     // rows of an expert are ordered by source rank
  while (from >= table.rank_count[rank * s.num_local_experts + expert]) from -= table.rank_count[rank++ * s.num_local_experts + expert];
  const uint32_t slot = __ldcg(p.peer<uint32_t>(rank, p.ws.slot_list) + int64_t{s.first_expert + expert} * s.list_stride() + from);
  const int token = slot / s.top_k;
  const int num_rows = table.slot_base[expert + 1] - table.slot_base[expert];
  const int block = position / p.tiles.max_tile, first = block * p.tiles.max_tile;
  const int tile = num_rows - first >= p.tiles.max_tile ? p.tiles.max_tile : tail_tile(p.tiles, num_rows - first);
  const int block_row = table.row_base[expert] + first, row = position - first;

  const uint8_t* source = p.peer<uint8_t>(rank, p.ws.x) + int64_t{token} * s.hidden;
  uint8_t* pool = p.local<uint8_t>(p.ws.pool_x) + int64_t{block_row} * s.hidden;
#pragma unroll 4
  for (int chunk = lane; chunk < s.hidden / 16; chunk += 32) {
    *reinterpret_cast<uint4*>(pool + int64_t{chunk / 8} * tile * kUnitK + swizzled(row, chunk % 8)) = ptx::load_l2(source + chunk * 16);
  }
  const int groups = s.num_scale_groups();
  const float* source_scale = p.peer<float>(rank, p.ws.x_scale) + int64_t{token} * groups;
  float* pool_scale = p.local<float>(p.ws.pool_x_scale) + int64_t{block_row} * groups;
  for (int group = lane; group < groups; group += 32) pool_scale[group * tile + row] = __ldcg(source_scale + group);
  if (lane == 0) {
    p.local<float>(p.ws.pool_weight)[block_row + row] = __ldcg(p.peer<float>(rank, p.ws.topk_weights) + slot);
    p.local<uint32_t>(p.ws.pool_slot)[block_row + row] = static_cast<uint32_t>(rank) << 24 | slot;
  }
  ptx::fence_async_global();   // the rows are read by bulk copies
  __syncwarp();
  if (lane == 0) {
    ptx::red_add_release_gpu(x_ready + table.block_base[expert] + block, 1);
  }
}

// All rows, expert by expert as the products need them, shared out over `num_workers` warps of the grid.
__device__ inline void dispatch(const MegaMoeParams& p, const ExpertTable& table, uint32_t parity, int worker, int num_workers, int lane) {
  uint32_t* x_ready = p.local<uint32_t>(p.ws.x_ready) + parity * p.shape.max_blocks();
  const int num_rows = table.slot_base[p.shape.num_local_experts];
  for (int row = worker; row < num_rows; row += num_workers) dispatch_row(p, table, x_ready, row, lane);
}

}  // namespace hopper_moe
