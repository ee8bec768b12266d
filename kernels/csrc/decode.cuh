// Decodes packed E2M1 nibbles to E4M3 or E5M2 WGMMA fragments in registers, with the block scale in the exponent.
#pragma once
#include "layout.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/memory.cuh"

namespace hopper_moe {

// Bytes of the E2M1 magnitudes 0 .5 1 1.5 | 2 3 4 6, times 2**(delta - kBaseShift), sign bits clear.
struct Magnitudes {
  uint32_t low, high;
};

// E4M3, delta 0 .. 11: .5 * 2**-5 = 2**-6 is the smallest normal number (0x08). Each delta adds 1 to the exponent field
// of every byte except zero's.
template <bool kE5m2>
__device__ __forceinline__ Magnitudes magnitudes(uint32_t delta) {
  static_assert(HM_BASE_SHIFT == 5, "the tables are written for it");
  return {0x14100800u + delta * 0x08080800u, 0x24201C18u + delta * 0x08080808u};
}

// E5M2, delta 0 .. 28: 2 * 2**-15 is the smallest normal number (0x04), so the upper four magnitudes are always normal.
// The lower four are normal from delta 2 on: 0x00 04 08 0A at delta 2, plus 4 per delta. Below they are subnormal and
// proportional to 2**delta: 0x00 01 02 03 times 1 and 2. As a word, each progression is the larger of the two in its
// own range.
template <>
__device__ __forceinline__ Magnitudes magnitudes<true>(uint32_t delta) {
  static_assert(HM_WIDE_BASE_SHIFT == 15, "the tables are written for it");
  const uint32_t normal = 0x01FFFC00u + delta * 0x04040400u, subnormal = (delta + 1) * 0x03020100u;
  return {normal > subnormal ? normal : subnormal, 0x0A080604u + delta * 0x04040404u};
}

// Eight consecutive k of one row (contract section 3): the first four and the second four.
__device__ __forceinline__ void decode_word(uint32_t word, uint32_t low, uint32_t high, uint32_t& first,
                                            uint32_t& second) {
  const uint32_t magnitude = word & 0x77777777u;
  first = ptx::prmt(low, high, magnitude) | (word & 0x80808080u);
  second = ptx::prmt(low, high, magnitude >> 16) | ((word << 4) & 0x80808080u);
}

// Decodes one 64 x 128 unit at a shared address to the A fragments of its four k32 WGMMAs (a[4 * step + register]).
// Rows r and r + 8 of a warp's 16 rows belong to lanes 4 r .. 4 r + 3. Lane q of these holds the 32 k of block q of a
// row, eight per step (wgmma_position), which need one delta and one table.
__device__ __forceinline__ void decode_unit(uint32_t (&a)[16], uint32_t unit, int warp, int lane) {
  const uint32_t words = unit + warp * 1024 + lane * 16, deltas = unit + warp * 64 + lane;
  const uint4 block[2] = {ptx::load_shared_v4<0>(words), ptx::load_shared_v4<512>(words)};
  const uint32_t delta[2] = {ptx::load_shared_u8<kUnitNibbleBytes>(deltas),
                             ptx::load_shared_u8<kUnitNibbleBytes + 32>(deltas)};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto [low, high] = magnitudes<kWideScales>(delta[r]);
    const uint32_t word[4] = {block[r].x, block[r].y, block[r].z, block[r].w};
#pragma unroll
    for (int step = 0; step < 4; ++step) decode_word(word[step], low, high, a[4 * step + r], a[4 * step + 2 + r]);
  }
}

// 2**(base + kBaseShift - 127) of a thread's rows r and r + 8: the factor that decode_unit omits. Applied once per row
// to the FP32 sum.
class RowScales {
 public:
  __device__ __forceinline__ explicit RowScales(const uint8_t* base) : low_(__ldg(base)), high_(__ldg(base + 8)) {}
  __device__ __forceinline__ float low() const { return value(low_); }
  __device__ __forceinline__ float high() const { return value(high_); }

 private:
  __device__ __forceinline__ static float value(uint8_t base) {
    return __uint_as_float((uint32_t{base} + kBaseShift) << 23);
  }
  uint8_t low_, high_;
};

}  // namespace hopper_moe
