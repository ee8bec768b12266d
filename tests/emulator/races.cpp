#include "races.hpp"

#include <algorithm>

namespace emulator {
namespace {

void join(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

uint32_t of(const std::vector<uint32_t>& times, uint32_t agent) { return agent < times.size() ? times[agent] : 0; }

void raise(std::vector<uint32_t>& times, uint32_t agent, uint32_t time) {
  if (times.size() <= agent) times.resize(agent + 1);
  times[agent] = std::max(times[agent], time);
}

bool is_ordered(const Access& before, const Access& by, const Clock& past) {
  if (before.time == 0 || before.agent == by.agent || (before.is_atomic && by.is_atomic)) return true;
  return before.time <= of(by.is_async && !before.is_async ? past.fenced : past.seen, before.agent);
}

}  // namespace

void Clock::join(const Clock& other) {
  emulator::join(seen, other.seen);
  emulator::join(fenced, other.fenced);
}

void Clock::set(uint32_t agent, uint32_t time) {
  raise(seen, agent, time);
  raise(fenced, agent, time);
}

uint32_t Races::now(uint32_t agent) {
  const uint32_t time = of(clocks_[agent].seen, agent);
  return time ? time : tick(agent);  // moments count from 1
}

uint32_t Races::tick(uint32_t agent) {
  const uint32_t time = of(clocks_[agent].seen, agent) + 1;
  raise(clocks_[agent].seen, agent, time);
  return time;
}

void Races::release(uint32_t agent, Clock& to) {
  now(agent);
  to.join(clocks_[agent]);
  tick(agent);
}

void Races::release_flag(uint32_t agent, const void* flag, Scope scope, int64_t gpu) {
  Flag& left = flags_[flag];
  if (scope == Scope::kSystem) left.of_system.join(clocks_[agent]);
  release(agent, left.of_gpu[gpu]);
}

void Races::acquire_flag(uint32_t agent, const void* flag, Scope scope, int64_t gpu) {
  const auto left = flags_.find(flag);
  if (left == flags_.end()) return;
  if (scope == Scope::kSystem) acquire(agent, left->second.of_system);
  acquire(agent, left->second.of_gpu[gpu]);
}

void Races::fence(uint32_t agent) {
  now(agent);
  clocks_[agent].fenced = clocks_[agent].seen;
  tick(agent);
}

const Access* Races::access(Cell* cells, size_t num_cells, bool is_write, const Access& by, const Clock& past) {
  for (Cell* cell = cells; cell < cells + num_cells; ++cell) {
    if (!is_ordered(cell->write, by, past)) return &cell->write;
    if (is_write) {
      for (Access& read : cell->reads) {
        // An asynchronous write after a thread's read needs no proxy fence.
        Access as_thread = by;
        as_thread.is_async = false;
        if (!is_ordered(read, as_thread, past)) return &read;
        read = {};
      }
      cell->write = by;
      continue;
    }
    // In the place of the agent's last read, of none, or of one that this one follows; else of any: then a race may be
    // missed.
    Access* place = &cell->reads[by.time % Cell::kReaders];
    for (Access& read : cell->reads) {
      if (read.time == 0 || read.agent == by.agent || read.time <= of(past.seen, read.agent)) {
        place = &read;
        break;
      }
    }
    *place = by;
  }
  return nullptr;
}

}  // namespace emulator
