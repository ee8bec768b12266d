// What the service warps do beside the math: rows into the expert pools, L1 tiles out of shared memory, combine.
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
    ptx::fence_gpu();
    ptx::red_add_release_gpu(x_ready + table.block_base[expert] + block, 1);
  }
}

// One thread sends the finished L1 tile in `scratch` to the pool of h and counts it as ready.
__device__ inline void store_l1_tile(const MegaMoeParams& p, SharedStorage& smem, uint32_t* h_ready, const Task& task) {
  const int tile = task.block.tile;
  const int64_t row = task.block.row;
  ptx::bulk_store(p.local<uint8_t>(p.ws.pool_h) + row * p.shape.intermediate + task.tile * tile * kUnitK, ptx::smem_address(smem.scratch),
                  tile * kUnitK);
  ptx::bulk_store(p.local<float>(p.ws.pool_h_scale) + row * p.shape.num_features_tiles() + task.tile * tile,
                  ptx::smem_address(smem.h_scale), tile * 4);
  ptx::bulk_commit();
  ptx::bulk_wait_all();
  ptx::fence_async_global();
  ptx::fence_gpu();
  ptx::red_add_release_gpu(h_ready + task.block.index, 1);
}

// Dispatch rows and, in the warp that `stores`, L1 tiles as they finish: a waiting tile goes before the next row.
__device__ inline void dispatch_and_store(const MegaMoeParams& p, SharedStorage& smem, const TaskList& tasks, uint32_t parity, int warp,
                                          int num_warps, bool stores, int lane) {
  uint32_t* x_ready = p.local<uint32_t>(p.ws.x_ready) + parity * p.shape.max_blocks();
  uint32_t* h_ready = p.local<uint32_t>(p.ws.h_ready) + parity * p.shape.max_blocks();
  const uint32_t tile_full = ptx::smem_address(&smem.tile_full), tile_empty = ptx::smem_address(&smem.tile_empty);
  const int num_rows = smem.experts.slot_base[p.shape.num_local_experts];
  int row = blockIdx.x + warp * gridDim.x, task = stores ? blockIdx.x : tasks.num_l1;
  uint32_t phase = 0;
  while (row < num_rows || task < tasks.num_l1) {
    if (task < tasks.num_l1) {
      bool finished = ptx::mbarrier_test_wait(tile_full, phase);
      if (row >= num_rows && !finished) {
        ptx::mbarrier_wait(tile_full, phase);
        finished = true;
      }
      if (__all_sync(~0u, finished)) {
        if (lane == 0) {
          store_l1_tile(p, smem, h_ready, tasks.get(smem.experts, p, task));
          ptx::mbarrier_arrive(tile_empty);
        }
        __syncwarp();
        phase ^= 1;
        task += gridDim.x;
        continue;
      }
    }
    if (row < num_rows) {
      dispatch_row(p, smem.experts, x_ready, row, lane);
      row += num_warps * gridDim.x;
    }
  }
}

// Sums the slots of every token in ascending order for the columns of one group, once every L2 task of the group has stored its rows.
__device__ inline void combine_group(const MegaMoeParams& p, const TaskList& tasks, const uint32_t* group_done, int group, int worker,
                                     int num_workers, int lane) {
  const Shape& s = p.shape;
  const int first_column = group * kGroupTiles * kRowTile;
  const int num_tiles = min(kGroupTiles, s.num_row_tiles() - group * kGroupTiles);
  const int pieces = ceil_div(num_tiles, 2);     // of 256 columns: 8 a lane
  const int num_units = p.num_tokens * pieces;
  if (worker >= num_units) return;
  const uint32_t target = static_cast<uint32_t>(tasks.num_blocks) * num_tiles * 2;
  while (ptx::load_acquire_gpu(group_done + group) < target) {
  }
  const int* topk_ids = p.local<int>(p.ws.topk_ids);
  for (int unit = worker; unit < num_units; unit += num_workers) {
    const int token = unit / pieces, column = first_column + (unit - token * pieces) * 256 + lane * 8;
    const int id = lane < s.top_k ? __ldg(topk_ids + token * s.top_k + lane) : -1;
    uint32_t valid = __ballot_sync(~0u, id >= 0);
    if (column >= first_column + num_tiles * kRowTile) continue;
    const uint16_t* slots = p.local<uint16_t>(p.ws.combine) + int64_t{token} * s.top_k * s.hidden + column;
    float sum[8] = {};
    while (valid) {
      uint4 v[4];
      uint32_t rest = valid;
#pragma unroll
      for (int i = 0; i < 4; ++i) {    // four loads in flight
        if (rest) v[i] = ptx::load_l2(slots + int64_t{__ffs(rest) - 1} * s.hidden);
        rest &= rest - 1;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!valid) break;
        const uint32_t words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          sum[2 * w] += __uint_as_float(words[w] << 16);
          sum[2 * w + 1] += __uint_as_float(words[w] & 0xFFFF0000u);
        }
        valid &= valid - 1;
      }
    }
    uint4 out;
    out.x = ptx::to_bf16x2(sum[0], sum[1]);
    out.y = ptx::to_bf16x2(sum[2], sum[3]);
    out.z = ptx::to_bf16x2(sum[4], sum[5]);
    out.w = ptx::to_bf16x2(sum[6], sum[7]);
    *reinterpret_cast<uint4*>(p.y + int64_t{token} * s.hidden + column) = out;
  }
}

}  // namespace hopper_moe
