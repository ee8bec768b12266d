// One CTA's shared memory, every region named once.
#pragma once
#include "pipeline.cuh"

namespace hopper_moe {

struct SharedStorage {
  alignas(1024) uint8_t stages[kNumStages * kStageBytes];
  // Epilogue scratch, one use at a time. L1: [N / 4][256] FP32 results of the first half, then the finished [N][128] E4M3 tile that the copy
  // engine stores. L2: per warpgroup the [N][64] BF16 tile (swizzled) on its way to the combine slots.
  alignas(1024) uint8_t scratch[kMaxTokenTile * 256];
  alignas(16) float warp_amax[kMathWarps][kMaxTokenTile];
  alignas(16) float inverse_scale[kMaxTokenTile];
  alignas(16) float h_scale[kMaxTokenTile];
  alignas(16) uint32_t slots[2][kMaxTokenTile];
  alignas(8) uint64_t full[kNumStages];
  uint64_t empty[kNumStages];
  uint64_t tile_full[2], tile_empty[2];   // per warpgroup: its part of `scratch`, written by math, sent on by the service warp of that number
  ExpertTable experts;
};
static_assert(sizeof(SharedStorage) <= 227 * 1024);

}  // namespace hopper_moe
