// What the emulator tells Races of: accesses, flags and fences. And the flags themselves.
#include "machine.hpp"

#include <dlfcn.h>
#include <sstream>

namespace emulator {

void Machine::begin_cta(Cta& cta) {
  if (!races()) return;
  const unsigned place = cta.grid.shared_bytes ? cta.index : 0;   // CTAs that run alone are one for this
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
  words << "race: " << (is_write ? "write" : "read") << " of " << num_bytes << " bytes at " << (cells == &global_ ? "global" : "shared") << " + "
        << cells->offset(address) << " by " << who_is(by.agent) << " @" << std::hex << by.code << std::dec << ", not ordered behind an access by "
        << who_is(other->agent) << " @" << std::hex << other->code;
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
  const std::string where = " of CTA " + std::to_string(cta % ctas_per_stream_) + " on stream " + std::to_string(cta / ctas_per_stream_);
  static const char* const kEngines[] = {"the copy engine (load)", "the copy engine (store, reading)", "the copy engine (store, writing)"};
  if (place < kMaxThreads) return "thread " + std::to_string(place) + where;
  if (place < kMaxThreads + kNumEngines) return kEngines[place - kMaxThreads] + where;
  return "multiplies of warp " + std::to_string(place - kMaxThreads - kNumEngines) + where;
}

uint32_t load_acquire(const uint32_t* address, Scope scope) {
  Machine& machine = Machine::get();
  machine.yield();
  if (Races* races = machine.races()) {
    const Fiber& fiber = machine.current();
    const uint32_t agent = fiber.cta->agent(fiber);
    races->acquire_flag(agent, address, scope, fiber.cta->grid.stream);
    machine.access(address, sizeof *address, false, {agent, races->now(agent), 0, true, false});
  }
  return *address;
}

uint32_t load_relaxed(const uint32_t* address) {
  Machine& machine = Machine::get();
  if (Races* races = machine.races()) {
    const uint32_t agent = machine.current().cta->agent(machine.current());
    machine.access(address, sizeof *address, false, {agent, races->now(agent), 0, true, false});
  }
  return *address;
}

void store_release(uint32_t* address, uint32_t value, Scope scope) {
  Machine& machine = Machine::get();
  machine.yield();
  if (Races* races = machine.races()) {
    const Fiber& fiber = machine.current();
    const uint32_t agent = fiber.cta->agent(fiber);
    machine.access(address, sizeof *address, true, {agent, races->now(agent), 0, true, false});
    races->release_flag(agent, address, scope, fiber.cta->grid.stream);
  }
  *address = value;
}

uint32_t fetch_add(uint32_t* address, uint32_t value, Order order) {
  Machine& machine = Machine::get();
  machine.yield();
  if (Races* races = machine.races()) {
    const Fiber& fiber = machine.current();
    const uint32_t agent = fiber.cta->agent(fiber);
    const int64_t gpu = fiber.cta->grid.stream;
    if (order == Order::kAcquireRelease) races->acquire_flag(agent, address, Scope::kGpu, gpu);
    machine.access(address, sizeof *address, true, {agent, races->now(agent), 0, true, false});
    if (order != Order::kRelaxed) races->release_flag(agent, address, Scope::kGpu, gpu);
  }
  const uint32_t before = *address;
  *address = before + value;
  return before;
}

void proxy_fence() {
  Machine& machine = Machine::get();
  if (Races* races = machine.races()) races->fence(machine.current().cta->agent(machine.current()));
}

void seen_stores(StoreGroup& group, bool written) {
  Machine& machine = Machine::get();
  Races* races = machine.races();
  if (!races) return;
  const Cta& cta = *machine.current().cta;
  Clock& clock = races->clock(cta.agent(machine.current()));
  clock.set(cta.agent(Engine::kStoreRead), group.read_time);
  if (written) clock.set(cta.agent(Engine::kStoreWrite), group.write_time);
}

}  // namespace emulator
