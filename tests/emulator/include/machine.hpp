// A GPU on the CPU that the CUDA sources run on in tests. Every CUDA thread is a fiber, and one OS thread switches
// between them in an order that a seed decides; so does how fast the copy engine and the GPUs are. What a real GPU may
// do at any time happens here at a random one (the copy engine's work), or as late as it may (multiplies, when they are
// waited for). Memory is sequentially consistent, so a missing fence or a scope too small changes no result: those are
// what Races finds.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "races.hpp"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulator {

constexpr int kWarpSize = 32, kWarpgroupSize = 128;
constexpr uint32_t kSharedBegin = 1024;  // shared address of a CTA's first byte, so that 0 is no address

struct Cta;
struct Fiber;

// Runnable threads; those asleep run now and then, and when nobody else can.
struct Pool {
  std::vector<Fiber*> ready, asleep;
};

// Copies to global memory that one thread started between two commits: those that have not read their shared memory, or
// not written.
struct StoreGroup {
  int unread = 0, unwritten = 0;
  uint32_t read_time = 0, write_time = 0;  // of its last copy's reading and writing, see Races
};

// Accumulators while multiplies own them: the thread sees NaN in their place.
struct InFlight {
  int num_multiplies = 0;
  std::vector<float> values;
};

// A CUDA thread.
struct Fiber {
  Cta* cta = nullptr;
  Pool* pool = nullptr;
  int thread = 0;  // in its CTA
  char* stack = nullptr;
  jmp_buf context;
  bool started = false;
  const char* waits_for = nullptr;  // while parked or asleep
  std::shared_ptr<StoreGroup> open_stores = std::make_shared<StoreGroup>();
  std::vector<std::shared_ptr<StoreGroup>> stores;  // committed
  uint64_t num_multiplies = 0;                      // issued
  std::vector<uint64_t> multiply_groups;            // how many were issued at each commit
  std::map<float*, InFlight> in_flight;
  uint32_t multiplies_begin = 0;  // the time of its warp's multiplies when it began, see Races

  int lane() const { return thread % kWarpSize; }
};

// Where the lanes of a warp meet in one instruction.
struct Warp {
  struct Arrival {
    Fiber* fiber;
    uint32_t mask;
    const char* what;
    void* mine;
  };
  Arrival arrivals[kWarpSize];
  uint32_t arrived = 0;
};

// One wgmma: runs once all 128 threads have issued it and one of them waits for it.
struct Multiply {
  struct Lane {
    float* sums;
    const uint32_t* a;  // registers, or null: `a_tile`
  };
  int n;  // tokens
  bool begins;
  bool is_e5m2;             // A in registers; E4M3 otherwise, as tiles always are
  uint64_t a_tile, b_tile;  // descriptors
  Lane lanes[kWarpgroupSize];
  int num_issued;
};

struct Warpgroup {
  std::deque<Multiply> queue;
  uint64_t num_done = 0;
  std::vector<Fiber*> waiting;
};

struct Grid;

// The agents of a CTA (see Races): its threads, then these, then the multiplies of its warps.
enum class Engine { kLoad, kStoreRead, kStoreWrite };
constexpr int kMaxThreads = 384, kNumEngines = 3, kNumAgents = kMaxThreads + kNumEngines + kMaxThreads / kWarpSize;

struct BarrierClock {
  Clock gathered, passed;  // by arrivals of the phase, of those before
};

struct Cta {
  Cta(Grid& grid, unsigned index, Pool& pool);
  ~Cta();
  Cta(const Cta&) = delete;

  uint8_t* at(uint32_t address, size_t num_bytes) const;  // of shared memory
  uint32_t agent(const Fiber& fiber) const { return first_agent + fiber.thread; }
  uint32_t agent(Engine engine) const { return first_agent + kMaxThreads + static_cast<uint32_t>(engine); }
  uint32_t multiplies_of(const Fiber& fiber) const {
    return first_agent + kMaxThreads + kNumEngines + fiber.thread / kWarpSize;
  }
  Warp& warp_of(const Fiber& fiber) { return warps[fiber.thread / kWarpSize]; }
  Warpgroup& warpgroup_of(const Fiber& fiber) { return warpgroups[fiber.thread / kWarpgroupSize]; }

  Grid& grid;
  const unsigned index;
  std::vector<uint8_t> allocation;
  uint8_t* shared;  // 1024-byte aligned
  std::deque<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::unordered_map<uint32_t, std::vector<Fiber*>> at_barrier;  // by address
  std::vector<Fiber*> at_syncthreads;
  std::map<int, const Warp*> warp_barriers;  // the warp of each named barrier
  size_t num_running;                        // threads that have not returned
  int num_copies = 0;                        // in flight
  char* stacks;
  uint32_t first_agent = 0;
  Cells cells;  // of shared memory, if races are looked for
  std::unordered_map<uint32_t, BarrierClock> barrier_clocks;
};

