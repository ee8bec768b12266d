#include "machine.hpp"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr uint64_t kStackCanary = 0x5ca1ab1e0ddba11ull;   // at the end that a stack grows to
constexpr int kStepsBetweenStarts = 64;
constexpr int kSleepSteps = 64;   // one of so many steps wakes somebody who sleeps
constexpr int kSlowStreams = 8;   // a thread of a slow stream is passed over so often
constexpr uint32_t kCopyPaces[] = {1, 8, 64};   // a copy's turn comes so much more rarely than a thread's

// Stacks of whole CTAs, used again.
std::map<size_t, std::vector<char*>> free_stacks;

char* take_stacks(size_t num_threads) {
  auto& free = free_stacks[num_threads];
  char* stacks;
  if (free.empty()) {
    void* memory = mmap(nullptr, num_threads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a CTA");
    stacks = static_cast<char*>(memory);
  } else {
    stacks = free.back();
    free.pop_back();
  }
  for (size_t i = 0; i < num_threads; ++i) std::memcpy(stacks + i * kStackBytes, &kStackCanary, sizeof kStackCanary);
  return stacks;
}

bool overflowed(const char* stack) { return std::memcmp(stack, &kStackCanary, sizeof kStackCanary) != 0; }

}  // namespace

Cta::Cta(Grid& grid, unsigned index, Pool& pool)
    : grid(grid), index(index), allocation(grid.shared_bytes + 1024, 0xFF), fibers(grid.num_threads), warps(grid.num_threads / kWarpSize),
      warpgroups((grid.num_threads + kWarpgroupSize - 1) / kWarpgroupSize), num_running(grid.num_threads), stacks(take_stacks(grid.num_threads)) {
  shared = allocation.data() + (1024 - reinterpret_cast<uintptr_t>(allocation.data()) % 1024) % 1024;
  for (unsigned i = 0; i < grid.num_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.cta = this;
    fiber.pool = &pool;
    fiber.thread = static_cast<int>(i);
    fiber.stack = stacks + i * kStackBytes;
    pool.ready.push_back(&fiber);
  }
  Machine::get().begin_cta(*this);
}

Cta::~Cta() { free_stacks[fibers.size()].push_back(stacks); }

uint8_t* Cta::at(uint32_t address, size_t num_bytes) const {
  if (address < kSharedBegin || address - kSharedBegin + num_bytes > grid.shared_bytes) Machine::get().fail("access outside of shared memory");
  return shared + (address - kSharedBegin);
}

uint32_t shared_address(const void* pointer) {
  const Cta& cta = *Machine::get().current().cta;
  const auto offset = static_cast<const uint8_t*>(pointer) - cta.shared;
  if (offset < 0 || static_cast<size_t>(offset) >= cta.grid.shared_bytes) Machine::get().fail("not an address in shared memory");
  return kSharedBegin + static_cast<uint32_t>(offset);
}

// ---- who runs when ----

Machine& Machine::get() {
  static Machine machine;
  return machine;
}

void Machine::launch(Grid grid) { streams_[grid.stream].push_back({std::make_unique<Grid>(std::move(grid))}); }

void Machine::delay(int64_t stream, uint64_t num_steps) { streams_[stream].push_back({nullptr, num_steps}); }

std::string Machine::run(uint64_t seed, uint64_t max_steps) {
  random_.seed(seed);
  copy_pace_ = kCopyPaces[random(std::size(kCopyPaces))];
  for (auto& stream : streams_) {
    const bool slow = random(3) == 0;
    for (Work& work : stream.second) {
      if (work.grid) work.grid->slow = slow;
    }
  }
  error_.clear();
  num_steps_ = 0;
  max_steps_ = max_steps;
  global_ = {tracked_, num_tracked_};
  stream_clocks_.clear();
  ctas_per_stream_ = 1;
  int64_t last_stream = 0;
  for (const auto& [stream, queue] : streams_) {
    last_stream = stream;
    for (const Work& work : queue) {
      if (work.grid && work.grid->shared_bytes) ctas_per_stream_ = std::max(ctas_per_stream_, work.grid->num_ctas);
    }
  }
  races_ = Races(num_tracked_ ? (last_stream + 1) * ctas_per_stream_ * kNumAgents : 0);
  try {
    for (uint64_t turn = 0; error_.empty(); ++turn) {
      if (turn % kStepsBetweenStarts == 0) start_work();
      if (streams_.empty()) break;
      if (step(pool_)) continue;
      start_work();
      const bool stuck = std::all_of(streams_.begin(), streams_.end(), [](const auto& stream) {
        const Work& work = stream.second.front();
        return work.started && work.grid && work.grid->num_running > 0;
      });
      if (stuck && !streams_.empty() && pool_.ready.empty()) fail("everybody waits: " + who_waits());
    }
  } catch (const std::runtime_error& error) {
    error_ = error.what();
  }
  copies_.clear();
  pool_ = {};
  streams_.clear();
  return error_;
}

