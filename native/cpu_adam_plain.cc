// The AdamW kernel in plain C++: what runs where no vector instructions are known. One lane.
#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

#include "cpu_adam_kernels.h"

namespace offload_rt::adam {

namespace {

struct Lanes {
  using Floats = float;
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
};

#include "cpu_adam_lanes.h"

}  // namespace

void step_plain(const Parameter& parameter, const Step& step, bool streaming_stores) {
  step_lanes_of(parameter, step, streaming_stores);
}

}  // namespace offload_rt::adam