// A kernel launch. One without dynamic shared memory runs its CTAs one at a time, each undisturbed: static shared
// memory exists once.
struct Grid {
  unsigned num_ctas = 0, num_threads = 0;
  size_t shared_bytes = 0;
  std::function<void()> kernel;  // one thread's work
  std::vector<std::unique_ptr<Cta>> ctas;
  unsigned num_running = 0;  // CTAs
  int64_t stream = 0;
  bool slow = false;
};

// Work of the copy engine: a load from global to shared memory that completes bytes on a barrier, or a store of a
// group, which reads shared memory and writes what it has read some time later.
struct Copy {
  Cta* cta;
  uint8_t* global;
  uint32_t shared, num_bytes, barrier;
  std::shared_ptr<StoreGroup> group;  // null: a load
  std::vector<uint8_t> read;
  uint32_t load_time = 0;  // see Races
};

class Machine {
 public:
  static Machine& get();

  // Host side. Launches of a stream run one after the other, those of different streams at the same time.
  void launch(Grid grid);
  void delay(int64_t stream, uint64_t num_steps);
  // Runs all that is queued. What went wrong, or "".
  std::string run(uint64_t seed, uint64_t max_steps);
  // From now on runs look for races in shared memory and in these bytes.
  void look_for_races(const uint8_t* global, size_t num_bytes) { tracked_ = global, num_tracked_ = num_bytes; }

  // Device side.
  Fiber& current() const { return *current_; }
  void yield();  // somebody else's turn
  void sleep(const char* waits_for);
  void park(const char* waits_for);  // until woken
  void wake(Fiber& fiber) { fiber.pool->ready.push_back(&fiber); }
  void wake_all(std::vector<Fiber*>& fibers);
  void start(Copy copy);
  uint64_t now() const { return num_steps_; }
  uint32_t random(size_t below) { return static_cast<uint32_t>(random_() % below); }
  // For Races: null if nobody looks.
  Races* races() { return num_tracked_ ? &races_ : nullptr; }
  void on_access(const void* address, size_t num_bytes, bool is_write, const void* code);
  void access(const void* address, size_t num_bytes, bool is_write, Access by);  // by the current thread or for it
  void begin_cta(Cta& cta);
  [[noreturn]] void trap();                        // ends the stream: its threads never run again
  [[noreturn]] void fail(const std::string& why);  // ends the run

 private:
  struct Work {
    std::unique_ptr<Grid> grid;  // null: a delay
    uint64_t num_steps = 0;
    bool started = false;
  };

  void start_work();
  void run_alone(Grid& grid);
  bool step(Pool& pool);  // false: nobody can run
  void resume(Fiber& fiber);
  static void enter();        // a fiber's first function
  [[noreturn]] void leave();  // back to the scheduler
  void end_thread(Fiber& fiber);
  void end_stream(int64_t stream);
  void do_copy(size_t index);
  std::string who_waits() const;
  std::string who_is(uint32_t agent) const;

  std::map<int64_t, std::deque<Work>> streams_;
  Pool pool_;
  std::vector<Copy> copies_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  bool returned_ = false, trapped_ = false;  // why the fiber that ran last is back
  std::mt19937_64 random_;
  uint32_t copy_pace_ = 1;
  uint64_t num_steps_ = 0, max_steps_ = 0;
  std::string error_;

  const uint8_t* tracked_ = nullptr;
  size_t num_tracked_ = 0;
  Races races_;
  Cells global_;
  uint32_t ctas_per_stream_ = 0;
  std::map<int64_t, Clock> stream_clocks_;  // what launches have done that are over
};

inline Fiber& me() { return Machine::get().current(); }

// All lanes of `mask` meet in the instruction `what`; the last one calls complete(what each lane brought, mask), which
// may write to it.
void meet(uint32_t mask, const char* what, void* mine, void (*complete)(void* const* lanes, uint32_t mask),
          bool orders_memory = false);
void sync_threads();
void sync_warp(int barrier);  // a named barrier of 32 threads, which must be one warp's
uint32_t shared_address(const void* pointer);

// Flags and counters in global memory. Before one is looked at or changed, others may come first.
uint32_t load_acquire(const uint32_t* address, Scope scope);
uint32_t load_relaxed(const uint32_t* address);
void store_release(uint32_t* address, uint32_t value, Scope scope);
uint32_t fetch_add(uint32_t* address, uint32_t value, Order order);  // at GPU scope
void proxy_fence();
void seen_stores(StoreGroup& group, bool written);  // the current thread has waited for its reading, or its writing

void barrier_init(uint32_t address, uint32_t num_arrivals);
void barrier_arrive(uint32_t address, uint32_t num_bytes);  // with bytes that the copy engine is to complete
void barrier_complete_bytes(Cta& cta, uint32_t address, uint32_t num_bytes);
bool barrier_passed(uint32_t address, uint32_t parity);
void barrier_wait(uint32_t address, uint32_t parity);

void issue_multiply(int n, bool begins, bool is_e5m2, float* sums, const uint32_t* a, uint64_t a_tile, uint64_t b_tile);
void commit_multiplies();
void wait_multiplies(size_t num_pending);

float from_e4m3(uint8_t code);
float from_e5m2(uint8_t code);
uint8_t to_e4m3(float value);  // to nearest, ties to even; finite: nothing above the largest number

}  // namespace emulator