// The next piece of work of every stream whose last is done, half of the time.
void Machine::start_work() {
  for (auto it = streams_.begin(); it != streams_.end();) {
    auto& queue = it->second;
    if (!queue.empty() && queue.front().started) {
      const Work& work = queue.front();
      if (work.grid ? work.grid->num_running == 0 : num_steps_ >= work.num_steps) queue.pop_front();
    }
    if (queue.empty()) {
      it = streams_.erase(it);
      continue;
    }
    Work& work = queue.front();
    if (!work.started && random(2)) {
      work.started = true;
      if (!work.grid) {
        work.num_steps += num_steps_;
      } else if (work.grid->shared_bytes == 0) {
        run_alone(*work.grid);
      } else {
        work.grid->num_running = work.grid->num_ctas;
        for (unsigned i = 0; i < work.grid->num_ctas; ++i) work.grid->ctas.push_back(std::make_unique<Cta>(*work.grid, i, pool_));
      }
    }
    ++it;
  }
  ++num_steps_;   // delays end although nobody runs
}

void Machine::run_alone(Grid& grid) {
  std::vector<unsigned> order(grid.num_ctas);
  for (unsigned i = 0; i < grid.num_ctas; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_);
  grid.num_running = grid.num_ctas;
  for (unsigned index : order) {
    Pool pool;
    grid.ctas.clear();
    grid.ctas.push_back(std::make_unique<Cta>(grid, index, pool));
    while (error_.empty() && grid.ctas.front()->num_running > 0) {
      if (!step(pool)) fail("everybody of a CTA waits: " + who_waits());
    }
    if (!error_.empty()) return;
  }
  grid.ctas.clear();
}

bool Machine::step(Pool& pool) {
  if (++num_steps_ > max_steps_) fail("no end after " + std::to_string(max_steps_) + " steps: " + who_waits());
  if (!copies_.empty() && random((pool.ready.size() + pool.asleep.size()) * copy_pace_ + copies_.size()) < copies_.size()) {
    do_copy(random(copies_.size()));
    return true;
  }
  if (pool.ready.empty()) {
    pool.ready.swap(pool.asleep);
  } else if (!pool.asleep.empty() && random(kSleepSteps) == 0) {
    const size_t i = random(pool.asleep.size());
    pool.ready.push_back(pool.asleep[i]);
    pool.asleep[i] = pool.asleep.back();
    pool.asleep.pop_back();
  }
  if (pool.ready.empty()) return false;
  size_t i = random(pool.ready.size());
  if (pool.ready[i]->cta->grid.slow && random(kSlowStreams)) i = random(pool.ready.size());
  Fiber& fiber = *pool.ready[i];
  pool.ready[i] = pool.ready.back();
  pool.ready.pop_back();
  resume(fiber);
  return true;
}

void Machine::resume(Fiber& fiber) {
  current_ = &fiber;
  fiber.waits_for = nullptr;
  threadIdx = fiber.thread;
  blockIdx = fiber.cta->index;
  blockDim = fiber.cta->grid.num_threads;
  gridDim = fiber.cta->grid.num_ctas;
  returned_ = trapped_ = false;
  if (!_setjmp(scheduler_)) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = fiber.stack;
    first.uc_stack.ss_size = kStackBytes;
    makecontext(&first, &Machine::enter, 0);
    setcontext(&first);
  }
  Fiber& back = *current_;
  current_ = nullptr;
  if (overflowed(back.stack)) fail("a fiber's stack is too small");
  if (returned_) end_thread(back);
  if (trapped_) end_stream(back.cta->grid.stream);
}

