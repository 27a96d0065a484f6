// NF4 under the sanitizers: every instruction set gives the plain one's bits, on any number of threads,
// within bounds. What the plain one must give is tested from Python, against torch and bitsandbytes.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "nf4.h"

using namespace offload_rt;
using namespace offload_rt::nf4;
using namespace offload_rt::testing;

namespace {

template <typename T>
T weight_of(float value);
template <>
float weight_of<float>(float value) {
  return value;
}
template <>
BFloat16 weight_of<BFloat16>(float value) {
  return {static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16)};
}
template <>
Half weight_of<Half>(float value) {  // sign and size are enough here: 2^-24 times an integer below 2^10
  const auto magnitude = static_cast<std::uint16_t>(std::fabs(value) * 100.0f);
  return {static_cast<std::uint16_t>((value < 0 ? 0x8000 : 0) | (magnitude & 0x3ff))};
}

// Deterministic and heavy-tailed, with blocks of very different size.
template <typename T>
std::vector<T> weights(std::size_t count) {
  std::vector<T> values;
  values.reserve(count);
  std::uint32_t state = 1;
  for (std::size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float uniform = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
    values.push_back(weight_of<T>(uniform * uniform * uniform * static_cast<float>(1 + i / 64 % 9)));
  }
  return values;
}

// What an encoder leaves behind. The vectors have exactly the sizes needed, so that a byte too far is found.
struct Stored {
  std::vector<std::uint8_t> codes, absmax_codes;
  std::vector<float> absmax, nested_absmax;
  std::vector<float> map = std::vector<float>(kNestedMapSize);

  explicit Stored(std::size_t count)
      : codes((count + 1) / 2),
        absmax_codes((count + 63) / 64),
        absmax((count + 63) / 64),
        nested_absmax((absmax.size() + 255) / 256) {
    for (std::size_t i = 0; i < map.size(); ++i) map[i] = (static_cast<float>(i) - 127.5f) / 127.5f;
  }

  [[nodiscard]] Encoded view() const {
    return {codes, absmax_codes, nested_absmax, 0.75f, std::span<const float, kNestedMapSize>(map)};
  }
};

const std::vector<std::uint8_t>& rounding() {
  static const std::vector<std::uint8_t> table = [] {
    std::vector<std::uint8_t> steps(kAbsmaxSteps);
    for (std::size_t i = 0; i < steps.size(); ++i) steps[i] = static_cast<std::uint8_t>(i / 256);
    return steps;
  }();
  return table;
}

template <typename T>
Stored encoded(const std::vector<T>& values, const Execution& execution) {
  Stored stored(values.size());
  CHECK(!encode(std::span(values), std::span(stored.codes), std::span(stored.absmax), execution));
  encode_absmax(stored.absmax, 0.75f, std::span<const std::uint8_t, kAbsmaxSteps>(rounding()),
                stored.absmax_codes, stored.nested_absmax);
  return stored;
}

template <typename T>
bool same_bytes(const std::vector<T>& left, const std::vector<T>& right) {
  return left.size() == right.size() &&
         (left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(T)) == 0);
}

constexpr std::size_t kShare = 8192 * 64;  // what nf4.cc gives a thread at least

template <typename T>
void every_isa_gives_the_plain_bits() {
  for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{63}, std::size_t{64},
                                  std::size_t{65}, std::size_t{16385}, 3 * kShare + 65}) {
    const std::vector<T> values = weights<T>(count);
    const Stored stored = encoded(values, {Isa::plain, 1});
    std::vector<T> expected(count);
    decode(stored.view(), std::span(expected), {Isa::plain, 1});
    for (const Isa isa : available_isas())
      for (const std::size_t num_threads : {0, 1, 3}) {
        const Stored again = encoded(values, {isa, num_threads});
        CHECK(same_bytes(again.codes, stored.codes));
        CHECK(same_bytes(again.absmax, stored.absmax));
        for (const bool streaming_stores : {false, true}) {
          std::vector<T> decoded(count);
          decode(stored.view(), std::span(decoded), {isa, num_threads, streaming_stores});
          CHECK(same_bytes(decoded, expected));
        }
      }
  }
}

