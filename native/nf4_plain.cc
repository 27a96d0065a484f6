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

float to_float(Half value) {
  const std::uint32_t sign = std::uint32_t{value.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x0400) {  // zero and denormals: units of 2^-24
    return std::bit_cast<float>(sign |
                                std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  }
  const std::uint32_t exponent_shift = magnitude < 0x7c00 ? (127 - 15) << 23 : (255 - 31) << 23;
  return std::bit_cast<float>(sign | ((magnitude << 13) + exponent_shift));
}

template <>
float from_float<float>(float value) {
  return value;
}

template <>
BFloat16 from_float<BFloat16>(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffff) > kInfinityBits) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
Half from_float<Half>(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  std::uint32_t half = 0;
  if (magnitude > kInfinityBits) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520, the first that rounds past the largest half
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to units of 2^-24, in the low bits
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

template <typename T>
Kernels<T> plain_kernels() {
  return {&decode_blocks<T>, &encode_blocks<T>};
}

template Kernels<float> plain_kernels<float>();
template Kernels<BFloat16> plain_kernels<BFloat16>();
template Kernels<Half> plain_kernels<Half>();

}  // namespace offload_rt::nf4
