// Shared memory of one CTA.
#pragma once
#include "pipeline.cuh"

namespace hopper_moe {

constexpr int kTilePitch = 272;  // 256 B of a token's row plus 16: consecutive rows start in different banks

struct SharedStorage {
  alignas(1024) uint8_t stages[kNumStages * kStageBytes];
  // BF16 [token][128], written by math and read by the service warps: h of an L1 task's 128 features, or an L2 task's
  // 128 output columns.
  alignas(16) uint8_t tile[kMaxTokenTile * kTilePitch];
  alignas(8) uint64_t tile_full, tile_empty;
  uint64_t task_posted[kNumTaskSlots];
  TaskSlot task_slots[kNumTaskSlots];
  uint32_t launch;
  ExpertTable experts;
};
static_assert(sizeof(SharedStorage) <= 227 * 1024);

// Barriers that hand `tile` over: one completion per task on either.
struct TileBarriers {
  uint32_t full, empty;
  __device__ explicit TileBarriers(SharedStorage& smem)
      : full(ptx::smem_address(&smem.tile_full)), empty(ptx::smem_address(&smem.tile_empty)) {}
  __device__ void init() const {
    ptx::mbarrier_init(full, kMathWarps * 32);
    ptx::mbarrier_init(empty, kServiceWarps);
  }
};

}  // namespace hopper_moe
