// Host entry points, exported through apache-tvm-ffi with integer arguments. kernels/mega_moe.py has checked all shapes
// and dtypes. Addresses are device pointers.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cmath>

#include "mega_moe.cuh"
#include "pre_dispatch.cuh"

namespace hopper_moe {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(error);
}

// The integers of struct Shape, in its order.
Shape to_shape(const tvm::ffi::Array<int64_t>& v) {
  auto at = [&](int i) { return static_cast<int>(v[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)};
}

// Both kernels begin with griddepcontrol.wait, so a launch may overlap the end of the previous kernel on the stream.
template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int num_blocks, int num_threads, size_t shared_bytes,
            cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, params), "kernel launch");
}

// Byte offsets in the order of the Workspace struct's members, the total last.
tvm::ffi::Array<int64_t> workspace_layout(tvm::ffi::Array<int64_t> shape) {
  const Workspace w(to_shape(shape));
  return {w.epoch,   w.exit_count,   w.gave_up,     w.arrived,       w.results_sent, w.received_count, w.expert_count,
          w.x_ready, w.h_ready,      w.group_done,  w.group_claimed, w.next_task,    w.control_bytes,  w.slot_list,
          w.x,       w.x_exponent,   w.x_scale,     w.topk_ids,      w.topk_weights, w.combine,        w.combine_scale,
          w.pool_x,  w.pool_x_scale, w.pool_weight, w.pool_slot,     w.pool_h,       w.pool_h_scale,   w.num_bytes};
}

void pre_dispatch(tvm::ffi::Array<int64_t> shape, int64_t workspace, int64_t hidden_states, int64_t topk_ids,
                  int64_t topk_weights, int64_t num_valid_tokens, double routed_scaling_factor, int64_t num_tokens,
                  int64_t num_padded_tokens, int64_t expert_begin, int64_t expert_end, int64_t stream) {
  if (num_padded_tokens == 0) return;
  const Shape s = to_shape(shape);
  const PreDispatchParams params{s,
                                 Workspace(s),
                                 reinterpret_cast<const uint16_t*>(hidden_states),
                                 reinterpret_cast<const int*>(topk_ids),
                                 reinterpret_cast<const float*>(topk_weights),
                                 reinterpret_cast<const int*>(num_valid_tokens),
                                 static_cast<float>(routed_scaling_factor),
                                 static_cast<int>(num_tokens),
                                 static_cast<int>(num_padded_tokens),
                                 static_cast<int>(expert_begin),
                                 static_cast<int>(expert_end),
                                 reinterpret_cast<uint8_t*>(workspace)};
  launch(pre_dispatch_kernel, params, static_cast<int>(num_padded_tokens), kPreDispatchThreads, 0,
         reinterpret_cast<cudaStream_t>(stream));
}

// tile_table: max_tile, pair_from, tail_tile[0..16]. rank_bases: workspaces of all ranks. failure: a PeerFailure in
// pinned host memory.
void mega_moe(tvm::ffi::Array<int64_t> shape, tvm::ffi::Array<int64_t> rank_bases, tvm::ffi::Array<int64_t> tile_table,
              int64_t w13_packed, int64_t w13_base, int64_t w2_packed, int64_t w2_base, int64_t y, double swiglu_limit,
              int64_t num_tokens, int64_t layer, int64_t timeout_ns, int64_t failure, int64_t num_sms, int64_t stream) {
  const Shape s = to_shape(shape);
  MegaMoeParams params{s,
                       Workspace(s),
                       {},
                       static_cast<float>(swiglu_limit),
                       static_cast<int>(num_tokens),
                       reinterpret_cast<const uint8_t*>(w13_packed),
                       reinterpret_cast<const uint8_t*>(w13_base),
                       reinterpret_cast<const uint8_t*>(w2_packed),
                       reinterpret_cast<const uint8_t*>(w2_base),
                       reinterpret_cast<uint16_t*>(y),
                       {},
                       static_cast<int>(layer),
                       static_cast<uint64_t>(timeout_ns),
                       reinterpret_cast<PeerFailure*>(failure)};
  params.tiles.max_tile = static_cast<int>(tile_table[0]);
  params.tiles.pair_from = static_cast<int>(tile_table[1]);
  for (int i = 0; i <= kMaxTokenTile / 8; ++i) params.tiles.tail_tile[i] = static_cast<uint8_t>(tile_table[2 + i]);
  for (int rank = 0; rank < s.num_ranks; ++rank) params.rank_base[rank] = reinterpret_cast<uint8_t*>(rank_bases[rank]);
  const auto kernel = s.fp8_combine ? mega_moe_kernel<true> : mega_moe_kernel<false>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SharedStorage)),
        "shared memory of mega_moe");
  launch(kernel, params, static_cast<int>(num_sms), kNumThreads, sizeof(SharedStorage),
         reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace hopper_moe

TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_layout, hopper_moe::workspace_layout);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pre_dispatch, hopper_moe::pre_dispatch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mega_moe, hopper_moe::mega_moe);
