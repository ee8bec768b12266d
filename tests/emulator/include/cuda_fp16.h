// The little of CUDA's FP16 that the kernels use. FP32 holds it: what they multiply is exact in FP16.
#pragma once
#include <cuda_runtime.h>

struct __half2 {
  float x, y;
};

inline __half2 __float2half2_rn(float value) { return {value, value}; }
