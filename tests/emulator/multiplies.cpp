// The tensor cores.
#include "machine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace emulator {

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
    for (int k = 0; k < kK; k += 16)
      machine.access(chunk_of(*machine.current().cta, descriptor, row, k), 16, false, by);
  }
}

// Rows r and r + 8 of a warp's 16 belong to lanes 4 r .. 4 r + 3; lane q of these has k = 4 q .. + 3 and 16 further.
void read_fragments(const Multiply& multiply, float (&a)[kRows][kK]) {
  const auto value = multiply.is_e5m2 ? from_e5m2 : from_e4m3;
  for (int thread = 0; thread < kWarpgroupSize; ++thread) {
    const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4, k = thread % 4 * 4;
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 4; ++byte) {
        a[row + i % 2 * 8][k + i / 2 * 16 + byte] =
            value(static_cast<uint8_t>(multiply.lanes[thread].a[i] >> 8 * byte));
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

void issue_multiply(int n, bool begins, bool is_e5m2, float* sums, const uint32_t* a, uint64_t a_tile,
                    uint64_t b_tile) {
  Machine& machine = Machine::get();
  Fiber& fiber = machine.current();
  Warpgroup& warpgroup = fiber.cta->warpgroup_of(fiber);
  const size_t place = fiber.num_multiplies++ - warpgroup.num_done;
  if (place == warpgroup.queue.size()) warpgroup.queue.push_back({n, begins, is_e5m2, a_tile, b_tile, {}, 0});
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

namespace {

// All codes of a format with so many mantissa bits; magnitudes from `first_special` on are NaN (E5M2 has an infinity
// there as well, which no weight or activation may be).
std::vector<float> eight_bit_values(int mantissa_bits, int bias, int first_special) {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) {
    const int exponent = (i & 0x7F) >> mantissa_bits, mantissa = i & ((1 << mantissa_bits) - 1);
    const int significand = exponent ? (1 << mantissa_bits) + mantissa : mantissa;
    const float magnitude = std::ldexp(static_cast<float>(significand), std::max(exponent, 1) - bias - mantissa_bits);
    values[i] = (i & 0x7F) >= first_special ? std::numeric_limits<float>::quiet_NaN()
                : i & 0x80                  ? -magnitude
                                            : magnitude;
  }
  return values;
}

}  // namespace

float from_e4m3(uint8_t code) {
  static const std::vector<float> table = eight_bit_values(3, 7, 0x7F);
  return table[code];
}

float from_e5m2(uint8_t code) {
  static const std::vector<float> table = eight_bit_values(2, 15, 0x7C);
  return table[code];
}

uint8_t to_e4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7F;
  if (magnitude >= 448.f) return sign | 0x7E;
  const int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
  return sign | static_cast<uint8_t>((exponent + 6) * 8 +
                                     static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent))));
}

}  // namespace emulator
