/* STREAM's triad, x = y + 3 z, the speed of memory that native_adam.py compares with: plain, written around the
 * caches, and in place. */
#include <stddef.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

void triad(float *x, const float *y, const float *z, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] = y[i] + 3.0f * z[i];
}

void triad_in_place(float *x, const float *z, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] += 3.0f * z[i];
}

/* `x` at a multiple of 64 bytes, `count` a multiple of 16. */
void triad_streaming(float *x, const float *y, const float *z, size_t count) {
#if defined(__AVX512F__)
  const __m512 three = _mm512_set1_ps(3.0f);
  for (size_t i = 0; i < count; i += 16)
    _mm512_stream_ps(x + i, _mm512_fmadd_ps(three, _mm512_loadu_ps(z + i), _mm512_loadu_ps(y + i)));
  _mm_sfence();
#elif defined(__AVX2__)
  const __m256 three = _mm256_set1_ps(3.0f);
  for (size_t i = 0; i < count; i += 8)
    _mm256_stream_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(y + i), _mm256_mul_ps(three, _mm256_loadu_ps(z + i))));
  _mm_sfence();
#else
  triad(x, y, z, count);
#endif
}
