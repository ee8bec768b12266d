// One CTA's shared memory, every region named once.
#pragma once
#include "pipeline.cuh"

namespace hopper_moe {

constexpr int kTilePitch = 272;   // 256 B of a token's row and 16 more: consecutive rows start in different banks

struct SharedStorage {
  alignas(1024) uint8_t stages[kNumStages * kStageBytes];
  // BF16 [token][128] on its way from math to the service warps: h of an L1 task's 128 features, or an L2 task's 128 output columns.
  alignas(16) uint8_t tile[kMaxTokenTile * kTilePitch];
  alignas(8) uint64_t tile_full, tile_empty;
  uint64_t task_posted[kNumTaskSlots];
  TaskSlot task_slots[kNumTaskSlots];
  uint32_t launch;
  ExpertTable experts;
};
static_assert(sizeof(SharedStorage) <= 227 * 1024);

// Hand-over of `tile`: one completion a task on either barrier.
struct TileBarriers {
  uint32_t full, empty;
  __device__ explicit TileBarriers(SharedStorage& smem) : full(ptx::smem_address(&smem.tile_full)), empty(ptx::smem_address(&smem.tile_empty)) {}
  __device__ void init() const {
    ptx::mbarrier_init(full, kMathWarps * 32);
    ptx::mbarrier_init(empty, kServiceWarps);
  }
};

}  // namespace hopper_moe
