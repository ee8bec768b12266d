// Finds accesses to memory that nothing orders: of two, one a write, neither happens before the other by the
// instructions in between. For the sources compiled with -fsanitize=thread, whose calls before every access end here;
// what the emulator does for its threads it reports itself.
//
// Vector clocks, as in "FastTrack" (Flanagan, Freund 2009): every agent counts its moments and knows of every other how
// much of it it has seen. Agents are the threads and what works for a CTA on its own: the copy engine (loads, and of
// stores their reading and their writing) and every warp's multiplies, whose work is seen by who has waited for it. A
// clock is two: what is seen, and what of that lies before a proxy fence, which is what counts when an asynchronous
// access follows a thread's. __syncwarp and barriers order the lanes of a warp, shuffles and votes do not.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

struct Clock {
  std::vector<uint32_t> seen, fenced;  // by agent; what is beyond their end is 0

  void join(const Clock& other);
  void set(uint32_t agent, uint32_t time);  // that much of another agent is seen, at least
};

struct Access {
  uint32_t agent = 0, time = 0;  // time 0: there was none
  uint32_t code = 0;             // where in the library
  bool is_atomic = false, is_async = false;
};

// The last accesses to a byte: one write, and some readers since.
struct Cell {
  static constexpr int kReaders = 3;
  Access write, reads[kReaders];
};

// Memory that is looked at.
class Cells {
 public:
  Cells() = default;
  Cells(const uint8_t* begin, size_t num_bytes) : begin_(begin), num_bytes_(num_bytes), cells_(num_bytes) {}
  bool empty() const { return cells_.empty(); }
  bool has(const void* address) const {
    return static_cast<size_t>(static_cast<const uint8_t*>(address) - begin_) < num_bytes_;
  }
  Cell* at(const void* address) { return &cells_[offset(address)]; }
  size_t offset(const void* address) const { return static_cast<const uint8_t*>(address) - begin_; }

 private:
  const uint8_t* begin_ = nullptr;
  size_t num_bytes_ = 0;
  std::vector<Cell> cells_;
};

enum class Scope { kGpu, kSystem };
enum class Order { kRelaxed, kRelease, kAcquireRelease };

class Races {
 public:
  explicit Races(size_t num_agents = 0) : clocks_(num_agents) {}

  Clock& clock(uint32_t agent) { return clocks_[agent]; }
  uint32_t now(uint32_t agent);             // the agent's moment
  uint32_t tick(uint32_t agent);            // the agent's next moment; returns it
  void release(uint32_t agent, Clock& to);  // `to` joins what the agent has seen
  void acquire(uint32_t agent, const Clock& from) { clocks_[agent].join(from); }
  void release_flag(uint32_t agent, const void* flag, Scope scope, int64_t gpu);
  void acquire_flag(uint32_t agent, const void* flag, Scope scope, int64_t gpu);
  void fence(uint32_t agent);  // of proxies

  // `by` accesses cells; what it knows of others is `past`. The access that it races with, or null.
  const Access* access(Cell* cells, size_t num_cells, bool is_write, const Access& by, const Clock& past);

 private:
  // What releases left at an address: for everybody, and for threads of the same GPU.
  struct Flag {
    Clock of_system;
    std::unordered_map<int64_t, Clock> of_gpu;
  };

  std::vector<Clock> clocks_;
  std::unordered_map<const void*, Flag> flags_;
};

}  // namespace emulator
