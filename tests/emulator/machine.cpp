// Who runs when.
#include "machine.hpp"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr uint64_t kStackCanary = 0x5ca1ab1e0ddba11ull;  // at the end that a stack grows to
constexpr int kStepsBetweenStarts = 64;
constexpr int kSleepSteps = 64;                 // one of so many steps wakes somebody who sleeps
constexpr int kSlowStreams = 8;                 // a thread of a slow stream is passed over so often
constexpr uint32_t kCopyPaces[] = {1, 8, 256};  // a copy's turn comes so much more rarely than a thread's
constexpr size_t kCompetitors = 256;            // with more threads it does not become rarer still

// Stacks of whole CTAs, used again.
std::map<size_t, std::vector<char*>> free_stacks;

char* take_stacks(size_t num_threads) {
  auto& free = free_stacks[num_threads];
  char* stacks;
  if (free.empty()) {
    void* memory = mmap(nullptr, num_threads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
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
    : grid(grid),
      index(index),
      allocation(grid.shared_bytes + 1024, 0xFF),
      fibers(grid.num_threads),
      warps(grid.num_threads / kWarpSize),
      warpgroups((grid.num_threads + kWarpgroupSize - 1) / kWarpgroupSize),
      num_running(grid.num_threads),
      stacks(take_stacks(grid.num_threads)) {
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
  if (address < kSharedBegin || address - kSharedBegin + num_bytes > grid.shared_bytes)
    Machine::get().fail("access outside of shared memory");
  return shared + (address - kSharedBegin);
}

uint32_t shared_address(const void* pointer) {
  const Cta& cta = *Machine::get().current().cta;
  const auto offset = static_cast<const uint8_t*>(pointer) - cta.shared;
  if (offset < 0 || static_cast<size_t>(offset) >= cta.grid.shared_bytes)
    Machine::get().fail("not an address in shared memory");
  return kSharedBegin + static_cast<uint32_t>(offset);
}

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
        for (unsigned i = 0; i < work.grid->num_ctas; ++i)
          work.grid->ctas.push_back(std::make_unique<Cta>(*work.grid, i, pool_));
      }
    }
    ++it;
  }
  ++num_steps_;  // delays end although nobody runs
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
  const size_t competitors = std::min(pool.ready.size() + pool.asleep.size(), kCompetitors);
  if (!copies_.empty() && random(competitors * copy_pace_ + copies_.size()) < copies_.size()) {
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
    error_ = why + " (thread " + std::to_string(current_->thread) + " of CTA " + std::to_string(current_->cta->index) +
             " on stream " + std::to_string(current_->cta->grid.stream) + ")";
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
    const auto its =
        std::find_if(grid.ctas.begin(), grid.ctas.end(), [&](const auto& other) { return other.get() == &cta; });
    grid.ctas.erase(its);
  }
}

void Machine::end_stream(int64_t stream) {
  const auto is_its = [&](const Fiber* fiber) { return fiber->cta->grid.stream == stream; };
  for (auto* fibers : {&pool_.ready, &pool_.asleep})
    fibers->erase(std::remove_if(fibers->begin(), fibers->end(), is_its), fibers->end());
  copies_.erase(
      std::remove_if(copies_.begin(), copies_.end(), [&](const Copy& copy) { return copy.cta->grid.stream == stream; }),
      copies_.end());
  streams_.erase(stream);
}

std::string Machine::who_waits() const {
  std::map<std::string, int> counts;
  for (const auto& [stream, queue] : streams_) {
    if (queue.empty() || !queue.front().grid) continue;
    for (const auto& cta : queue.front().grid->ctas) {
      for (const Fiber& fiber : cta->fibers) {
        if (!fiber.waits_for) continue;
        ++counts["stream " + std::to_string(stream) + " CTA " + std::to_string(cta->index) + " warp " +
                 std::to_string(fiber.thread / kWarpSize) + " in " + fiber.waits_for];
      }
    }
  }
  std::ostringstream words;
  for (const auto& [where, count] : counts) words << count << " of " << where << "; ";
  return words.str();
}

}  // namespace emulator
