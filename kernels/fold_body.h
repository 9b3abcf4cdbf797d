// A vector's lanes added up by their place among four, for one path; see each_path.h.

INLINE Float4 fold(Float4 value) { return value; }
#if LANES >= 8
INLINE Float4 fold(Float8 value) {
  return Float4(_mm_add_ps(_mm256_castps256_ps128(__m256(value)), _mm256_extractf128_ps(__m256(value), 1)));
}
#endif
#if LANES == 16
INLINE Float4 fold(Float16 value) {
  return fold(Float8(_mm256_add_ps(_mm512_castps512_ps256(__m512(value)), _mm512_extractf32x8_ps(__m512(value), 1))));
}
#endif
