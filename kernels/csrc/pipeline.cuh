// The ring of stages that carries weights and activations from the two producer warps to the two math warpgroups.
//
// Happens-before of one stage: math (all reads done) --arrive empty--> both producers --copy engine + arrive.expect_tx
// full--> math. Weights and activations of a stage arrive on the same barrier but are issued by different warps:
// weights have no dependency and run ahead by the whole ring; activations wait for their rows.
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

// Content of one stage for token tile N, in chunks of 128 k: activations (first, because their swizzle needs 1024-byte
// alignment), weights, activation scales (L2), factors of the rows (last stage of a pass; scales of x in L1, routing
// weights in L2), scales of the weight block (FP8). A chunk of a pair takes two stages, the second without weights.
__host__ __device__ constexpr int chunks_per_stage(int tile) { return !kFp8Weights && tile <= 32 ? 2 : 1; }
__host__ __device__ constexpr int stage_weights(int tile) { return chunks_per_stage(tile) * tile * kUnitK; }
__host__ __device__ constexpr int stage_scales(int tile) {
  return stage_weights(tile) + chunks_per_stage(tile) * kRowTileBytes;
}
__host__ __device__ constexpr int stage_row_factors(int tile) {
  return stage_scales(tile) + chunks_per_stage(tile) * tile * 4;
}
__host__ __device__ constexpr int stage_block_scales(int tile) { return stage_row_factors(tile) + tile * 4; }
__host__ __device__ constexpr int stage_end(int tile) { return stage_block_scales(tile) + kBlockScaleBytes; }
constexpr int kStageData = kStageBytes - 16;  // the barriers of the stage follow
static_assert(stage_end(8) <= kStageData && stage_end(16) <= kStageData && stage_end(32) <= kStageData &&
              stage_end(64) <= kStageData && stage_end(96) <= kStageData && stage_end(128) <= kStageData);

// The tasks of this CTA in the order in which it took them, posted by the weight producer for all other warps.
//
// Tasks are taken from one counter for the whole grid. A task waits only for tasks with smaller numbers, which have all
// been taken: L2 tasks of a wave for its L1 tasks, L1 tasks for the previous wave. So there is no cycle of waits. The
// math warps hold a task's result back until the first products of the next task run (a pair's second block: until its
// first pass is over), but only if the next task is of the same kind and wave; so a task that others wait for is never
// held back by its own dependants.
//
// A slot is reused kNumTaskSlots tasks later. The service warps read it last, at most three tasks behind the math
// warps, which are at most kNumStages tasks behind the producer.
constexpr int kNumTaskSlots = 16;
static_assert(kNumTaskSlots > kNumStages + 5);
constexpr int kTaskKinds = 1024;
struct TaskSlot {
  int index;      // in the task list; an index equal to the list's length ends the CTA's work
  int code;       // kTaskKinds * wave + 2 * (token tile, twice for a pair) + is_l1; 0 ends the CTA's work
  int first_row;  // first packed row of the task in w13_base / w2_base, counted over all local experts
};

class TaskFeed {
 public:
  __device__ TaskFeed(TaskSlot* slots, uint32_t posted) : slots_(slots), posted_(posted) {}

  __device__ void init() const {
    for (int i = 0; i < kNumTaskSlots; ++i) ptx::mbarrier_init(posted_ + 8 * i, 1);
  }
  // Reader: waits for the next task of the CTA.
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
  uint32_t posted_;  // shared address of kNumTaskSlots barriers
  int sequence_ = 0;
};

// One stage, identified by its shared address. Its barriers are its last 16 bytes, so the address is all that a reader
// needs, and product loops compute no addresses from stage numbers.
struct Stage {
  uint32_t data;

  __device__ __forceinline__ uint32_t full() const { return data + kStageData; }
  __device__ __forceinline__ uint32_t empty() const { return data + kStageData + 8; }
};

struct Ring {
  uint32_t begin, last;  // shared addresses

  __device__ explicit Ring(const void* stages)
      : begin(ptx::smem_address(stages)), last(begin + (kNumStages - 1) * kStageBytes) {}
  __device__ void init() const {
    for (Stage stage{begin}; stage.data <= last; stage.data += kStageBytes) {
      ptx::mbarrier_init(stage.full(), 2);  // weight producer, activation producer
      ptx::mbarrier_init(stage.empty(), kMathWarps);
    }
  }
};

// A reader's or a writer's position in the ring.
class StageCursor {
 public:
  __device__ explicit StageCursor(const Ring& ring) : ring_(ring), stage_{ring.begin} {}

  __device__ __forceinline__ Stage stage() const { return stage_; }
  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait(stage_.full(), phase_); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait(stage_.empty(), phase_ ^ 1); }
  __device__ __forceinline__ void advance() {
    const bool wraps = stage_.data == ring_.last;
    stage_.data += wraps ? -(kNumStages - 1) * kStageBytes : kStageBytes;
    phase_ ^= wraps;
  }

 private:
  const Ring& ring_;
  Stage stage_;
  uint32_t phase_ = 0;
};