template <typename T>
void a_transpose_has_every_element_in_its_place() {
  constexpr std::array<std::array<std::size_t, 2>, 4> shapes = {{{1, 1}, {65, 33}, {130, 100}, {1030, 1601}}};
  for (const auto& [rows, columns] : shapes) {
    const Stored stored = encoded(weights<T>(rows * columns), {Isa::plain, 1});
    std::vector<T> straight(rows * columns);
    decode(stored.view(), std::span(straight), {Isa::plain, 1});
    std::vector<T> expected(rows * columns);
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t column = 0; column < columns; ++column)
        expected[column * rows + row] = straight[row * columns + column];
    for (const Isa isa : available_isas()) {
      std::vector<T> turned(rows * columns);
      decode_transposed(stored.view(), rows, columns, std::span(turned), {isa, 3});
      CHECK(same_bytes(turned, expected));
    }
  }
}

// Teams of one thread more and one less than asked for, which OpenMP may give; each counts what it ran.
int larger_team_runs = 0, smaller_team_runs = 0;

void larger_team(void (*function)(void*), void* data, unsigned num_threads, unsigned) {
  ++larger_team_runs;
  std::vector<std::jthread> threads;
  for (unsigned i = 0; i < num_threads; ++i) threads.emplace_back(function, data);
  function(data);
}

void smaller_team(void (*function)(void*), void* data, unsigned num_threads, unsigned) {
  ++smaller_team_runs;
  std::vector<std::jthread> threads;
  for (unsigned i = 2; i < num_threads; ++i) threads.emplace_back(function, data);
  function(data);
}

template <typename T>
void a_team_of_any_size_gives_the_bits_of_one_thread() {
  const std::size_t rows = 130, columns = 3 * kShare / rows + 1;
  const Stored stored = encoded(weights<T>(rows * columns), {Isa::plain, 1});
  std::vector<T> expected(rows * columns), expected_turned(rows * columns);
  decode(stored.view(), std::span(expected), {Isa::plain, 1});
  decode_transposed(stored.view(), rows, columns, std::span(expected_turned), {Isa::plain, 1});
  for (const auto& [team, runs] :
       {std::pair(&larger_team, &larger_team_runs), std::pair(&smaller_team, &smaller_team_runs)}) {
    *runs = 0;
    std::vector<T> decoded(rows * columns), turned(rows * columns);
    decode(stored.view(), std::span(decoded), {Isa::plain, 3, false, team});
    CHECK(same_bytes(decoded, expected));
    decode_transposed(stored.view(), rows, columns, std::span(turned), {Isa::plain, 3, false, team});
    CHECK(same_bytes(turned, expected_turned));
    CHECK_EQUAL(*runs, 2);
    decode(stored.view(), std::span(decoded), {Isa::plain, 1, false, team});
    CHECK_EQUAL(*runs, 2);  // one share needs no team
  }
}

void the_first_weight_that_is_not_finite_is_found() {
  const std::size_t count = 3 * kShare + 65;
  for (const Isa isa : available_isas())
    for (const std::size_t bad : {std::size_t{0}, std::size_t{63}, kShare + 1, count - 1})
      for (const float value :
           {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        std::vector<float> values(count, 1.0f);
        values[bad] = value;
        values[count - 1] = value;
        Stored stored(count);
        const auto found = encode(std::span<const float>(values), std::span(stored.codes),
                                  std::span(stored.absmax), {isa, 3});
        CHECK(found.has_value());
        CHECK_EQUAL(found.value_or(0), bad);
      }
}

}  // namespace

int main() {
  Suite suite;
  suite.run("every instruction set gives the plain bits, float32", every_isa_gives_the_plain_bits<float>);
  suite.run("every instruction set gives the plain bits, bfloat16", every_isa_gives_the_plain_bits<BFloat16>);
  suite.run("every instruction set gives the plain bits, float16", every_isa_gives_the_plain_bits<Half>);
  suite.run("transpose, float32", a_transpose_has_every_element_in_its_place<float>);
  suite.run("transpose, bfloat16", a_transpose_has_every_element_in_its_place<BFloat16>);
  suite.run("transpose, float16", a_transpose_has_every_element_in_its_place<Half>);
  suite.run("a team of any size gives the bits of one thread, float32",
            a_team_of_any_size_gives_the_bits_of_one_thread<float>);
  suite.run("a team of any size gives the bits of one thread, bfloat16",
            a_team_of_any_size_gives_the_bits_of_one_thread<BFloat16>);
  suite.run("the first weight that is not finite is found", the_first_weight_that_is_not_finite_is_found);
  return suite.finish("nf4");
}
