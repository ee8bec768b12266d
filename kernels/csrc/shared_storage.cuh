// One CTA's shared memory, every region named once.
#pragma once
#include "pipeline.cuh"

namespace hopper_moe {

constexpr int kTransposePitch = 272;   // 256 B of a token's row and 16 more: rows start in different banks

struct SharedStorage {
  alignas(1024) uint8_t stages[kNumStages * kStageBytes];
  // FP32 sums of one pass, row factors applied, on their way from math to the service warps: [math warp][8 tokens][lane], the accumulator fragment of a lane.
  alignas(16) float4 sums[kMathWarps * (kMaxTokenTile / 8) * 32];
  // BF16 h of an L1 task's first pass: [8 tokens][math warp][lane], two tokens a word.
  alignas(16) uint32_t first_pass[(kMaxTokenTile / 8) * kMathWarps * 32];
  alignas(16) uint8_t transpose[kServiceWarps][8 * kTransposePitch];
  // Routing weight and combine slot of every row of an L2 task.
  alignas(16) float row_weight[kServiceWarps][kMaxTokenTile];
  uint32_t row_slot[kServiceWarps][kMaxTokenTile];
  alignas(8) uint64_t full[kNumStages];
  uint64_t empty[kNumStages];
  uint64_t sums_full, sums_empty;
  TaskSlot task_slots[kNumTaskSlots];
  ExpertTable experts;
};
static_assert(sizeof(SharedStorage) <= 227 * 1024);

// Hand-over of `sums`: one completion a pass on either barrier.
struct SumsBarriers {
  uint32_t full, empty;
  __device__ explicit SumsBarriers(SharedStorage& smem) : full(ptx::smem_address(&smem.sums_full)), empty(ptx::smem_address(&smem.sums_empty)) {}
  __device__ void init() const {
    ptx::mbarrier_init(full, kMathWarps);
    ptx::mbarrier_init(empty, kServiceWarps);
  }
};

}  // namespace hopper_moe
