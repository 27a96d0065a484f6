// NF4 kernels for AVX2. The bits are those of nf4_plain.cc.
#include "nf4_kernels.h"

#if defined(__x86_64__)

#include <cstring>

#include "floats_avx2.h"
#include "target_avx2.h"

namespace offload_rt::nf4 {

namespace {

inline void store(void* out, __m256i value, bool streaming_stores) {
  if (streaming_stores) {
    _mm256_stream_si256(static_cast<__m256i*>(out), value);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(out), value);
  }
}

template <typename T>
inline __m256i round_products(__m256 low, __m256 high);

template <>
inline __m256i round_products<BFloat16>(__m256 low, __m256 high) {
  const __m256i packed = _mm256_packus_epi32(round_to_bfloat16(low), round_to_bfloat16(high));
  return _mm256_permute4x64_epi64(packed, 0b11'01'10'00);  // packing works within halves
}

template <>
inline __m256i round_products<Half>(__m256 low, __m256 high) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(high, nearest), _mm256_cvtps_ph(low, nearest));
}

// A byte shuffle is a lookup in a table of 16 bytes, so the 16 values are cut into low and high bytes and
// each code is looked up twice. Unpacking works within halves of a register, which leaves these elements of
// the block:
//
//   index_low    0..15 | 32..47      unpacked to words:   0..7 | 32..39    8..15 | 40..47
//   index_high  16..31 | 48..63                         16..23 | 48..55   24..31 | 56..63
template <typename T>
inline void decode_block_16_bit(const std::uint8_t* codes, __m256 low, __m256 high, T* out,
                                bool streaming_stores) {
  const __m256i values = round_products<T>(low, high);
  const __m256i low_bytes = _mm256_and_si256(values, _mm256_set1_epi16(0xff));
  const __m256i bytes =
      _mm256_permute4x64_epi64(_mm256_packus_epi16(low_bytes, _mm256_srli_epi16(values, 8)), 0b11'01'10'00);
  const __m256i table_low = _mm256_permute2x128_si256(bytes, bytes, 0x00);
  const __m256i table_high = _mm256_permute2x128_si256(bytes, bytes, 0x11);

  const __m256i nibble = _mm256_set1_epi8(0xf);
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i first = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
  const __m256i second = _mm256_and_si256(packed, nibble);
  const __m256i index[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
  __m256i words[4];
  for (std::size_t i = 0; i < 2; ++i) {
    const __m256i found_low = _mm256_shuffle_epi8(table_low, index[i]);
    const __m256i found_high = _mm256_shuffle_epi8(table_high, index[i]);
    words[2 * i] = _mm256_unpacklo_epi8(found_low, found_high);
    words[2 * i + 1] = _mm256_unpackhi_epi8(found_low, found_high);
  }
  store(out, _mm256_permute2x128_si256(words[0], words[1], 0x20), streaming_stores);
  store(out + 16, _mm256_permute2x128_si256(words[2], words[3], 0x20), streaming_stores);
  store(out + 32, _mm256_permute2x128_si256(words[0], words[1], 0x31), streaming_stores);
  store(out + 48, _mm256_permute2x128_si256(words[2], words[3], 0x31), streaming_stores);
}

// Four bytes hold eight codes: every lane gets all of them and shifts its own down. A lookup reads three bits
// of the index; the fourth, moved to the sign, chooses between the halves of the table.
inline void decode_block_32_bit(const std::uint8_t* codes, __m256 low, __m256 high, float* out,
                                bool streaming_stores) {
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  for (std::size_t i = 0; i < kCodesPerBlock; i += 4) {
    std::int32_t four_bytes = 0;
    std::memcpy(&four_bytes, codes + i, sizeof four_bytes);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(four_bytes), shifts);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    const __m256 values =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
    store(out + 2 * i, _mm256_castps_si256(values), streaming_stores);
  }
}

template <typename T>
void decode_blocks(const std::uint8_t* codes, std::span<const float> absmax, T* out, bool streaming_stores) {
  const __m256 table_low = _mm256_loadu_ps(kTable.data());
  const __m256 table_high = _mm256_loadu_ps(kTable.data() + 8);
  for (const float scale : absmax) {  // [Note: sixteen products]
    const __m256 low = _mm256_mul_ps(table_low, _mm256_set1_ps(scale));
    const __m256 high = _mm256_mul_ps(table_high, _mm256_set1_ps(scale));
    if constexpr (sizeof(T) == 2) {
      decode_block_16_bit<T>(codes, low, high, out, streaming_stores);
    } else {
      decode_block_32_bit(codes, low, high, out, streaming_stores);
    }
    codes += kCodesPerBlock;
    out += kQuantBlockSize;
  }
  if (streaming_stores) _mm_sfence();  // streamed data becomes visible to whoever waits for this thread
}

// How many of the 15 midpoints lie below, by binary search: midpoints 7; 3 or 11; 1, 5, 9 or 13; 0, 2, ..
// or 14. At each step the candidates fit one register of eight, and the code so far says which of them to
// compare with.
inline __m256i codes_of(__m256 scaled) {
  const auto& m = kMidpoints;
  const __m256 by_two = _mm256_setr_ps(m[1], m[5], m[9], m[13], 0, 0, 0, 0);
  const __m256 by_one = _mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]);
  const auto above = [&](__m256 midpoints) {
    return _mm256_castps_si256(_mm256_cmp_ps(scaled, midpoints, _CMP_GT_OQ));
  };
  const __m256i upper_half = above(_mm256_set1_ps(m[7]));
  __m256i code = _mm256_and_si256(upper_half, _mm256_set1_epi32(8));
  const __m256 by_four =
      _mm256_blendv_ps(_mm256_set1_ps(m[3]), _mm256_set1_ps(m[11]), _mm256_castsi256_ps(upper_half));
  code = _mm256_or_si256(code, _mm256_and_si256(above(by_four), _mm256_set1_epi32(4)));
  const __m256 pairs = _mm256_permutevar8x32_ps(by_two, _mm256_srli_epi32(code, 2));
  code = _mm256_or_si256(code, _mm256_and_si256(above(pairs), _mm256_set1_epi32(2)));
  const __m256 singles = _mm256_permutevar8x32_ps(by_one, _mm256_srli_epi32(code, 1));
  return _mm256_or_si256(code, _mm256_and_si256(above(singles), _mm256_set1_epi32(1)));
}