void Machine::enter() {
  Machine& machine = get();
  machine.current_->cta->grid.kernel();
  machine.returned_ = true;
  machine.leave();
}

void Machine::leave() { _longjmp(scheduler_, 1); }

void Machine::yield() {
  Fiber& fiber = *current_;
  fiber.pool->ready.push_back(&fiber);
  if (!_setjmp(fiber.context)) leave();
}

void Machine::sleep(const char* waits_for) {
  Fiber& fiber = *current_;
  fiber.waits_for = waits_for;
  fiber.pool->asleep.push_back(&fiber);
  if (!_setjmp(fiber.context)) leave();
}

void Machine::park(const char* waits_for) {
  Fiber& fiber = *current_;
  fiber.waits_for = waits_for;
  if (!_setjmp(fiber.context)) leave();
}

void Machine::wake_all(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) wake(*fiber);
  fibers.clear();
}

void Machine::trap() {
  trapped_ = true;
  leave();
}

void Machine::fail(const std::string& why) {
  if (!current_) throw std::runtime_error(why);
  if (error_.empty()) {
    error_ = why + " (thread " + std::to_string(current_->thread) + " of CTA " + std::to_string(current_->cta->index) + " on stream " +
             std::to_string(current_->cta->grid.stream) + ")";
  }
  leave();
}

void Machine::end_thread(Fiber& fiber) {
  Cta& cta = *fiber.cta;
  if (!fiber.in_flight.empty()) fail("a thread ended with multiplies in flight");
  if (fiber.open_stores->unwritten) fail("a thread ended with copies that it never committed");
  if (races()) races_.release(cta.agent(fiber), stream_clocks_[cta.grid.stream]);
  if (--cta.num_running > 0) return;
  if (cta.num_copies > 0) fail("a CTA ended with copies in flight");
  Grid& grid = cta.grid;
  --grid.num_running;
  if (cta.fibers.front().pool == &pool_) {
    const auto its = std::find_if(grid.ctas.begin(), grid.ctas.end(), [&](const auto& other) { return other.get() == &cta; });
    grid.ctas.erase(its);
  }
}

void Machine::end_stream(int64_t stream) {
  const auto is_its = [&](const Fiber* fiber) { return fiber->cta->grid.stream == stream; };
  for (auto* fibers : {&pool_.ready, &pool_.asleep}) fibers->erase(std::remove_if(fibers->begin(), fibers->end(), is_its), fibers->end());
  copies_.erase(std::remove_if(copies_.begin(), copies_.end(), [&](const Copy& copy) { return copy.cta->grid.stream == stream; }), copies_.end());
  streams_.erase(stream);
}

std::string Machine::who_waits() const {
  std::map<std::string, int> counts;
  for (const auto& [stream, queue] : streams_) {
    if (queue.empty() || !queue.front().grid) continue;
    for (const auto& cta : queue.front().grid->ctas) {
      for (const Fiber& fiber : cta->fibers) {
        if (!fiber.waits_for) continue;
        ++counts["stream " + std::to_string(stream) + " CTA " + std::to_string(cta->index) + " warp " + std::to_string(fiber.thread / kWarpSize) + " in " +
                 fiber.waits_for];
      }
    }
  }
  std::ostringstream words;
  for (const auto& [where, count] : counts) words << count << " of " << where << "; ";
  return words.str();
}

// ---- races ----

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

// ---- the copy engine ----

