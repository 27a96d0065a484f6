// AdamW under the sanitizers: every instruction set gives the plain one's bits, on any number of threads,
// from any alignment, within bounds. What the plain one must give is tested from Python, against torch.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu_adam.h"

using namespace offload_rt;
using namespace offload_rt::adam;
using namespace offload_rt::testing;

namespace {

// Deterministic, heavy-tailed, some denormal.
float number(std::uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  const float uniform = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
  return uniform * uniform * uniform * (state % 64 == 0 ? 0x1p-128f : 1.0f);
}

// The vectors have exactly the sizes needed, so that a byte too far is found; the first `offset` elements are
// left out.
template <typename Grad, typename Moment, typename Weight>
struct State {
  State(std::size_t count, std::size_t skipped)
      : offset(skipped),
        grad(count + offset),
        weight(count + offset),
        master(count + offset),
        exp_avg(count + offset),
        exp_avg_sq(count + offset) {
    std::uint32_t state = 1;
    for (std::size_t i = offset; i < grad.size(); ++i) {
      grad[i] = from_float<Grad>(number(state));
      master[i] = number(state);
      exp_avg[i] = from_float<Moment>(number(state));
      const float root = number(state);
      exp_avg_sq[i] = from_float<Moment>(root * root);
    }
  }

  void update(const Execution& execution, bool with_weight) {
    Parameter parameter;
    parameter.grad = std::span<const Grad>(grad).subspan(offset);
    parameter.master = std::span(master).subspan(offset);
    parameter.moments =
        Moments<Moment>{std::span(exp_avg).subspan(offset), std::span(exp_avg_sq).subspan(offset)};
    if (with_weight) parameter.weight = std::span(weight).subspan(offset);
    step(parameter, {0.7f, 0.999f, 0.1f, 0.99f, 0.01f, 0.3f, 1e-8f, -1e-3f}, execution);
  }

  template <typename T>
  [[nodiscard]] bool same_bytes(const std::vector<T>& left, std::size_t left_offset,
                                const std::vector<T>& right) const {
    const std::size_t count = right.size() - offset;
    return count == 0 ||
           std::memcmp(left.data() + left_offset, right.data() + offset, count * sizeof(T)) == 0;
  }

  [[nodiscard]] bool same_as(const State& other) const {
    return same_bytes(other.master, other.offset, master) &&
           same_bytes(other.exp_avg, other.offset, exp_avg) &&
           same_bytes(other.exp_avg_sq, other.offset, exp_avg_sq) &&
           same_bytes(other.weight, other.offset, weight);
  }

  std::size_t offset;
  std::vector<Grad> grad;
  std::vector<Weight> weight;
  std::vector<float> master;
  std::vector<Moment> exp_avg, exp_avg_sq;
};

constexpr std::size_t kShare = 32768;  // what cpu_adam.cc gives a thread at least

template <typename Grad, typename Moment, typename Weight>
void every_isa_gives_the_plain_bits() {
  for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{15}, std::size_t{16},
                                  std::size_t{17}, std::size_t{4097}, 3 * kShare + 65})
    for (const bool with_weight : {false, true}) {
      State<Grad, Moment, Weight> expected(count, 0);
      expected.update({Isa::plain, 1}, with_weight);
      for (const Isa isa : available_isas())
        for (const std::size_t num_threads : {0, 3})
          for (const std::size_t offset : {0, 1}) {
            State<Grad, Moment, Weight> state(count, offset);
            state.update({isa, num_threads, offset == 0}, with_weight);
            CHECK(state.same_as(expected));
          }
    }
}

// 256 ascending values, denser towards 0, with both signs or one.
DynamicMap map_of(bool is_signed) {
  std::array<float, DynamicMap::kSize> values;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float linear =
        is_signed ? (static_cast<float>(i) - 127.0f) / 128.0f : static_cast<float>(i) / 255.0f;
    values[i] = linear * std::fabs(linear);
  }
  const auto map = DynamicMap::of(values);
  CHECK(map.has_value());
  return *map;
}

