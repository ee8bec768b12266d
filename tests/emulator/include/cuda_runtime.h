// CUDA as the kernels and their bindings use it, on the emulated GPU.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "machine.hpp"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#undef __noinline__
#define __noinline__
#define __shared__ static  // see Grid
#define __align__(n) alignas(n)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

template <typename To, typename From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// Every lane's value in every lane; of a lane that is not in the mask, this lane's own.
template <typename T>
T exchange(uint32_t mask, const char* what, T value, int from) {
  struct Mine {
    T value;
    int from;
    T result;
  } mine{value, from, value};
  meet(mask, what, &mine, [](void* const* lanes, uint32_t mask) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto* to = static_cast<Mine*>(lanes[lane]);
      if (to->from >= 0 && to->from < kWarpSize && mask >> to->from & 1)
        to->result = static_cast<Mine*>(lanes[to->from])->value;
    }
  });
  return mine.result;
}

inline uint32_t ballot(uint32_t mask, const char* what, bool predicate) {
  struct Mine {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  meet(mask, what, &mine, [](void* const* lanes, uint32_t mask) {
    uint32_t result = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) result |= static_cast<uint32_t>(static_cast<Mine*>(lanes[lane])->predicate) << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) static_cast<Mine*>(lanes[lane])->result = result;
    }
  });
  return mine.result;
}

}  // namespace emulator

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline uint32_t __ldcg(const uint32_t* address) { return emulator::load_relaxed(address); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from) {
  return emulator::exchange(mask, "__shfl_sync", value, from % emulator::kWarpSize);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by) {
  return emulator::exchange(mask, "__shfl_up_sync", value, emulator::me().lane() - by);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int flip) {
  return emulator::exchange(mask, "__shfl_xor_sync", value, emulator::me().lane() ^ flip);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return emulator::ballot(mask, "__ballot_sync", predicate);
}
inline bool __any_sync(uint32_t mask, bool predicate) { return emulator::ballot(mask, "__any_sync", predicate) != 0; }
inline bool __all_sync(uint32_t mask, bool predicate) {
  return emulator::ballot(mask, "__all_sync", predicate) == mask;
}
inline void __syncwarp(uint32_t mask = ~0u) {
  emulator::meet(mask, "__syncwarp", nullptr, [](void* const*, uint32_t) {}, true);
}
inline void __syncthreads() { emulator::sync_threads(); }
inline void __nanosleep(unsigned) { emulator::Machine::get().sleep("__nanosleep"); }
[[noreturn]] inline void __trap() { emulator::Machine::get().trap(); }
inline void __threadfence_system() {}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emulator::fetch_add(address, value, emulator::Order::kRelaxed);
}
inline unsigned atomicExch(unsigned* address, unsigned value) { return std::exchange(*address, value); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float value) { return emulator::bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return emulator::bits<float>(value); }
inline float __int_as_float(int value) { return emulator::bits<float>(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

// The runtime. A stream is a number.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, size_t) {
  return cudaSuccess;
}
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  emulator::Grid grid;
  grid.num_ctas = config->gridDim.x;
  grid.num_threads = config->blockDim.x;
  grid.shared_bytes = config->dynamicSmemBytes;
  grid.kernel = [kernel, params] { kernel(params); };
  grid.stream = reinterpret_cast<int64_t>(config->stream);
  emulator::Machine::get().launch(std::move(grid));
  return cudaSuccess;
}
