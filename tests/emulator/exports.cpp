// What tests say to the emulated GPU beside the kernels' own entry points.
#include <tvm/ffi/function.h>

#include "machine.hpp"

namespace {

void delay(int64_t stream, int64_t num_steps) {
  emulator::Machine::get().delay(stream, static_cast<uint64_t>(num_steps));
}

void look_for_races(int64_t global, int64_t num_bytes) {
  emulator::Machine::get().look_for_races(reinterpret_cast<const uint8_t*>(global), static_cast<size_t>(num_bytes));
}

tvm::ffi::String run(int64_t seed, int64_t max_steps) {
  return emulator::Machine::get().run(static_cast<uint64_t>(seed), static_cast<uint64_t>(max_steps));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(delay, delay);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(look_for_races, look_for_races);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