// One thread: takes tasks and streams their weights. It requests the next task before it streams the weights of the
// current one, which hides the latency of the counter.
__device__ inline void produce_weights(const MegaMoeParams& p, const ExpertTable& table, const TaskList& tasks,
                                       const Ring& ring, TaskFeed feed, uint32_t launch) {
  const Shape& s = p.shape;
  uint32_t* counter = p.counters(p.ws.next_task, 1, launch);
  StageCursor cursor(ring);
  int index = blockIdx.x;  // the first task of a CTA needs no counter
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
      slot.code = kTaskKinds * task.wave + 2 * (tile << task.is_pair) + task.is_l1;
      slot.first_row = first_row_tile * kRowTile;
      feed.post();
      const uint8_t* weights =
          (task.is_l1 ? p.w13_packed : p.w2_packed) + int64_t{first_row_tile} * num_chunks * kRowTileBytes;
      // L1: both passes over a tile of features use the scales of its gate block and its up block.
      const uint8_t* block_scales =
          (task.is_l1 ? p.w13_base : p.w2_base) + int64_t{first_row_tile / passes} * num_chunks * kBlockScaleBytes;
      const bool once = table.block_base[task.block.expert + 1] - table.block_base[task.block.expert] == 1;
      const uint64_t policy = once ? ptx::kEvictFirst : ptx::kEvictNormal;
      for (int pass = 0; pass < passes; ++pass) {
        for (int chunk = 0; chunk < num_chunks; chunk += per_stage) {
          const uint32_t num_bytes = min(per_stage, num_chunks - chunk) * kRowTileBytes;
          const Stage stage = cursor.stage();
          cursor.wait_empty();
          ptx::mbarrier_arrive_expect_tx(stage.full(), num_bytes + kBlockScaleBytes);
          ptx::bulk_load(stage.data + stage_weights(tile), weights, num_bytes, stage.full(), policy);
          if constexpr (kFp8Weights) {
            ptx::bulk_load(stage.data + stage_block_scales(tile), block_scales + chunk * kBlockScaleBytes,
                           kBlockScaleBytes, stage.full(), ptx::kEvictNormal);
          }
          weights += num_bytes;
          cursor.advance();
          if (task.is_pair) {
            cursor.wait_empty();
            ptx::mbarrier_arrive(cursor.stage().full());
            cursor.advance();
          }
        }
      }
    } else {
      slot.code = 0;
      feed.post();
    }
    index = next;
  }
}

// One thread: waits until the rows (L1) or the features (L2) of a block are complete, then streams them.
__device__ inline void produce_activations(const MegaMoeParams& p, const ExpertTable& table, const TaskList& tasks,
                                           const Ring& ring, TaskFeed feed, uint32_t launch) {
  const Shape& s = p.shape;
  StageCursor cursor(ring);
  for (int index = feed.next().index; index < tasks.num_tasks; index = feed.next().index) {
    const Task task = tasks.get(table, p, index);
    const int tile = task.block.tile, row = task.block.row, per_stage = chunks_per_stage(tile);
    const int k = task.is_l1 ? s.hidden : s.intermediate, num_chunks = k / kUnitK;
    const uint8_t* pool = p.local<uint8_t>(task.is_l1 ? p.ws.pool_x : p.ws.pool_h) + int64_t{row} * k;
    const float* scales = p.local<float>(p.ws.pool_h_scale) + int64_t{row} * num_chunks;  // of L2
    const float* row_factors = p.local<float>(task.is_l1 ? p.ws.pool_x_scale : p.ws.pool_weight) + row;
    const uint32_t* ready = (task.is_l1 ? p.x_ready(launch) : p.h_ready(launch)) + task.block.index;
    ptx::wait_at_least(ready, task.is_l1 ? task.block.num_rows : kServiceWarps * s.num_features_tiles());
    if (task.is_pair) ptx::wait_at_least(ready + 1, token_block(table, p, task.block.index + 1).num_rows);
    ptx::fence_async_global();
    for (int pass = 0; pass < (task.is_l1 ? 2 : 1); ++pass) {
      for (int chunk = 0; chunk < num_chunks; chunk += per_stage) {
        const int num = min(per_stage, num_chunks - chunk);
        const uint32_t tile_bytes = num * tile * kUnitK, scale_bytes = task.is_l1 ? 0 : num * tile * 4;
        const uint32_t factor_bytes = chunk + num == num_chunks ? tile * 4 : 0;
        for (int part = 0; part <= task.is_pair; ++part) {
          const Stage stage = cursor.stage();
          cursor.wait_empty();
          ptx::mbarrier_arrive_expect_tx(stage.full(), tile_bytes + scale_bytes + factor_bytes);
          ptx::bulk_load(stage.data, pool + (int64_t{part} * k + chunk * kUnitK) * tile, tile_bytes, stage.full(),
                         ptx::kEvictNormal);
          if (scale_bytes)
            ptx::bulk_load(stage.data + stage_scales(tile), scales + chunk * tile, scale_bytes, stage.full(),
                           ptx::kEvictNormal);
          if (factor_bytes) {
            ptx::bulk_load(stage.data + stage_row_factors(tile), row_factors + part * tile, factor_bytes, stage.full(),
                           ptx::kEvictNormal);
          }
          cursor.advance();
        }
      }
    }
  }
}

}  // namespace hopper_moe
