// NF4 over whole tensors: shares quant blocks out to threads, decodes their absmax, serves the last block.
#include "nf4.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "nf4_kernels.h"

namespace offload_rt::nf4 {

namespace {

// 512 Ki elements: some 60 us of decoding to bfloat16 (AVX2 or AVX-512, a 2.6 GHz Xeon).
constexpr std::size_t kMinBlocksPerThread = 8192;
// A team's thread is there already: some 8 us.
constexpr std::size_t kMinBlocksPerTeamThread = 1024;
// A cache line of absmax codes and of encoded absmax: no two threads write to the same one.
constexpr std::size_t kBlocksPerUnit = 64;

template <typename T>
Kernels<T> kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return avx512_kernels<T>();
  if (isa == Isa::avx2) return avx2_kernels<T>();
#endif
  static_cast<void>(isa);
  return plain_kernels<T>();
}

std::size_t num_parts(std::size_t num_blocks, const Execution& execution) {
  const std::size_t least = execution.team != nullptr ? kMinBlocksPerTeamThread : kMinBlocksPerThread;
  return std::clamp<std::size_t>(num_blocks / least, 1, std::max<std::size_t>(execution.num_threads, 1));
}

// The product goes through double, where it is exact, so that no compiler can fuse it with the addition.
float multiply(float left, float right) { return static_cast<float>(static_cast<double>(left) * right); }

// Fills `absmax` for the quant blocks from `first_block` on.
void decode_absmax(const Encoded& encoded, std::size_t first_block, std::span<float> absmax) {
  for (std::size_t i = 0; i < absmax.size(); ++i) {
    const std::size_t block = first_block + i;
    const float value = encoded.nested_map[encoded.absmax[block]];
    absmax[i] = multiply(value, encoded.nested_absmax[block / kNestedBlockSize]) + encoded.nested_offset;
  }
}

// Decodes elements from the start of quant block `first_block`; only the tensor's last block may be partial.
template <typename T>
void decode_from(const Encoded& encoded, std::size_t first_block, std::span<T> out, const Kernels<T>& kernels,
                 bool streaming_stores) {
  std::array<float, kNestedBlockSize> absmax_of_batch;
  std::size_t block = first_block;
  while (!out.empty()) {
    const std::size_t num_whole = std::min(out.size() / kQuantBlockSize, absmax_of_batch.size());
    const std::span absmax = std::span(absmax_of_batch).first(std::max<std::size_t>(num_whole, 1));
    decode_absmax(encoded, block, absmax);
    const std::uint8_t* codes = encoded.codes.data() + block * kCodesPerBlock;
    if (num_whole > 0) {
      kernels.decode_blocks(codes, absmax, out.data(), streaming_stores);
      block += num_whole;
      out = out.subspan(num_whole * kQuantBlockSize);
    } else {
      std::array<std::uint8_t, kCodesPerBlock> padded{};
      std::array<T, kQuantBlockSize> decoded;
      std::copy_n(codes, (out.size() + 1) / 2, padded.begin());
      kernels.decode_blocks(padded.data(), absmax, decoded.data(), false);
      std::copy_n(decoded.begin(), out.size(), out.begin());
      out = {};
    }
  }
}

// [Note: the last quant block] of a tensor divides by its absmax where the others multiply by the inverse, as
// bitsandbytes does on a CPU. Returns the index of the first weight that is not finite.
template <typename T>
std::optional<std::size_t> encode_partial_block(std::span<const T> weights, std::uint8_t* codes,
                                                float& absmax) {
  float largest = kSmallestAbsmax;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const float value = to_float(weights[i]);
    if (!std::isfinite(value)) return i;
    largest = std::max(largest, std::fabs(value));
  }
  absmax = largest;
  for (std::size_t i = 0; i < weights.size(); i += 2) {
    const std::uint8_t first = code_of(to_float(weights[i]) / largest);
    const std::uint8_t second = code_of(i + 1 < weights.size() ? to_float(weights[i + 1]) / largest : 0.0f);
    codes[i / 2] = static_cast<std::uint8_t>(first << 4 | second);
  }
  return std::nullopt;
}

}  // namespace

template <typename T>
void decode(const Encoded& encoded, std::span<T> out, const Execution& execution) {
  const Kernels<T> kernels = kernels_for<T>(execution.isa);
  const bool streaming_stores = execution.streaming_stores && is_aligned_for_streaming(out.data());
  const std::size_t num_units = (encoded.absmax.size() + kBlocksPerUnit - 1) / kBlocksPerUnit;
  in_parallel(num_units, num_parts(encoded.absmax.size(), execution), execution.team,
              [&](std::size_t, std::size_t begin, std::size_t end) {
                constexpr std::size_t unit = kBlocksPerUnit * kQuantBlockSize;
                const std::size_t end_element = std::min(end * unit, out.size());
                decode_from(encoded, begin * kBlocksPerUnit,
                            out.subspan(begin * unit, end_element - begin * unit), kernels, streaming_stores);
              });
}