struct QuantizedState {
  explicit QuantizedState(std::size_t count)
      : grad(count),
        master(count),
        weight(count),
        codes(2, std::vector<std::uint8_t>(count)),
        absmax(2, std::vector<float>((count + kQuantBlockSize - 1) / kQuantBlockSize)) {
    std::uint32_t state = 1;
    for (std::size_t i = 0; i < count; ++i) {
      grad[i] = from_float<BFloat16>(number(state));
      master[i] = number(state);
      for (auto& moment : codes) moment[i] = static_cast<std::uint8_t>(state >> (8 + i % 16));
    }
    for (auto& moment : absmax)
      for (float& value : moment) value = std::fabs(number(state));
  }

  void update(const Execution& execution) {
    static const DynamicMap first = map_of(true), second = map_of(false);
    const Parameter parameter = {
        std::span<const BFloat16>(grad), master,
        QuantizedMoments{{codes[0], absmax[0], &first}, {codes[1], absmax[1], &second}}, std::span(weight)};
    step(parameter, {0.7f, 0.999f, 0.1f, 0.99f, 0.01f, 0.3f, 1e-8f, -1e-3f}, execution);
  }

  [[nodiscard]] bool same_as(const QuantizedState& other) const {
    return master == other.master && codes == other.codes && absmax == other.absmax &&
           std::memcmp(weight.data(), other.weight.data(), weight.size() * sizeof(BFloat16)) == 0;
  }

  std::vector<BFloat16> grad;
  std::vector<float> master;
  std::vector<BFloat16> weight;
  std::vector<std::vector<std::uint8_t>> codes;
  std::vector<std::vector<float>> absmax;
};

void every_isa_gives_the_plain_codes() {
  for (const std::size_t count :
       {std::size_t{1}, std::size_t{255}, std::size_t{256}, std::size_t{257}, 3 * kShare + 65}) {
    QuantizedState expected(count);
    expected.update({Isa::plain, 1});
    for (const Isa isa : available_isas())
      for (const std::size_t num_threads : {0, 3}) {
        QuantizedState state(count);
        state.update({isa, num_threads, true});
        CHECK(state.same_as(expected));
      }
  }
}

void a_map_that_is_too_dense_is_refused() {
  std::array<float, DynamicMap::kSize> values;
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = 0.5f + static_cast<float>(i) * 0x1p-10f;
  CHECK(!DynamicMap::of(values));
  values.fill(0.0f);
  CHECK(!DynamicMap::of(values));
}

// In a child that may not start a thread: not as root, whom the limit does not bind.
void a_share_without_a_thread_is_done_all_the_same() {
  constexpr std::size_t count = 3 * kShare + 65;
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const rlimit none = {1, 1};
    if (setrlimit(RLIMIT_NPROC, &none) != 0 || (getuid() == 0 && setuid(65534) != 0)) _exit(2);
    try {
      std::thread([] {}).join();
      _exit(3);
    } catch (const std::system_error&) {
    }
    State<BFloat16, float, BFloat16> expected(count, 0), state(count, 0);
    expected.update({available_isas().back(), 1}, true);
    state.update({available_isas().back(), 3}, true);
    _exit(state.same_as(expected) ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  if (WIFEXITED(status) && WEXITSTATUS(status) >= 2) {
    std::printf("skipped: threads cannot be forbidden here (%d)\n", WEXITSTATUS(status));
    return;
  }
  CHECK_EQUAL(status, 0);
}

}  // namespace

int main() {
  Suite suite;
  suite.run("bfloat16 in and out", every_isa_gives_the_plain_bits<BFloat16, float, BFloat16>);
  suite.run("float32 in and out", every_isa_gives_the_plain_bits<float, float, float>);
  suite.run("bfloat16 moments", every_isa_gives_the_plain_bits<BFloat16, BFloat16, BFloat16>);
  suite.run("8-bit moments", every_isa_gives_the_plain_codes);
  suite.run("a map that is too dense is refused", a_map_that_is_too_dense_is_refused);
  suite.run("a share without a thread is done all the same", a_share_without_a_thread_is_done_all_the_same);
  return suite.finish("cpu_adam");
}