void Machine::start(Copy copy) {
  if (copy.num_bytes % 16 || copy.shared % 16 || reinterpret_cast<uintptr_t>(copy.global) % 16) fail("a bulk copy that is not of aligned 16 bytes");
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

void barrier_complete_bytes(Cta& cta, uint32_t address, uint32_t num_bytes);

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

// ---- threads that meet ----

namespace {

// Whatever each of them has done, all have seen.
template <typename Fibers>
void order_all(const Fibers& fibers) {
  Races* races = Machine::get().races();
  if (!races) return;
  Clock all;
  for (const Fiber* fiber : fibers) races->release(fiber->cta->agent(*fiber), all);
  for (const Fiber* fiber : fibers) races->acquire(fiber->cta->agent(*fiber), all);
}

}  // namespace

void meet(uint32_t mask, const char* what, void* mine, void (*complete)(void* const* lanes, uint32_t mask), bool orders_memory) {
  Machine& machine = Machine::get();
  Fiber& fiber = machine.current();
  Warp& warp = fiber.cta->warp_of(fiber);
  if (!(mask >> fiber.lane() & 1)) machine.fail(std::string(what) + " by a lane outside of its mask");
  warp.arrivals[fiber.lane()] = {&fiber, mask, what, mine};
  warp.arrived |= 1u << fiber.lane();
  if ((warp.arrived & mask) != mask) return machine.park(what);
  void* lanes[kWarpSize] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Warp::Arrival& arrival = warp.arrivals[lane];
    if (arrival.mask != mask || std::strcmp(arrival.what, what) != 0) {
      machine.fail("lanes of a warp meet in " + std::string(what) + " and in " + arrival.what);
    }
    lanes[lane] = arrival.mine;
  }
  complete(lanes, mask);
  if (orders_memory) {
    std::vector<const Fiber*> fibers;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) fibers.push_back(warp.arrivals[lane].fiber);
    }
    order_all(fibers);
  }
  warp.arrived &= ~mask;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1 && lane != fiber.lane()) machine.wake(*warp.arrivals[lane].fiber);
  }
  machine.yield();
}

void sync_threads() {
  Machine& machine = Machine::get();
  Cta& cta = *machine.current().cta;
  cta.at_syncthreads.push_back(&machine.current());
  if (cta.at_syncthreads.size() < cta.fibers.size()) return machine.park("__syncthreads");
  order_all(cta.at_syncthreads);
  cta.at_syncthreads.pop_back();
  machine.wake_all(cta.at_syncthreads);
  machine.yield();
}

// ---- barriers in shared memory ----

namespace {

struct Barrier {
  uint64_t phase : 1, num_arrivals : 20, num_pending : 20;
  int64_t num_bytes : 22;   // announced and not yet completed
};
static_assert(sizeof(Barrier) == 8);

Barrier load_barrier(const Cta& cta, uint32_t address) {
  Barrier barrier;
  std::memcpy(&barrier, cta.at(address, sizeof barrier), sizeof barrier);
  if (address % 8 || barrier.num_arrivals == 0 || barrier.num_pending > barrier.num_arrivals) Machine::get().fail("not a barrier");
  return barrier;
}

void store_barrier(Cta& cta, uint32_t address, Barrier barrier) {
  if (barrier.num_pending == 0 && barrier.num_bytes == 0) {
    barrier.phase ^= 1;
    barrier.num_pending = barrier.num_arrivals;
    if (Machine::get().races()) {
      BarrierClock& clock = cta.barrier_clocks[address];
      clock.passed.join(clock.gathered);
      clock.gathered = {};
    }
    Machine::get().wake_all(cta.at_barrier[address]);
  }
  std::memcpy(cta.at(address, sizeof barrier), &barrier, sizeof barrier);
}

Cta& my_cta() { return *Machine::get().current().cta; }

}  // namespace

void barrier_init(uint32_t address, uint32_t num_arrivals) {
  Barrier barrier{};
  barrier.num_arrivals = barrier.num_pending = num_arrivals;
  std::memcpy(my_cta().at(address, sizeof barrier), &barrier, sizeof barrier);
}

void barrier_arrive(uint32_t address, uint32_t num_bytes) {
  Machine::get().yield();
  Barrier barrier = load_barrier(my_cta(), address);
  if (barrier.num_pending == 0) Machine::get().fail("more arrivals on a barrier than it counts");
  barrier.num_bytes += num_bytes;
  --barrier.num_pending;
  const Fiber& fiber = Machine::get().current();
  if (Races* races = Machine::get().races()) races->release(fiber.cta->agent(fiber), fiber.cta->barrier_clocks[address].gathered);
  store_barrier(my_cta(), address, barrier);
}

