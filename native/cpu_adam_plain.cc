// The AdamW kernel in plain C++: what runs where no vector instructions are known. One lane.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <type_traits>

#include "cpu_adam_kernels.h"

namespace offload_rt::adam {

namespace {

std::uint32_t magnitude_bits(float value) { return std::bit_cast<std::uint32_t>(value) & 0x7fffffff; }
std::uint32_t largest_of(std::uint32_t value) { return value; }

struct Lanes {
  using Floats = float;
  using Ints = std::uint32_t;
  static constexpr std::size_t kWidth = 1;

  template <typename T>
  static float load(const T* from) {
    return to_float(*from);
  }
  template <typename T>
  static void store(T* to, float value) {
    *to = from_float<T>(value);
  }
  template <typename T>
  static void stream(T* to, float value) {
    store(to, value);
  }
  static void prefetch(std::uintptr_t) {}
  static float broadcast(float value) { return value; }
  static float add(float left, float right) { return left + right; }
  static float subtract(float left, float right) { return left - right; }
  static float multiply(float left, float right) { return left * right; }
  static float divide(float left, float right) { return left / right; }
  static float square_root(float value) { return std::sqrt(value); }
  static float multiply_add(float left, float right, float addend) { return std::fma(left, right, addend); }

  static Ints load_codes(const std::uint8_t* from) { return *from; }
  static void store_codes(std::uint8_t* to, Ints code) { *to = static_cast<std::uint8_t>(code); }
  static float lookup(const DynamicMap& map, Ints code) { return map.values()[code]; }
  static Ints codes_of(const DynamicMap& map, float scaled) {
    const std::uint32_t cut = std::max(magnitude_bits(scaled) >> 16, DynamicMap::kSmallestCut);
    const std::uint32_t sign = std::signbit(scaled) ? DynamicMap::kNumCuts : 0;
    const Ints code = map.first_codes()[cut - DynamicMap::kSmallestCut + sign];
    return code + (scaled > map.midpoints()[code] ? 1 : 0);
  }
  static Ints maximum(Ints left, Ints right) { return std::max(left, right); }
};

#include "cpu_adam_lanes.h"

}  // namespace

void step_plain(const Parameter& parameter, const Step& step, bool streaming_stores) {
  step_lanes_of(parameter, step, streaming_stores);
}

}  // namespace offload_rt::adam
