// The ring of stages that carries weights and activations from the two producer warps to the two math warpgroups.
//
// Happens-before of one stage: math (all reads done) --arrive empty--> both producers --copy engine + arrive.expect_tx full--> math.
// Weights and activations of a stage arrive on the same barrier but are issued by different warps: weights depend on nothing and run
// ahead by the whole ring, activations follow when the rows they need are there.
#pragma once
#include "layout.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "scheduler.cuh"

namespace hopper_moe {

constexpr int kNumStages = kFp8Weights ? 5 : 7;
constexpr int kStageBytes = (kFp8Weights ? 34 : 26) * 1024;
constexpr int kMathWarps = 8;
constexpr int kServiceWarps = 2;

// What one stage holds for token tile N: chunks of 128 k. Activations first (their swizzle needs 1024-byte alignment), then weights, then
// activation scales, then (last stage of an L2 task) the routing weights of the rows, then (FP8) the scales of the weight block.
__host__ __device__ constexpr int chunks_per_stage(int tile) { return !kFp8Weights && tile <= 32 ? 2 : 1; }
__host__ __device__ constexpr int stage_weights(int tile) { return chunks_per_stage(tile) * tile * kUnitK; }
__host__ __device__ constexpr int stage_scales(int tile) { return stage_weights(tile) + chunks_per_stage(tile) * kRowTileBytes; }
__host__ __device__ constexpr int stage_row_weights(int tile) { return stage_scales(tile) + chunks_per_stage(tile) * tile * 4; }
__host__ __device__ constexpr int stage_block_scales(int tile) { return stage_row_weights(tile) + tile * 4; }
__host__ __device__ constexpr int stage_end(int tile) { return stage_block_scales(tile) + kBlockScaleBytes; }
static_assert(stage_end(8) <= kStageBytes && stage_end(16) <= kStageBytes && stage_end(32) <= kStageBytes && stage_end(64) <= kStageBytes &&
              stage_end(96) <= kStageBytes && stage_end(128) <= kStageBytes);

// The tasks of this CTA in the order it took them, posted by the weight producer for everybody else. Tasks are taken from one counter for the
// whole grid: a task waits only for tasks with smaller numbers, which somebody has taken before, so nothing can wait in a circle.
// A slot is reused kNumTaskSlots tasks later. The service warps are the last to read one, at most two tasks behind the math warps, which are
// at most kNumStages tasks behind the producer.
constexpr int kNumTaskSlots = 16;
static_assert(kNumTaskSlots > kNumStages + 4);
struct TaskSlot {
  int index;       // in the task list; the list's length ends the CTA's work
  int code;        // 2 * token tile + is_l1
  int first_row;   // first packed row of the task in w13_base / w2_base, counted over all local experts
};

class TaskFeed {
 public:
  __device__ TaskFeed(TaskSlot* slots, uint32_t posted) : slots_(slots), posted_(posted) {}

  __device__ void init() const {
    for (int i = 0; i < kNumTaskSlots; ++i) ptx::mbarrier_init(posted_ + 8 * i, 1);
  }
  // Reader: waits for the CTA's next task.
  __device__ __forceinline__ const TaskSlot& next() {
    const int slot = sequence_ % kNumTaskSlots;
    ptx::mbarrier_wait(posted_ + 8 * slot, sequence_ / kNumTaskSlots & 1);
    ++sequence_;
    return slots_[slot];
  }
  // Producer: the slot to fill, then publish it.
  __device__ __forceinline__ TaskSlot& slot() const { return slots_[sequence_ % kNumTaskSlots]; }
  __device__ __forceinline__ void post() {
    ptx::mbarrier_arrive(posted_ + 8 * (sequence_ % kNumTaskSlots));
    ++sequence_;
  }

 private:
  TaskSlot* slots_;
  uint32_t posted_;    // shared address of kNumTaskSlots barriers
  int sequence_ = 0;
};

struct StageCursor {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kNumStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Ring {
  uint32_t stages;         // shared addresses: of the data,
  uint32_t full, empty;    // and of kNumStages barriers each