template <typename T>
void decode_transposed(const Encoded& encoded, std::size_t rows, std::size_t columns, std::span<T> out,
                       const Execution& execution) {
  // A strip of 64 rows begins at a quant block whatever the number of columns, and its columns fill cache
  // lines. Turning it in tiles of a cache line's columns was measured, and was 10 to 20 % slower than this.
  constexpr std::size_t strip_rows = kQuantBlockSize;
  const Kernels<T> kernels = kernels_for<T>(execution.isa);
  const std::size_t num_strips = (rows + strip_rows - 1) / strip_rows;
  const std::size_t parts = std::min(num_parts(encoded.absmax.size(), execution), num_strips);
  std::vector<std::vector<T>> scratch(parts, std::vector<T>(std::min(rows, strip_rows) * columns));
  in_parallel(num_strips, parts, execution.team, [&](std::size_t part, std::size_t begin, std::size_t end) {
    for (std::size_t strip = begin; strip < end; ++strip) {
      const std::size_t first_row = strip * strip_rows;
      const std::size_t num_rows = std::min(strip_rows, rows - first_row);
      const std::span decoded = std::span(scratch[part]).first(num_rows * columns);
      decode_from(encoded, strip * columns, decoded, kernels, false);
      for (std::size_t column = 0; column < columns; ++column) {
        T* to = out.data() + column * rows + first_row;
        for (std::size_t row = 0; row < num_rows; ++row) to[row] = decoded[row * columns + column];
      }
    }
  });
}

template <typename T>
std::optional<std::size_t> encode(std::span<const T> weights, std::span<std::uint8_t> codes,
                                  std::span<float> absmax, const Execution& execution) {
  const Kernels<T> kernels = kernels_for<T>(execution.isa);
  const std::size_t num_whole = weights.size() / kQuantBlockSize;
  const std::size_t parts = num_parts(num_whole, execution);
  const std::size_t num_units = (num_whole + kBlocksPerUnit - 1) / kBlocksPerUnit;
  std::vector<std::size_t> bad_block(parts, num_whole);
  in_parallel(num_units, parts, execution.team, [&](std::size_t part, std::size_t begin, std::size_t end) {
    const std::size_t first = begin * kBlocksPerUnit;
    const std::size_t count = std::min(end * kBlocksPerUnit, num_whole) - first;
    const std::size_t done =
        kernels.encode_blocks(weights.data() + first * kQuantBlockSize, codes.data() + first * kCodesPerBlock,
                              absmax.subspan(first, count));
    if (done < count) bad_block[part] = first + done;
  });
  const std::size_t first_bad = *std::min_element(bad_block.begin(), bad_block.end());
  if (first_bad < num_whole) {
    const auto block = weights.subspan(first_bad * kQuantBlockSize, kQuantBlockSize);
    const auto bad =
        std::find_if(block.begin(), block.end(), [](T w) { return !std::isfinite(to_float(w)); });
    return static_cast<std::size_t>(bad - block.begin()) + first_bad * kQuantBlockSize;
  }
  const std::size_t begin = num_whole * kQuantBlockSize;
  if (begin == weights.size()) return std::nullopt;
  const auto bad = encode_partial_block(weights.subspan(begin), codes.data() + begin / 2, absmax[num_whole]);
  return bad ? std::optional(begin + *bad) : std::nullopt;
}

void encode_absmax(std::span<const float> absmax, float offset,
                   std::span<const std::uint8_t, kAbsmaxSteps> rounding, std::span<std::uint8_t> absmax_codes,
                   std::span<float> nested_absmax) {
  for (std::size_t nested = 0; nested < nested_absmax.size(); ++nested) {
    const std::size_t begin = nested * kNestedBlockSize;
    const std::size_t end = std::min(begin + kNestedBlockSize, absmax.size());
    float largest = 0.0f;
    for (std::size_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(absmax[i] - offset));
    nested_absmax[nested] = largest;
    const float inverse = 1.0f / largest;
    for (std::size_t i = begin; i < end; ++i) {
      float scaled = multiply(absmax[i] - offset, inverse);
      scaled = scaled > -1.0f ? std::min(scaled, 1.0f) : -1.0f;  // 0 * inf is a NaN and takes the lowest code
      const float position = (scaled + 1.0f) * 0.5f;
      // Exact in double, so one rounding is left: that of bitsandbytes' fused multiply-add.
      const auto step = static_cast<float>(static_cast<double>(position) * (kAbsmaxSteps - 1) + 0.5);
      absmax_codes[i] = rounding[static_cast<std::size_t>(step)];
    }
  }
}

template void decode(const Encoded&, std::span<float>, const Execution&);
template void decode(const Encoded&, std::span<BFloat16>, const Execution&);
template void decode(const Encoded&, std::span<Half>, const Execution&);
template void decode_transposed(const Encoded&, std::size_t, std::size_t, std::span<float>, const Execution&);
template void decode_transposed(const Encoded&, std::size_t, std::size_t, std::span<BFloat16>,
                                const Execution&);
template void decode_transposed(const Encoded&, std::size_t, std::size_t, std::span<Half>, const Execution&);
template std::optional<std::size_t> encode(std::span<const float>, std::span<std::uint8_t>, std::span<float>,
                                           const Execution&);
template std::optional<std::size_t> encode(std::span<const BFloat16>, std::span<std::uint8_t>,
                                           std::span<float>, const Execution&);
template std::optional<std::size_t> encode(std::span<const Half>, std::span<std::uint8_t>, std::span<float>,
                                           const Execution&);

}  // namespace offload_rt::nf4
