// The math warps' product loop alone, with 128 tokens a tile, on every SM: cycles per chunk of 128 rows x 128 tokens x
// 128 k, of which the tensor cores need 512. With and without the copies that feed it, and the copies alone. Built and
// run by product_loop.py.
#include <cstdio>
#include <cstdlib>
#include <vector>

#if HM_WEIGHT_BITS == 8
#include "mainloop_fp8.cuh"
#else
#include "mainloop_fp4.cuh"
#endif

using namespace hopper_moe;

namespace {

constexpr int kTile = 128, kTokenBlocks = 64, kExperts = 4, kThreads = 32 * (kMathWarps + 4);
constexpr int kSharedBytes = kNumStages * kStageBytes;
enum class Parts { kLoop, kLoopAndCopies, kCopies };
enum class Product { kL1, kL1Pairs, kL2 };  // pairs: two token blocks a task

struct Inputs {
  const uint8_t *weights, *tokens;  // FP4 units or E4M3 tiles; E4M3 [block][k / 128][kTile][128]
  const float* scales;
  float* sums;       // so that nothing is optimised away
  uint32_t* cycles;  // of one CTA
};

// Tasks in the kernel's order: neighbouring CTAs share a token block, 12 token blocks in a row an expert.
template <Product kProduct>
struct Task {
  static constexpr bool kL1 = kProduct != Product::kL2;
  static constexpr int kBlocks = kProduct == Product::kL1Pairs ? 2 : 1, kChunks = kL1 ? 32 : 16, kPasses = kL1 ? 2 : 1,
                       kRowTiles = kL1 ? 16 : 32;
  int block, row_tile, expert;
  __device__ explicit Task(int number)
      : block(number / kRowTiles * kBlocks % kTokenBlocks),
        row_tile(number % kRowTiles),
        expert(number / (12 / kBlocks * kRowTiles) % kExperts) {}
};

template <Parts kParts, Product kProduct>
__device__ void produce_weights(const Inputs& in, const Ring& ring, int num_tasks) {
  using T = Task<kProduct>;
  StageCursor cursor(ring);
  for (int i = 0; i < num_tasks; ++i) {
    const T task(i * gridDim.x + blockIdx.x);
    const uint8_t* from =
        in.weights + (int64_t{task.expert} * T::kRowTiles + task.row_tile) * T::kPasses * T::kChunks * kRowTileBytes;
    for (int chunk = 0; chunk < T::kPasses * T::kChunks; ++chunk, from += kRowTileBytes, cursor.advance()) {
      const uint32_t full = cursor.stage().full(), data = cursor.stage().data;
      cursor.wait_empty();
      if constexpr (kParts == Parts::kLoop) {
        ptx::mbarrier_arrive(full);
      } else {
        ptx::mbarrier_arrive_expect_tx(full, kRowTileBytes + kBlockScaleBytes);
        ptx::bulk_load(data + stage_weights(kTile), from, kRowTileBytes, full, ptx::kEvictNormal);
        if constexpr (kFp8Weights)
          ptx::bulk_load(data + stage_block_scales(kTile), in.scales, kBlockScaleBytes, full, ptx::kEvictNormal);
      }
      if constexpr (T::kBlocks == 2) {
        cursor.advance();
        cursor.wait_empty();
        ptx::mbarrier_arrive(cursor.stage().full());
      }
    }
  }
}

template <Parts kParts, Product kProduct>
__device__ void produce_activations(const Inputs& in, const Ring& ring, int num_tasks) {
  using T = Task<kProduct>;
  StageCursor cursor(ring);
  for (int task = 0; task < num_tasks; ++task) {
    const uint8_t* from = in.tokens + int64_t{T(task * gridDim.x + blockIdx.x).block} * T::kChunks * kTile * kUnitK;
    for (int i = 0; i < T::kPasses * T::kChunks * T::kBlocks; ++i, cursor.advance()) {
      const int chunk = i / T::kBlocks, block = i % T::kBlocks;
      const uint32_t full = cursor.stage().full(), data = cursor.stage().data;
      cursor.wait_empty();
      if constexpr (kParts == Parts::kLoop) {
        ptx::mbarrier_arrive(full);
        continue;
      }
      ptx::mbarrier_arrive_expect_tx(full, kTile * kUnitK + kTile * 4);
      ptx::bulk_load(data, from + int64_t{block * T::kChunks + chunk % T::kChunks} * kTile * kUnitK, kTile * kUnitK,
                     full, ptx::kEvictNormal);
      ptx::bulk_load(data + stage_scales(kTile), in.scales + chunk % 64 * kTile, kTile * 4, full, ptx::kEvictNormal);
    }
  }
}

template <Parts kParts, Product kProduct>
__global__ void __launch_bounds__(kThreads, 1) loop_kernel(Inputs in, int num_tasks) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const Ring ring(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kNumStages * kStageBytes / 4;
       i += kThreads) {  // what the loop finds when nothing is copied: no NaN
    reinterpret_cast<uint32_t*>(shared_memory)[i] = (i * 2654435761u) & 0x3F3F3F3Fu;
  }
  __syncthreads();  // the barriers lie in the stages
  if (threadIdx.x == 0) {
    ring.init();
    ptx::fence_mbarrier_init();
  }
  ptx::fence_async_shared();
  __syncthreads();
  if (warp >= kMathWarps) {
    ptx::set_max_registers_down<56>();
    if (lane == 0 && warp == kMathWarps) produce_weights<kParts, kProduct>(in, ring, num_tasks);
    if (lane == 0 && warp == kMathWarps + 1) produce_activations<kParts, kProduct>(in, ring, num_tasks);
    return;
  }
  ptx::set_max_registers_up<224>();
  using T = Task<kProduct>;
  StageCursor cursor(ring);
  const MathThread me{warp / 4, warp % 4, lane};
  float total = 0;
  const uint32_t begin = clock();
  for (int pass = 0; pass < num_tasks * T::kPasses; ++pass) {
    if constexpr (kParts == Parts::kCopies) {
      for (int chunk = 0; chunk < T::kChunks * T::kBlocks; ++chunk, cursor.advance()) {
        cursor.wait_full();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(cursor.stage().empty());
      }
#if HM_WEIGHT_BITS == 4
    } else if constexpr (T::kBlocks == 2) {
      PairLoop::Sums sums;
      PairLoop(cursor, me).run(sums, T::kChunks);
      for (const auto& sum : sums) {
        for (float value : sum) total += value;
      }
#endif
    } else {
      float sum[kTile / 2];
      MainLoop<kTile, T::kL1>(cursor, me).run(sum, T::kChunks, [](auto) {});
      for (float value : sum) total += value;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *in.cycles = clock() - begin;
  in.sums[blockIdx.x * 32 * kMathWarps + threadIdx.x] = total;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    fprintf(stderr, "%s\n", cudaGetErrorString(error));
    exit(1);
  }
}

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* device;
  check(cudaMalloc(&device, values.size() * sizeof(T)));
  check(cudaMemcpy(device, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

// One line: parts, product, cycles per chunk, clock rate. The first launch warms up, the second is timed.
template <Parts kParts, Product kProduct>
void run(const char* name, const Inputs& in, int num_sms) {
  using T = Task<kProduct>;
  constexpr const char* kNames[] = {"L1", "L1-pairs", "L2"};
  const auto kernel = loop_kernel<kParts, kProduct>;
  const int num_tasks = T::kL1 ? 100 : 400, num_chunks = num_tasks * T::kPasses * T::kChunks * T::kBlocks;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  kernel<<<num_sms, kThreads, kSharedBytes>>>(in, num_tasks / 4);
  check(cudaEventRecord(begin));
  kernel<<<num_sms, kThreads, kSharedBytes>>>(in, num_tasks);
  check(cudaEventRecord(end));
  check(cudaDeviceSynchronize());
  float milliseconds;
  uint32_t cycles;
  check(cudaEventElapsedTime(&milliseconds, begin, end));
  check(cudaMemcpy(&cycles, in.cycles, sizeof(cycles), cudaMemcpyDeviceToHost));
  printf("%s %s %.0f %.3f\n", name, kNames[static_cast<int>(kProduct)], static_cast<double>(cycles) / num_chunks,
         cycles / milliseconds * 1e-6);
}

template <Product kProduct>
void run_product(const Inputs& in, int num_sms) {
  run<Parts::kLoop, kProduct>("loop", in, num_sms);
  run<Parts::kLoopAndCopies, kProduct>("loop+copies", in, num_sms);
  run<Parts::kCopies, kProduct>("copies", in, num_sms);
}

}  // namespace

int main() {
  int num_sms;
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  uint32_t state = 7;
  auto random_bytes = [&state](size_t num_bytes,
                               uint8_t mask) {  // xorshift; the mask keeps exponents, and with them power, in range
    std::vector<uint8_t> bytes(num_bytes);
    for (auto& byte : bytes) {
      state ^= state << 13, state ^= state >> 17, state ^= state << 5;
      byte = state & mask;
    }
    return bytes;
  };
  const Inputs in{on_device(random_bytes(size_t{kExperts} * 32 * 32 * kRowTileBytes, 0xB7)),
                  on_device(random_bytes(size_t{kTokenBlocks} * 32 * kTile * kUnitK, 0xB7)),
                  on_device(std::vector<float>(64 * kTile, 1e-3f)),
                  on_device(std::vector<float>(num_sms * 32 * kMathWarps)), on_device(std::vector<uint32_t>(1))};
  run_product<Product::kL1>(in, num_sms);
#if HM_WEIGHT_BITS == 4
  run_product<Product::kL1Pairs>(in, num_sms);
#endif
  run_product<Product::kL2>(in, num_sms);
}
