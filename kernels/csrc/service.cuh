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
    ptx::red_add_release_gpu(x_ready + table.block_base[expert] + block, 1);
  }
}

// One thread sends the finished L1 tile to the pool of h and counts it.
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
  ptx::red_add_release_gpu(h_ready + task.block.index, 1);
}

// One warp sends the rows of one warpgroup's L2 tile to the combine slots of their source ranks.
__device__ inline void store_l2_rows(const MegaMoeParams& p, const SharedStorage& smem, const Task& task, int warpgroup, int lane) {
  const uint8_t* tile = smem.scratch + warpgroup * kL2TileBytes;
  const int column = task.tile * kRowTile + warpgroup * kUnitRows + lane % 8 * 8;
#pragma unroll 4
  for (int row = lane / 8; row < task.block.num_rows; row += 4) {
    const uint32_t slot = smem.slots[warpgroup][row];
    uint16_t* out = p.peer<uint16_t>(slot >> 24, p.ws.combine) + int64_t{slot & 0xFFFFFFu} * p.shape.hidden + column;
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(tile + swizzled(row, lane % 8));
  }
}

// The columns of one group, cut into units of one token x 256 columns (8 a lane).
struct CombineGroup {
  int index, first_column, num_columns, pieces, num_units;
  uint32_t target;                   // (L2 task, warpgroup) pairs of the group

  __device__ CombineGroup(const MegaMoeParams& p, const TaskList& tasks, int group) : index(group) {
    const int num_tiles = min(kGroupTiles, p.shape.num_row_tiles() - group * kGroupTiles);
    first_column = group * kGroupTiles * kRowTile;
    num_columns = num_tiles * kRowTile;
    pieces = ceil_div(num_columns, 256);
    num_units = p.num_tokens * pieces;
    target = static_cast<uint32_t>(tasks.num_blocks) * num_tiles * 2;
  }
};

// Sums the slots of one unit's token in ascending order. Every L2 task of the group has stored its rows.
__device__ inline void combine_unit(const MegaMoeParams& p, const CombineGroup& group, int unit, int lane) {
  const Shape& s = p.shape;
  const int token = unit / group.pieces, offset = (unit - token * group.pieces) * 256 + lane * 8;
  const int id = lane < s.top_k ? __ldg(p.local<int>(p.ws.topk_ids) + token * s.top_k + lane) : -1;
  uint32_t valid = __ballot_sync(~0u, id >= 0);
  if (offset >= group.num_columns) return;
  const int column = group.first_column + offset;
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

// All units of a group, shared out over `num_workers` warps, after waiting for the group.
__device__ inline void combine_group(const MegaMoeParams& p, const TaskList& tasks, const uint32_t* group_done, int index, int worker,
                                     int num_workers, int lane) {
  const CombineGroup group(p, tasks, index);
  if (worker >= group.num_units) return;
  if (lane == 0) ptx::wait_at_least(group_done + index, group.target);
  __syncwarp();
  for (int unit = worker; unit < group.num_units; unit += num_workers) combine_unit(p, group, unit, lane);
}

// A service warp's day: finished tiles first, then rows to dispatch, then tokens to combine; asleep when there is nothing.
__device__ inline void serve(const MegaMoeParams& p, SharedStorage& smem, const TaskList& tasks, const TileBarriers& tiles, uint32_t parity,
                             int part, int num_parts, int lane) {
  const Shape& s = p.shape;
  uint32_t* x_ready = p.local<uint32_t>(p.ws.x_ready) + parity * s.max_blocks();
  uint32_t* h_ready = p.local<uint32_t>(p.ws.h_ready) + parity * s.max_blocks();
  uint32_t* group_done = p.local<uint32_t>(p.ws.group_done) + parity * s.num_column_groups();
  const int worker = blockIdx.x + part * gridDim.x, num_workers = num_parts * gridDim.x;
  const int num_rows = smem.experts.slot_base[s.num_local_experts], last_group = s.num_column_groups() - 1;
  int row = worker, task_index = blockIdx.x, group = 0, unit = worker;
  uint32_t phase = 0;
  auto tile_finished = [&](const Task& task) {
    const bool mine = ptx::mbarrier_test_wait(tiles.full[part], phase);
    const bool alone = !task.is_l1 || part != 0;
    return __all_sync(~0u, mine && (alone || ptx::mbarrier_test_wait(tiles.full[1], phase)));
  };
  auto send = [&](const Task& task) {
    if (task.is_l1) {
      if (lane == 0 && part == 0) store_l1_tile(p, smem, h_ready, task);
    } else {
      store_l2_rows(p, smem, task, part, lane);
    }
    __syncwarp();
    if (lane == 0) {
      ptx::mbarrier_arrive(tiles.empty[part]);
      if (!task.is_l1) ptx::red_add_release_gpu(group_done + task.tile / kGroupTiles, 1);   // carries all lanes' rows
    }
    phase ^= 1;
  };
  while (task_index < tasks.num_tasks) {
    const Task task = tasks.get(smem.experts, p, task_index);
    while (!tile_finished(task)) {
      if (row < num_rows) {
        dispatch_row(p, smem.experts, x_ready, row, lane);
        row += num_workers;
        continue;
      }
      if (group < last_group) {
        const CombineGroup g(p, tasks, group);
        if (unit >= g.num_units) {
          ++group;
          unit = worker;
          continue;
        }
        if (__all_sync(~0u, ptx::load_acquire_gpu(group_done + group) >= g.target)) {
          combine_unit(p, g, unit, lane);
          unit += num_workers;
          continue;
        }
      }
      __nanosleep(100);
    }
    send(task);
    task_index += gridDim.x;
  }
  for (; row < num_rows; row += num_workers) dispatch_row(p, smem.experts, x_ready, row, lane);
  for (; group < last_group; ++group, unit = worker) {
    const CombineGroup g(p, tasks, group);
    if (unit >= g.num_units) continue;
    if (lane == 0) ptx::wait_at_least(group_done + group, g.target);
    __syncwarp();
    for (; unit < g.num_units; unit += num_workers) combine_unit(p, g, unit, lane);
  }
}

}  // namespace hopper_moe
