// Runs one kernel over so many elements, for counting instructions: instructions KERNEL ELEMENTS. The
// counting, and what is allowed, are in tests/test_native_instructions.py. With the best instruction set that
// there is, which under valgrind is AVX2.
#include <array>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "cpu_adam.h"
#include "nf4.h"

using namespace offload_rt;

namespace {

template <typename T>
int run_decode(std::size_t count, const Execution& execution) {
  const std::vector<std::uint8_t> codes(count / 2, 0x5a), absmax(count / nf4::kQuantBlockSize, 7);
  const std::vector<float> nested(absmax.size() / nf4::kNestedBlockSize + 1, 0.5f),
      map(nf4::kNestedMapSize, 0.25f);
  std::vector<T> out(count);
  nf4::decode({codes, absmax, nested, 0.1f, std::span<const float, nf4::kNestedMapSize>(map)}, std::span(out),
              execution);
  return 0;
}

int run_encode(std::size_t count, const Execution& execution) {
  const std::vector<BFloat16> weights(count, from_float<BFloat16>(0.3f));
  std::vector<std::uint8_t> codes(count / 2);
  std::vector<float> absmax(count / nf4::kQuantBlockSize);
  return nf4::encode(std::span<const BFloat16>(weights), std::span(codes), std::span(absmax), execution) ? 1
                                                                                                         : 0;
}

int run_step(std::size_t count, const Execution& execution, bool quantized) {
  std::array<float, DynamicMap::kSize> values;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float linear = (static_cast<float>(i) - 127.0f) / 128.0f;
    values[i] = linear * std::fabs(linear);
  }
  const auto map = DynamicMap::of(values);
  if (!map) return 1;
  const std::vector<BFloat16> grad(count, from_float<BFloat16>(0.3f));
  std::vector<BFloat16> weight(count);
  std::vector<float> master(count, 1.0f), exp_avg(count), exp_avg_sq(count);
  std::vector<std::uint8_t> codes(count), codes_sq(count);
  const std::size_t num_blocks = count / adam::kQuantBlockSize;
  adam::Parameter parameter = {std::span(grad), master, adam::Moments<float>{exp_avg, exp_avg_sq},
                               std::span(weight)};
  if (quantized)
    parameter.moments = adam::QuantizedMoments{{codes, std::span(exp_avg).first(num_blocks), &*map},
                                               {codes_sq, std::span(exp_avg_sq).first(num_blocks), &*map}};
  adam::step(parameter, {1.0f, 0.999f, 0.1f, 0.99f, 0.01f, 0.3f, 1e-8f, -1e-3f}, execution);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string_view kernel = argv[1];
  const std::size_t count = std::strtoul(argv[2], nullptr, 10);
  const Execution execution = {available_isas().back(), 1, true};
  if (kernel == "nf4 decode bfloat16") return run_decode<BFloat16>(count, execution);
  if (kernel == "nf4 decode float32") return run_decode<float>(count, execution);
  if (kernel == "nf4 encode bfloat16") return run_encode(count, execution);
  if (kernel == "adamw") return run_step(count, execution, false);
  if (kernel == "adamw 8-bit moments") return run_step(count, execution, true);
  return 2;
}
