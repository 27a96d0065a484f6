// NF4 kernels for AVX-512. The bits are those of nf4_plain.cc.
#include "nf4_kernels.h"

#if defined(__x86_64__)

#include "floats_avx512.h"
#include "target_avx512.h"

namespace offload_rt::nf4 {

namespace {

inline __m128i load_16_bytes(const std::uint8_t* bytes) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

inline void store(void* out, __m512i value, bool streaming_stores) {
  if (streaming_stores) {
    _mm512_stream_si512(static_cast<__m512i*>(out), value);
  } else {
    _mm512_storeu_si512(out, value);
  }
}

template <typename T>
inline __m256i round_products(__m512 products);

template <>
inline __m256i round_products<BFloat16>(__m512 products) {
  return round_to_bfloat16(products);
}

template <>
inline __m256i round_products<Half>(__m512 products) {
  return _mm512_cvtps_ph(products, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 16 bytes hold 32 codes. `spread` copies them to four lanes and puts the byte of each code into an element
// of its own, `shift` brings the high nibble down where the code is the first of its byte. What remains above
// the nibble is ignored by the lookups: vpermps reads four bits of an index, and vpermw five, of a table that
// stands twice.
//
//   bytes    b0            b1            b2  ...
//   spread   b0     b0     b1     b1     b2  ...
//   shift    b0>>4  b0     b1>>4  b1     b2>>4 ...

template <typename T>
inline void decode_block_16_bit(const std::uint8_t* codes, __m512 products, T* out, bool streaming_stores) {
  const __m512i spread = _mm512_set_epi8(                              // highest byte first; -1 gives zero
      -1, 15, -1, 15, -1, 14, -1, 14, -1, 13, -1, 13, -1, 12, -1, 12,  //
      -1, 11, -1, 11, -1, 10, -1, 10, -1, 9, -1, 9, -1, 8, -1, 8,      //
      -1, 7, -1, 7, -1, 6, -1, 6, -1, 5, -1, 5, -1, 4, -1, 4,          //
      -1, 3, -1, 3, -1, 2, -1, 2, -1, 1, -1, 1, -1, 0, -1, 0);
  const __mmask32 first_of_byte = 0x55555555;
  const __m512i values = _mm512_broadcast_i64x4(round_products<T>(products));
  for (std::size_t half = 0; half < 2; ++half) {
    __m512i index = _mm512_broadcast_i32x4(load_16_bytes(codes + 16 * half));
    index = _mm512_shuffle_epi8(index, spread);
    index = _mm512_mask_srli_epi16(index, first_of_byte, index, 4);
    store(out + 32 * half, _mm512_permutexvar_epi16(index, values), streaming_stores);
  }
}

inline void decode_block_32_bit(const std::uint8_t* codes, __m512 products, float* out,
                                bool streaming_stores) {
  const __m512i spread_low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i spread_high = _mm512_add_epi32(spread_low, _mm512_set1_epi32(8));
  const __mmask16 first_of_byte = 0x5555;
  for (std::size_t half = 0; half < 2; ++half) {
    const __m512i bytes = _mm512_broadcast_i32x4(load_16_bytes(codes + 16 * half));
    for (std::size_t quarter = 0; quarter < 2; ++quarter) {
      // The bytes above the code's own repeat byte 0; the lookup ignores them.
      __m512i index = _mm512_shuffle_epi8(bytes, quarter == 0 ? spread_low : spread_high);
      index = _mm512_mask_srli_epi32(index, first_of_byte, index, 4);
      const __m512 values = _mm512_permutexvar_ps(index, products);
      store(out + 32 * half + 16 * quarter, _mm512_castps_si512(values), streaming_stores);
    }
  }
}

template <typename T>
void decode_blocks(const std::uint8_t* codes, std::span<const float> absmax, T* out, bool streaming_stores) {
  const __m512 table = _mm512_loadu_ps(kTable.data());
  for (const float scale : absmax) {
    const __m512 products = _mm512_mul_ps(table, _mm512_set1_ps(scale));
    if constexpr (sizeof(T) == 2) {
      decode_block_16_bit<T>(codes, products, out, streaming_stores);
    } else {
      decode_block_32_bit(codes, products, out, streaming_stores);
    }
    codes += kCodesPerBlock;
    out += kQuantBlockSize;
  }
  if (streaming_stores) _mm_sfence();  // streamed data becomes visible to whoever waits for this thread
}

// How many of the 15 midpoints lie below, by binary search in four lookups.
inline __m512i codes_of(__m512 scaled) {
  const auto* midpoints = kMidpoints.data();
  const __m512 by_eight = _mm512_set1_ps(midpoints[7]);
  const __m512 by_four =
      _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(midpoints[3]), _mm512_set1_ps(midpoints[11]));
  const __m512 by_two = _mm512_maskz_loadu_ps(0x3fff, midpoints + 1);
  const __m512 by_one = _mm512_maskz_loadu_ps(0x7fff, midpoints);
  __m512i code = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(scaled, by_eight, _CMP_GT_OQ), 8);
  const auto refine = [&](__m512 table, int step) {
    const __mmask16 above = _mm512_cmp_ps_mask(scaled, _mm512_permutexvar_ps(code, table), _CMP_GT_OQ);
    code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
  };
  refine(by_four, 4);  // code is 0 or 8, its midpoint is 3 further
  refine(by_two, 2);
  refine(by_one, 1);
  return code;
}

template <typename T>
std::size_t encode_blocks(const T* weights, std::uint8_t* codes, std::span<float> absmax) {
  for (std::size_t block = 0; block < absmax.size(); ++block) {
    __m512 values[4];
    __m512i largest = _mm512_setzero_si512();
    for (std::size_t i = 0; i < 4; ++i) {
      values[i] = load_16(weights + 16 * i);
      largest = _mm512_max_epi32(largest, magnitude_bits(values[i]));
    }
    const std::uint32_t largest_bits = largest_of(largest);
    if (largest_bits >= kInfinityBits) return block;
    absmax[block] = std::bit_cast<float>(largest_bits);
    const __m512 inverse = _mm512_set1_ps(1.0f / std::max(absmax[block], kSmallestAbsmax));
    for (std::size_t i = 0; i < 4; ++i) {
      const __m512i code = codes_of(_mm512_mul_ps(values[i], inverse));
      const __m512i packed = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + 8 * i), _mm512_cvtepi64_epi8(packed));
    }
    weights += kQuantBlockSize;
    codes += kCodesPerBlock;
  }
  return absmax.size();
}

}  // namespace

template <typename T>
Kernels<T> avx512_kernels() {
  return {&decode_blocks<T>, &encode_blocks<T>};
}

template Kernels<float> avx512_kernels<float>();
template Kernels<BFloat16> avx512_kernels<BFloat16>();
template Kernels<Half> avx512_kernels<Half>();

}  // namespace offload_rt::nf4

#include "target_end.h"

#endif