void barrier_complete_bytes(Cta& cta, uint32_t address, uint32_t num_bytes) {
  Barrier barrier = load_barrier(cta, address);
  barrier.num_bytes -= num_bytes;
  store_barrier(cta, address, barrier);
}

bool barrier_passed(uint32_t address, uint32_t parity) {
  if (load_barrier(my_cta(), address).phase == parity) return false;
  const Fiber& fiber = Machine::get().current();
  if (Races* races = Machine::get().races()) races->acquire(fiber.cta->agent(fiber), fiber.cta->barrier_clocks[address].passed);
  return true;
}

void barrier_wait(uint32_t address, uint32_t parity) {
  Machine& machine = Machine::get();
  while (!barrier_passed(address, parity)) {
    my_cta().at_barrier[address].push_back(&machine.current());
    machine.park("mbarrier_wait");
  }
}

// ---- multiplies ----

namespace {

constexpr int kRows = 64, kK = 32, kMaxTokens = 128;

// 16 k of a row of a K-major tile with 128-byte swizzle, from where the descriptor says.
const uint8_t* chunk_of(const Cta& cta, uint64_t descriptor, int row, int k) {
  constexpr uint64_t kSwizzle128 = 1;
  if (descriptor >> 62 != kSwizzle128) Machine::get().fail("a descriptor without 128-byte swizzle");
  const uint32_t begin = (descriptor & 0x3FFF) << 4, atom_bytes = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t address = begin + row / 8 * atom_bytes + row % 8 * 128 + k;
  return cta.at(address ^ (address >> 7 & 7) << 4, 16);
}

void read_row(const Cta& cta, uint64_t descriptor, int row, float (&values)[kK]) {
  for (int k = 0; k < kK; k += 16) {
    const uint8_t* chunk = chunk_of(cta, descriptor, row, k);
    for (int i = 0; i < 16; ++i) values[k + i] = from_e4m3(chunk[i]);
  }
}

// For Races: what a warp's multiply reads of shared memory, at its issue and until it is waited for.
void access_tile(uint64_t descriptor, int num_rows, const Access& by) {
  Machine& machine = Machine::get();
  for (int row = 0; row < num_rows; ++row) {
    for (int k = 0; k < kK; k += 16) machine.access(chunk_of(*machine.current().cta, descriptor, row, k), 16, false, by);
  }
}

// Rows r and r + 8 of a warp's 16 belong to lanes 4 r .. 4 r + 3; lane q of these has k = 4 q .. + 3 and 16 further.
void read_fragments(const Multiply& multiply, float (&a)[kRows][kK]) {
  for (int thread = 0; thread < kWarpgroupSize; ++thread) {
    const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4, k = thread % 4 * 4;
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 4; ++byte) {
        a[row + i % 2 * 8][k + i / 2 * 16 + byte] = from_e4m3(static_cast<uint8_t>(multiply.lanes[thread].a[i] >> 8 * byte));
      }
    }
  }
}

void execute(Cta& cta, int first_thread, const Multiply& multiply) {
  static float a[kRows][kK], b[kK][kMaxTokens], product[kRows][kMaxTokens];
  if (multiply.lanes[0].a) read_fragments(multiply, a);
  float row_values[kK];
  for (int row = 0; row < kRows && !multiply.lanes[0].a; ++row) {
    read_row(cta, multiply.a_tile, row, row_values);
    std::memcpy(a[row], row_values, sizeof row_values);
  }
  for (int token = 0; token < multiply.n; ++token) {
    read_row(cta, multiply.b_tile, token, row_values);
    for (int k = 0; k < kK; ++k) b[k][token] = row_values[k];
  }
  for (int row = 0; row < kRows; ++row) {
    float* sums = product[row];
    std::fill(sums, sums + multiply.n, 0.f);
    for (int k = 0; k < kK; ++k) {
      for (int token = 0; token < multiply.n; ++token) sums[token] += a[row][k] * b[k][token];
    }
  }
  for (int thread = 0; thread < kWarpgroupSize; ++thread) {
    Fiber& fiber = cta.fibers[first_thread + thread];
    float* sums = multiply.lanes[thread].sums;
    InFlight& in_flight = fiber.in_flight.at(sums);
    const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4, token = thread % 4 * 2;
    for (int i = 0; i < multiply.n / 2; ++i) {
      const float value = product[row + i % 4 / 2 * 8][token + i / 4 * 8 + i % 2];
      in_flight.values[i] = multiply.begins ? value : in_flight.values[i] + value;
    }
    if (--in_flight.num_multiplies == 0) {
      std::copy(in_flight.values.begin(), in_flight.values.end(), sums);
      fiber.in_flight.erase(sums);
    }
  }
}

}  // namespace