// Eight codes, one to a lane, become four bytes.
inline void pack_codes(__m256i code, std::uint8_t* codes) {
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(code, 4), _mm256_srli_epi64(code, 32));
  const __m256i low_bytes =
      _mm256_shuffle_epi8(pairs, _mm256_set1_epi16(0x0800));  // bytes 0 and 8 of each half
  const auto first = static_cast<std::uint16_t>(_mm256_extract_epi16(low_bytes, 0));
  const auto second = static_cast<std::uint16_t>(_mm256_extract_epi16(low_bytes, 8));
  std::memcpy(codes, &first, sizeof first);
  std::memcpy(codes + 2, &second, sizeof second);
}

template <typename T>
std::size_t encode_blocks(const T* weights, std::uint8_t* codes, std::span<float> absmax) {
  for (std::size_t block = 0; block < absmax.size(); ++block) {
    __m256 values[8];
    __m256i largest = _mm256_setzero_si256();
    for (std::size_t i = 0; i < 8; ++i) {
      values[i] = load_8(weights + 8 * i);
      largest = _mm256_max_epi32(largest, magnitude_bits(values[i]));
    }
    const std::uint32_t largest_bits = largest_of(largest);
    if (largest_bits >= kInfinityBits) return block;
    absmax[block] = std::bit_cast<float>(largest_bits);
    const __m256 inverse = _mm256_set1_ps(1.0f / std::max(absmax[block], kSmallestAbsmax));
    for (std::size_t i = 0; i < 8; ++i)
      pack_codes(codes_of(_mm256_mul_ps(values[i], inverse)), codes + 4 * i);
    weights += kQuantBlockSize;
    codes += kCodesPerBlock;
  }
  return absmax.size();
}

}  // namespace

template <typename T>
Kernels<T> avx2_kernels() {
  return {&decode_blocks<T>, &encode_blocks<T>};
}

template Kernels<float> avx2_kernels<float>();
template Kernels<BFloat16> avx2_kernels<BFloat16>();
template Kernels<Half> avx2_kernels<Half>();

}  // namespace offload_rt::nf4

#include "target_end.h"

#endif
