// The copy engine.
#include "machine.hpp"

#include <cstring>

namespace emulator {

void Machine::start(Copy copy) {
  if (copy.num_bytes % 16 || copy.shared % 16 || reinterpret_cast<uintptr_t>(copy.global) % 16)
    fail("a bulk copy that is not of aligned 16 bytes");
  const uint8_t* shared = copy.cta->at(copy.shared, copy.num_bytes);
  if (races()) {
    const auto begin = [&](Engine engine) {
      const uint32_t agent = copy.cta->agent(engine);
      return Access{agent, races_.tick(agent), 0, false, true};
    };
    if (copy.group) {
      const Access reading = begin(Engine::kStoreRead), writing = begin(Engine::kStoreWrite);
      access(shared, copy.num_bytes, false, reading);
      access(copy.global, copy.num_bytes, true, writing);
      copy.group->read_time = reading.time;
      copy.group->write_time = writing.time;
    } else {
      const Access loading = begin(Engine::kLoad);
      access(copy.global, copy.num_bytes, false, loading);
      access(shared, copy.num_bytes, true, loading);
      copy.load_time = loading.time;
    }
  }
  ++copy.cta->num_copies;
  copies_.push_back(std::move(copy));
}

void Machine::do_copy(size_t index) {
  Copy& copy = copies_[index];
  uint8_t* shared = copy.cta->at(copy.shared, copy.num_bytes);
  if (copy.group && copy.read.empty()) {
    copy.read.assign(shared, shared + copy.num_bytes);
    --copy.group->unread;
    return;
  }
  if (copy.group) {
    std::memcpy(copy.global, copy.read.data(), copy.num_bytes);
    --copy.group->unwritten;
  } else {
    std::memcpy(shared, copy.global, copy.num_bytes);
    if (races()) copy.cta->barrier_clocks[copy.barrier].gathered.set(copy.cta->agent(Engine::kLoad), copy.load_time);
    barrier_complete_bytes(*copy.cta, copy.barrier, copy.num_bytes);
  }
  --copy.cta->num_copies;
  if (index + 1 < copies_.size()) copies_[index] = std::move(copies_.back());
  copies_.pop_back();
}

}  // namespace emulator
