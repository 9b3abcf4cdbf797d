// The product of two_of_four.cpp for one path; see each_path.h.

#include "../fold_body.h"

// Codes are the places of a vector's lanes, two bits each; `pick` gives lane i of x from place code[i] of its own four.
#if LANES == 16

typedef Float16 Vector;
constexpr int WIDEST = 4;  // samples

INLINE __m512i places(uint32_t code) {
  return _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(code)),
                           _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
}

INLINE Vector pick(const float* x, __m512i places) { return Vector(_mm512_permutevar_ps(_mm512_loadu_ps(x), places)); }

#elif LANES == 8

typedef Float8 Vector;
constexpr int WIDEST = 2;

INLINE __m256i places(uint32_t code) {
  return _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(code)), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
}

INLINE Vector pick(const float* x, __m256i places) { return Vector(_mm256_permutevar_ps(_mm256_loadu_ps(x), places)); }

#else

typedef Float4 Vector;
constexpr int WIDEST = 2;

INLINE uint32_t places(uint32_t code) { return code; }

INLINE Vector pick(const float* x, uint32_t places) {
  return Vector{x[places & 3], x[places >> 2 & 3], x[places >> 4 & 3], x[places >> 6 & 3]};
}

#endif

// Eight rows of Y for COUNT samples, of which `samples` are there and `rows` rows.
template <int COUNT, class Value, class Element>
inline void tile(int64_t units, const uint32_t* code, const Value* value, const float* x, int64_t unit,
                 const float* bias, Element* y, int64_t step, int64_t samples, int64_t rows) {
  Vector sum[PAIRS][COUNT] = {};
  for (int64_t u = 0; u < units; ++u, code += PAIRS, value += PAIRS * UNIT, x += unit)
    for (int v = 0; v < UNIT; v += LANES)
#pragma GCC unroll 4  // sums stay in registers only so
      for (int p = 0; p < PAIRS; ++p) {
        const auto at = places(code[p] >> 2 * v);
        const Vector weights = load<Vector>(value + p * UNIT + v);
        for (int i = 0; i < COUNT; ++i) sum[p][i] = weights * pick(x + i * UNIT + v, at) + sum[p][i];
      }
  for (int i = 0; i < COUNT && i < samples; ++i, y += step)
    for (int p = 0; p < PAIRS; ++p) {
      const Float4 both = fold(sum[p][i]);
      for (int r = 2 * p; r < 2 * p + 2 && r < rows; ++r)
        narrow(both[r % 2 * 2] + both[r % 2 * 2 + 1] + (bias ? bias[r] : 0.0f), y + r);
    }
}

// Y of a part: its samples, the rows of its stripes.
template <class Value, class Element>
inline void product(const TwoOfFour& w, const Value* value, const Element* x, const float* bias, Element* y,
                    const Part& part, float* packed) {
  const int64_t places = places_for<WIDEST>(part.samples), unit = places * UNIT, units = w.units();
  pack(x + part.sample * w.columns, w.columns, w.columns, units * UNIT, part.samples, places, packed);
  for (int64_t stripe = part.first; stripe < part.last; ++stripe) {
    const int64_t row = stripe * 2 * PAIRS, at = stripe * units * PAIRS;
    for (int64_t s = 0; s < part.samples;) {
      const int64_t left = part.samples - s;
      Element* to = y + (part.sample + s) * w.rows + row;
      s += with_width<WIDEST>(left, [&](auto width) {
        tile<decltype(width)::value>(units, w.code + at, value + at * UNIT, packed + s * UNIT, unit,
                                     bias ? bias + row : nullptr, to, w.rows, left, w.rows - row);
      });
    }
  }
}