void issue_multiply(int n, bool begins, float* sums, const uint32_t* a, uint64_t a_tile, uint64_t b_tile) {
  Machine& machine = Machine::get();
  Fiber& fiber = machine.current();
  Warpgroup& warpgroup = fiber.cta->warpgroup_of(fiber);
  const size_t place = fiber.num_multiplies++ - warpgroup.num_done;
  if (place == warpgroup.queue.size()) warpgroup.queue.push_back({n, begins, a_tile, b_tile, {}, 0});
  Multiply& multiply = warpgroup.queue[place];
  if (multiply.n != n || multiply.begins != begins || multiply.a_tile != a_tile || multiply.b_tile != b_tile) {
    machine.fail("threads of a warpgroup issue different multiplies");
  }
  multiply.lanes[fiber.thread % kWarpgroupSize] = {sums, a};
  if (Races* races = machine.races(); races && fiber.lane() == 0) {
    const uint32_t agent = fiber.cta->multiplies_of(fiber);
    const Access by{agent, races->tick(agent), 0, false, true};
    access_tile(b_tile, n, by);
    if (!a) access_tile(a_tile, kRows, by);
  }
  InFlight& in_flight = fiber.in_flight[sums];
  if (in_flight.num_multiplies++ == 0) {
    in_flight.values.assign(sums, sums + n / 2);
    std::fill(sums, sums + n / 2, std::numeric_limits<float>::quiet_NaN());
  }
  if (++multiply.num_issued == kWarpgroupSize) machine.wake_all(warpgroup.waiting);
}

void commit_multiplies() {
  Fiber& fiber = Machine::get().current();
  fiber.multiply_groups.push_back(fiber.num_multiplies);
}

void wait_multiplies(size_t num_pending) {
  Machine& machine = Machine::get();
  Fiber& fiber = machine.current();
  auto& groups = fiber.multiply_groups;
  if (groups.size() > num_pending) {
    const uint64_t target = groups[groups.size() - 1 - num_pending];
    Warpgroup& warpgroup = fiber.cta->warpgroup_of(fiber);
    while (warpgroup.num_done < target) {
      if (warpgroup.queue.front().num_issued < kWarpgroupSize) {
        warpgroup.waiting.push_back(&fiber);
        machine.park("wgmma_wait");
        continue;
      }
      execute(*fiber.cta, fiber.thread / kWarpgroupSize * kWarpgroupSize, warpgroup.queue.front());
      warpgroup.queue.pop_front();
      ++warpgroup.num_done;
    }
    groups.erase(groups.begin(), groups.end() - num_pending);
    if (Races* races = machine.races()) {
      const uint32_t time = fiber.multiplies_begin + static_cast<uint32_t>(target);
      races->clock(fiber.cta->agent(fiber)).set(fiber.cta->multiplies_of(fiber), time);
    }
  }
}

// ---- E4M3 ----

float from_e4m3(uint8_t code) {
  static const std::vector<float> table = [] {
    std::vector<float> values(256);
    for (int i = 0; i < 256; ++i) {
      const int exponent = i >> 3 & 15, mantissa = i & 7;
      const float magnitude = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
      values[i] = (i & 0x7F) == 0x7F ? std::numeric_limits<float>::quiet_NaN() : i & 0x80 ? -magnitude : magnitude;
    }
    return values;
  }();
  return table[code];
}

uint8_t to_e4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7F;
  if (magnitude >= 448.f) return sign | 0x7E;
  const int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
  return sign | static_cast<uint8_t>((exponent + 6) * 8 + static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent))));
}

}  // namespace emulator
