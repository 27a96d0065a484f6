// NF4 kernels in plain C++: what runs where no vector instructions are known, and what is read to understand
// them.
#include "nf4_kernels.h"

namespace offload_rt::nf4 {

namespace {

template <typename T>
void decode_blocks(const std::uint8_t* codes, std::span<const float> absmax, T* out,
                   bool /*streaming_stores*/) {
  for (const float scale : absmax) {
    std::array<T, 16> values;  // [Note: sixteen products]
    for (std::size_t code = 0; code < values.size(); ++code)
      values[code] = from_float<T>(kTable[code] * scale);
    for (std::size_t i = 0; i < kCodesPerBlock; ++i) {
      *out++ = values[codes[i] >> 4];
      *out++ = values[codes[i] & 0xf];
    }
    codes += kCodesPerBlock;
  }
}

template <typename T>
std::size_t encode_blocks(const T* weights, std::uint8_t* codes, std::span<float> absmax) {
  for (std::size_t block = 0; block < absmax.size(); ++block) {
    std::array<float, kQuantBlockSize> values;
    std::uint32_t largest =
        0;  // of non-negative floats, the larger one has the larger bits; NaN has the largest
    for (std::size_t i = 0; i < kQuantBlockSize; ++i) {
      values[i] = to_float(weights[i]);
      largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffff);
    }
    if (largest >= kInfinityBits) return block;
    absmax[block] = std::bit_cast<float>(largest);
    const float inverse = 1.0f / std::max(absmax[block], kSmallestAbsmax);
    for (std::size_t i = 0; i < kCodesPerBlock; ++i) {
      codes[i] = static_cast<std::uint8_t>(code_of(values[2 * i] * inverse) << 4 |
                                           code_of(values[2 * i + 1] * inverse));
    }
    weights += kQuantBlockSize;
    codes += kCodesPerBlock;
  }
  return absmax.size();
}

}  // namespace

template <typename T>
Kernels<T> plain_kernels() {
  return {&decode_blocks<T>, &encode_blocks<T>};
}

template Kernels<float> plain_kernels<float>();
template Kernels<BFloat16> plain_kernels<BFloat16>();
template Kernels<Half> plain_kernels<Half>();

}  // namespace offload_rt::nf4
