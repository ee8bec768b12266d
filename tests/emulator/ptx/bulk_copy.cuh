// csrc/ptx/bulk_copy.cuh on the emulated GPU.
#pragma once
#include <cuda_runtime.h>

namespace hopper_moe::ptx {

constexpr uint64_t kEvictFirst = 0, kEvictNormal = 0;

inline void bulk_load(uint32_t smem, const void* global, uint32_t num_bytes, uint32_t barrier, uint64_t) {
  auto* source = static_cast<uint8_t*>(const_cast<void*>(global));
  emulator::Machine::get().start({emulator::me().cta, source, smem, num_bytes, barrier, nullptr, {}});
}

inline void bulk_store(void* global, uint32_t smem, uint32_t num_bytes) {
  const auto& group = emulator::me().open_stores;
  ++group->unread;
  ++group->unwritten;
  emulator::Machine::get().start({emulator::me().cta, static_cast<uint8_t*>(global), smem, num_bytes, 0, group, {}});
}
inline void bulk_commit() {
  emulator::me().stores.push_back(std::exchange(emulator::me().open_stores, std::make_shared<emulator::StoreGroup>()));
}
template <int kPending>
void bulk_wait_read() {
  auto& groups = emulator::me().stores;
  for (int i = 0; i < static_cast<int>(groups.size()) - kPending; ++i) {
    while (groups[i]->unread > 0) emulator::Machine::get().sleep("bulk_wait_read");
    emulator::seen_stores(*groups[i], false);
  }
}
template <int kPending>
void bulk_wait() {
  auto& groups = emulator::me().stores;
  for (; static_cast<int>(groups.size()) > kPending; groups.erase(groups.begin())) {
    while (groups.front()->unwritten > 0) emulator::Machine::get().sleep("bulk_wait");
    emulator::seen_stores(*groups.front(), true);
  }
}

}  // namespace hopper_moe::ptx
