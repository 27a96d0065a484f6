// The AdamW kernel for AVX2: eight lanes.
#include "cpu_adam_kernels.h"

#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>

#include "floats_avx2.h"
#include "target_avx2.h"

namespace offload_rt::adam {

namespace {

// The low halves of eight 32-bit numbers below 2^16.
inline __m128i words_of(__m256i values) {
  return _mm_packus_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
}

struct Lanes {
  using Floats = __m256;
  using Ints = __m256i;
  static constexpr std::size_t kWidth = 8;

  template <typename T>
  static Floats load(const T* from) {
    return load_8(from);
  }
  static void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }
  static void store(BFloat16* to, Floats values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words_of(round_to_bfloat16(values)));
  }
  static void stream(float* to, Floats values) { _mm256_stream_ps(to, values); }
  static void stream(BFloat16* to, Floats values) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), words_of(round_to_bfloat16(values)));
  }
  static void prefetch(std::uintptr_t address) {
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
  }
  static Floats broadcast(float value) { return _mm256_set1_ps(value); }
  static Floats add(Floats left, Floats right) { return _mm256_add_ps(left, right); }
  static Floats subtract(Floats left, Floats right) { return _mm256_sub_ps(left, right); }
  static Floats multiply(Floats left, Floats right) { return _mm256_mul_ps(left, right); }
  static Floats divide(Floats left, Floats right) { return _mm256_div_ps(left, right); }
  static Floats square_root(Floats values) { return _mm256_sqrt_ps(values); }
  static Floats multiply_add(Floats left, Floats right, Floats addend) {
    return _mm256_fmadd_ps(left, right, addend);
  }

  static Ints load_codes(const std::uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static void store_codes(std::uint8_t* to, Ints codes) {
    const __m128i words = words_of(codes);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }
  static Floats lookup(const DynamicMap& map, Ints codes) {
    return _mm256_i32gather_ps(map.values(), codes, 4);
  }
  static Ints codes_of(const DynamicMap& map, Floats scaled) {
    const Ints smallest = _mm256_set1_epi32(DynamicMap::kSmallestCut);
    const Ints magnitude = _mm256_max_epi32(_mm256_srli_epi32(magnitude_bits(scaled), 16), smallest);
    const Ints negative = _mm256_srai_epi32(_mm256_castps_si256(scaled), 31);
    const Ints cut = _mm256_add_epi32(_mm256_sub_epi32(magnitude, smallest),
                                      _mm256_and_si256(negative, _mm256_set1_epi32(DynamicMap::kNumCuts)));
    const auto* first_codes = reinterpret_cast<const int*>(map.first_codes());
    const Ints codes = _mm256_and_si256(_mm256_i32gather_epi32(first_codes, cut, 1), _mm256_set1_epi32(0xff));
    const Floats midpoints = _mm256_i32gather_ps(map.midpoints(), codes, 4);
    const Ints above = _mm256_castps_si256(_mm256_cmp_ps(scaled, midpoints, _CMP_GT_OQ));
    return _mm256_sub_epi32(codes, above);
  }
  static Ints maximum(Ints left, Ints right) { return _mm256_max_epi32(left, right); }
};

#include "cpu_adam_lanes.h"

}  // namespace

void step_avx2(const Parameter& parameter, const Step& step, bool streaming_stores) {
  step_lanes_of(parameter, step, streaming_stores);
  if (streaming_stores) _mm_sfence();  // streamed data becomes visible to whoever waits for this thread
}

}  // namespace offload_rt::adam

#include "target_end.h"

#endif
