// Threads that meet: in an instruction of their warp, in __syncthreads, on barriers in shared memory.
#include "machine.hpp"

#include <cstring>

namespace emulator {

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

void meet(uint32_t mask, const char* what, void* mine, void (*complete)(void* const* lanes, uint32_t mask),
          bool orders_memory) {
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

void sync_warp(int barrier) {
  Cta& cta = *me().cta;
  const Warp* warp = &cta.warp_of(me());
  if (barrier < 1 || barrier > 15) Machine::get().fail("no named barrier that is free: " + std::to_string(barrier));
  if (cta.warp_barriers.emplace(barrier, warp).first->second != warp)
    Machine::get().fail("two warps use one named barrier of 32 threads");
  meet(~0u, "barrier.sync", nullptr, [](void* const*, uint32_t) {}, true);
}

namespace {

struct Barrier {
  uint64_t phase : 1, num_arrivals : 20, num_pending : 20;
  int64_t num_bytes : 22;  // announced and not yet completed
};
static_assert(sizeof(Barrier) == 8);

Barrier load_barrier(const Cta& cta, uint32_t address) {
  Barrier barrier;
  std::memcpy(&barrier, cta.at(address, sizeof barrier), sizeof barrier);
  if (address % 8 || barrier.num_arrivals == 0 || barrier.num_pending > barrier.num_arrivals)
    Machine::get().fail("not a barrier");
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

Cta& my_cta() { return *me().cta; }

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
  const Fiber& fiber = me();
  if (Races* races = Machine::get().races())
    races->release(fiber.cta->agent(fiber), fiber.cta->barrier_clocks[address].gathered);
  store_barrier(my_cta(), address, barrier);
}

void barrier_complete_bytes(Cta& cta, uint32_t address, uint32_t num_bytes) {
  Barrier barrier = load_barrier(cta, address);
  barrier.num_bytes -= num_bytes;
  store_barrier(cta, address, barrier);
}

bool barrier_passed(uint32_t address, uint32_t parity) {
  if (load_barrier(my_cta(), address).phase == parity) return false;
  const Fiber& fiber = me();
  if (Races* races = Machine::get().races())
    races->acquire(fiber.cta->agent(fiber), fiber.cta->barrier_clocks[address].passed);
  return true;
}

void barrier_wait(uint32_t address, uint32_t parity) {
  Machine& machine = Machine::get();
  while (!barrier_passed(address, parity)) {
    my_cta().at_barrier[address].push_back(&machine.current());
    machine.park("mbarrier_wait");
  }
}

}  // namespace emulator