  __device__ __forceinline__ uint32_t data(int stage) const { return stages + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t full_barrier(int stage) const { return full + 8 * stage; }
  __device__ __forceinline__ uint32_t empty_barrier(int stage) const { return empty + 8 * stage; }
  __device__ void init() const {
    for (int i = 0; i < kNumStages; ++i) {
      ptx::mbarrier_init(full_barrier(i), 2);               // weight producer, activation producer
      ptx::mbarrier_init(empty_barrier(i), kMathWarps);
    }
  }
};

// One thread: takes tasks and streams their weights. The next task is asked for before the current one's weights, which hides the latency.
__device__ inline void produce_weights(const MegaMoeParams& p, const ExpertTable& table, const TaskList& tasks, const Ring& ring, TaskFeed feed,
                                      uint32_t parity) {
  const Shape& s = p.shape;
  uint32_t* counter = p.local<uint32_t>(p.ws.next_task) + parity;
  StageCursor cursor;
  int index = blockIdx.x;   // the first task of every CTA needs no counter
  for (bool more = true; more;) {
    const int next = gridDim.x + atomicAdd(counter, 1);
    TaskSlot& slot = feed.slot();
    more = index < tasks.num_tasks;
    slot.index = min(index, tasks.num_tasks);
    if (more) {
      const Task task = tasks.get(table, p, index);
      const int tile = task.block.tile, per_stage = chunks_per_stage(tile);
      const int num_chunks = (task.is_l1 ? s.hidden : s.intermediate) / kUnitK;
      const int num_row_tiles = task.is_l1 ? 2 * s.num_features_tiles() : s.num_row_tiles();
      const int passes = task.is_l1 ? 2 : 1, first_row_tile = task.block.expert * num_row_tiles + task.tile * passes;
      slot.code = 2 * tile + task.is_l1;
      slot.first_row = first_row_tile * kRowTile;
      feed.post();
      const uint8_t* weights = (task.is_l1 ? p.w13_packed : p.w2_packed) + int64_t{first_row_tile} * num_chunks * kRowTileBytes;
      // L1: both passes over a tile of features take the scales of its gate block and its up block.
      const uint8_t* block_scales = (task.is_l1 ? p.w13_base : p.w2_base) + int64_t{first_row_tile / passes} * num_chunks * kBlockScaleBytes;
      const bool once = table.block_base[task.block.expert + 1] - table.block_base[task.block.expert] == 1;
      const uint64_t policy = once ? ptx::kEvictFirst : ptx::kEvictNormal;
      for (int pass = 0; pass < passes; ++pass) {
        for (int chunk = 0; chunk < num_chunks; chunk += per_stage) {
          const uint32_t num_bytes = min(per_stage, num_chunks - chunk) * kRowTileBytes;
          ptx::mbarrier_wait(ring.empty_barrier(cursor.stage), cursor.phase ^ 1);
          ptx::mbarrier_arrive_expect_tx(ring.full_barrier(cursor.stage), num_bytes + kBlockScaleBytes);
          ptx::bulk_load(ring.data(cursor.stage) + stage_weights(tile), weights, num_bytes, ring.full_barrier(cursor.stage), policy);
          if constexpr (kFp8Weights) {
            ptx::bulk_load(ring.data(cursor.stage) + stage_block_scales(tile), block_scales + chunk * kBlockScaleBytes, kBlockScaleBytes,
                           ring.full_barrier(cursor.stage), ptx::kEvictNormal);
          }
          weights += num_bytes;
          cursor.advance();
        }
      }
    } else {
      feed.post();
    }
    index = next;
  }
}

// One thread: waits until a block's rows (L1) or features (L2) are complete, then streams them beside the weights.
__device__ inline void produce_activations(const MegaMoeParams& p, const ExpertTable& table, const TaskList& tasks, const Ring& ring,
                                           TaskFeed feed, uint32_t parity) {
  const Shape& s = p.shape;
  const uint32_t* x_ready = p.local<uint32_t>(p.ws.x_ready) + parity * s.max_blocks();
  const uint32_t* h_ready = p.local<uint32_t>(p.ws.h_ready) + parity * s.max_blocks();
  StageCursor cursor;
  for (int index = feed.next().index; index < tasks.num_tasks; index = feed.next().index) {
    const Task task = tasks.get(table, p, index);
    const int tile = task.block.tile, row = task.block.row, per_stage = chunks_per_stage(tile);
    const int k = task.is_l1 ? s.hidden : s.intermediate, num_chunks = k / kUnitK;
    const int chunks_per_group = task.is_l1 ? kActGroup / kUnitK : 1, num_groups = ceil_div(num_chunks, chunks_per_group);
    const uint8_t* pool = p.local<uint8_t>(task.is_l1 ? p.ws.pool_x : p.ws.pool_h) + int64_t{row} * k;
    const float* scales = p.local<float>(task.is_l1 ? p.ws.pool_x_scale : p.ws.pool_h_scale) + int64_t{row} * num_groups;
    const uint32_t* ready = (task.is_l1 ? x_ready : h_ready) + task.block.index;
    const uint32_t target = task.is_l1 ? task.block.num_rows : kServiceWarps * s.num_features_tiles();
    ptx::wait_at_least(ready, target);
    ptx::fence_async_global();
    for (int pass = 0; pass < (task.is_l1 ? 2 : 1); ++pass) {
      for (int chunk = 0; chunk < num_chunks; chunk += per_stage) {
        const int num = min(per_stage, num_chunks - chunk);
        const int group = chunk / chunks_per_group, groups = ceil_div(chunk + num, chunks_per_group) - group;
        const uint32_t tile_bytes = num * tile * kUnitK, scale_bytes = groups * tile * 4;
        const uint32_t full = ring.full_barrier(cursor.stage);
        const uint32_t data = ring.data(cursor.stage);
        ptx::mbarrier_wait(ring.empty_barrier(cursor.stage), cursor.phase ^ 1);
        const bool with_weights = !task.is_l1 && chunk + num == num_chunks;
        ptx::mbarrier_arrive_expect_tx(full, tile_bytes + scale_bytes + (with_weights ? tile * 4 : 0));
        ptx::bulk_load(data, pool + int64_t{chunk} * tile * kUnitK, tile_bytes, full, ptx::kEvictNormal);
        ptx::bulk_load(data + stage_scales(tile), scales + int64_t{group} * tile, scale_bytes, full, ptx::kEvictNormal);
        if (with_weights) {
          ptx::bulk_load(data + stage_row_weights(tile), p.local<float>(p.ws.pool_weight) + row, tile * 4, full, ptx::kEvictNormal);
        }
        cursor.advance();
      }
    }
  }
}

}  // namespace hopper_moe
