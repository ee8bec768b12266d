// Asynchronous warpgroup MMA, E4M3 x E4M3 -> FP32, A from registers or shared memory, B from shared memory (PTX ISA:
// "wgmma.mma_async"); with wide scales A from registers is E5M2. d[64 x N] (+)= A[64 x 32] * B[N x 32]^T. Fragment of
// A: {row, row + 8} x {k, k + 16} words of 4 values, row = lane / 4 of each warp's 16 rows. d[4 * i + {0, 1}] = (row,
// token 8 * i + 2 * (lane % 4) + {0, 1}), d[4 * i + {2, 3}] = the same tokens of row + 8.
#pragma once
#include <cstdint>

namespace hopper_moe::ptx {

// Orders register accesses before the following wgmma of this warpgroup.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups are in flight: accumulators, A registers and memory operands of older groups may
// be accessed again.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of k32 number `step` in a K-major tile of 128 k with 128-byte swizzle: 8-row atoms of 1024 bytes, 1024
// bytes apart.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem, int step) {
  constexpr uint32_t kHigh = 1u << 30 | 1024 >> 4;
  return uint64_t{kHigh} << 32 | ((smem >> 4) + (1u << 16) + 2 * step);  // smem < 2**18
}

// An instruction names its accumulators one by one and then its operands by the following numbers, so the functions of
// every N are generated from one list. NUM_D accumulators; I0 .. I4 are the numbers NUM_D .. NUM_D + 4. `wgmma_begin`
// starts a sum and only writes it ("="), `wgmma` adds to one ("+"). With one function for both, sums that do not exist
// yet would also be read; the compiler then copies accumulators in flight to keep them apart, which serialises
// everything (C7514).
#if HM_WIDE_SCALES
#define HM_REGISTERS "e5m2"
#else
#define HM_REGISTERS "e4m3"
#endif
// clang-format off: a table
#define HM_OPERANDS_4 "%0, %1, %2, %3"
#define HM_OPERANDS_8 HM_OPERANDS_4 ", " "%4, %5, %6, %7"
#define HM_OPERANDS_16 HM_OPERANDS_8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define HM_OPERANDS_32 HM_OPERANDS_16 ", " "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HM_OPERANDS_48 HM_OPERANDS_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define HM_OPERANDS_64 HM_OPERANDS_48 ", " "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HM_SUMS_4(C, i) C "f"(d[i]), C "f"(d[i + 1]), C "f"(d[i + 2]), C "f"(d[i + 3])
#define HM_SUMS_8(C, i) HM_SUMS_4(C, i), HM_SUMS_4(C, i + 4)
#define HM_SUMS_16(C, i) HM_SUMS_8(C, i), HM_SUMS_8(C, i + 8)
#define HM_SUMS_32(C, i) HM_SUMS_16(C, i), HM_SUMS_16(C, i + 16)
#define HM_SUMS_48(C, i) HM_SUMS_32(C, i), HM_SUMS_16(C, i + 32)
#define HM_SUMS_64(C, i) HM_SUMS_32(C, i), HM_SUMS_32(C, i + 32)
#define HM_WGMMA_ONE(NAME, C, ADDS, N, NUM_D, I0, I1, I2, I3, I4)                                                                      \
  /* A: four registers. */                                                                                                             \
  __device__ __forceinline__ void NAME(float (&d)[NUM_D], const uint32_t* a, uint64_t b) {                                             \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." HM_REGISTERS ".e4m3 {"    \
                 HM_OPERANDS_##NUM_D "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1; }"                               \
                 : HM_SUMS_##NUM_D(C, 0)                                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                \
  }                                                                                                                                    \
  /* A: the descriptor of a tile. */                                                                                                   \
  __device__ __forceinline__ void NAME(float (&d)[NUM_D], uint64_t a, uint64_t b) {                                                    \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {"              \
                 HM_OPERANDS_##NUM_D "}, %" #I0 ", %" #I1 ", p, 1, 1; }"                                                               \
                 : HM_SUMS_##NUM_D(C, 0)                                                                                               \
                 : "l"(a), "l"(b));                                                                                                    \
  }
#define HM_WGMMA(...) HM_WGMMA_ONE(wgmma_begin, "=", "0", __VA_ARGS__) HM_WGMMA_ONE(wgmma, "+", "1", __VA_ARGS__)

HM_WGMMA(8, 4, 4, 5, 6, 7, 8)
HM_WGMMA(16, 8, 8, 9, 10, 11, 12)
HM_WGMMA(32, 16, 16, 17, 18, 19, 20)
HM_WGMMA(64, 32, 32, 33, 34, 35, 36)
HM_WGMMA(96, 48, 48, 49, 50, 51, 52)
HM_WGMMA(128, 64, 64, 65, 66, 67, 68)
// clang-format on

#undef HM_REGISTERS
#undef HM_WGMMA
#undef HM_WGMMA_ONE
#undef HM_SUMS_64
#undef HM_SUMS_48
#undef HM_SUMS_32
#undef HM_SUMS_16
#undef HM_SUMS_8
#undef HM_SUMS_4
#undef HM_OPERANDS_64
#undef HM_OPERANDS_48
#undef HM_OPERANDS_32
#undef HM_OPERANDS_16
#undef HM_OPERANDS_8
#undef HM_OPERANDS_4

}  // namespace hopper_moe::ptx
