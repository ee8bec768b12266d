// What the emulator tells Races of: accesses, flags and fences. And the flags themselves.
#include "machine.hpp"

#include <dlfcn.h>
#include <sstream>

namespace emulator {

void Machine::begin_cta(Cta& cta) {
  if (!races()) return;
  const unsigned place = cta.grid.shared_bytes ? cta.index : 0;  // CTAs that run alone are one for this
  cta.first_agent = static_cast<uint32_t>((cta.grid.stream * ctas_per_stream_ + place) * kNumAgents);
  cta.cells = {cta.shared, cta.grid.shared_bytes};
  for (Fiber& fiber : cta.fibers) {
    races_.acquire(cta.agent(fiber), stream_clocks_[cta.grid.stream]);
    fiber.multiplies_begin = races_.now(cta.multiplies_of(fiber));
  }
}

void Machine::access(const void* address, size_t num_bytes, bool is_write, Access by) {
  const Fiber& fiber = *current_;
  Cta& cta = *fiber.cta;
  Cells* cells = global_.has(address) ? &global_ : cta.cells.has(address) ? &cta.cells : nullptr;
  if (!cells) return;
  const Access* other = races_.access(cells->at(address), num_bytes, is_write, by, races_.clock(cta.agent(fiber)));
  if (!other) return;
  std::ostringstream words;
  words << "race: " << (is_write ? "write" : "read") << " of " << num_bytes << " bytes at "
        << (cells == &global_ ? "global" : "shared") << " + " << cells->offset(address) << " by " << who_is(by.agent)
        << " @" << std::hex << by.code << std::dec << ", not ordered behind an access by " << who_is(other->agent)
        << " @" << std::hex << other->code;
  fail(words.str());
}

namespace {

uint32_t offset_of(const void* code) {
  static const char* begin = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&offset_of), &info);
    return static_cast<const char*>(info.dli_fbase);
  }();
  return static_cast<uint32_t>(static_cast<const char*>(code) - begin);
}

}  // namespace

void Machine::on_access(const void* address, size_t num_bytes, bool is_write, const void* code) {
  if (!current_ || !races()) return;
  const uint32_t agent = current_->cta->agent(*current_);
  access(address, num_bytes, is_write, {agent, races_.now(agent), offset_of(code), false, false});
}

std::string Machine::who_is(uint32_t agent) const {
  const uint32_t cta = agent / kNumAgents, place = agent % kNumAgents;
  const std::string where =
      " of CTA " + std::to_string(cta % ctas_per_stream_) + " on stream " + std::to_string(cta / ctas_per_stream_);
  static const char* const kEngines[] = {"the copy engine (load)", "the copy engine (store, reading)",
                                         "the copy engine (store, writing)"};
  if (place < kMaxThreads) return "thread " + std::to_string(place) + where;
  if (place < kMaxThreads + kNumEngines) return kEngines[place - kMaxThreads] + where;
  return "multiplies of warp " + std::to_string(place - kMaxThreads - kNumEngines) + where;
}

namespace {

uint32_t my_agent() { return me().cta->agent(me()); }
int64_t my_gpu() { return me().cta->grid.stream; }

void access_atomically(Races& races, const uint32_t* address, bool is_write) {
  Machine::get().access(address, sizeof *address, is_write, {my_agent(), races.now(my_agent()), 0, true, false});
}

}  // namespace

uint32_t load_acquire(const uint32_t* address, Scope scope) {
  Machine::get().yield();
  if (Races* races = Machine::get().races()) races->acquire_flag(my_agent(), address, scope, my_gpu());
  return load_relaxed(address);
}

uint32_t load_relaxed(const uint32_t* address) {
  if (Races* races = Machine::get().races()) access_atomically(*races, address, false);
  return *address;
}

void store_release(uint32_t* address, uint32_t value, Scope scope) {
  Machine::get().yield();
  if (Races* races = Machine::get().races()) {
    access_atomically(*races, address, true);
    races->release_flag(my_agent(), address, scope, my_gpu());
  }
  *address = value;
}

uint32_t fetch_add(uint32_t* address, uint32_t value, Order order) {
  Machine::get().yield();
  if (Races* races = Machine::get().races()) {
    if (order == Order::kAcquireRelease) races->acquire_flag(my_agent(), address, Scope::kGpu, my_gpu());
    access_atomically(*races, address, true);
    if (order != Order::kRelaxed) races->release_flag(my_agent(), address, Scope::kGpu, my_gpu());
  }
  const uint32_t before = *address;
  *address = before + value;
  return before;
}

void proxy_fence() {
  if (Races* races = Machine::get().races()) races->fence(my_agent());
}

void seen_stores(StoreGroup& group, bool written) {
  Races* races = Machine::get().races();
  if (!races) return;
  const Cta& cta = *me().cta;
  Clock& clock = races->clock(my_agent());
  clock.set(cta.agent(Engine::kStoreRead), group.read_time);
  if (written) clock.set(cta.agent(Engine::kStoreWrite), group.write_time);
}

}  // namespace emulator
