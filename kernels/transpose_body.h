// Transposition for one path; see each_path.h.

#if LANES == 16
INLINE void transpose16(const float* from, int64_t from_step, float* to, int64_t to_step) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_step);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), b[4 + i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_ps(to + i * to_step, _mm512_shuffle_f32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_ps(to + (8 + i) * to_step, _mm512_shuffle_f32x4(b[i], b[8 + i], 0xdd));
  }
}
#endif

template <class From, class To>
INLINE void transpose4(const From* from, int64_t from_step, To* to, int64_t to_step) {
  const Float4 a = load<Float4>(from), b = load<Float4>(from + from_step);
  const Float4 c = load<Float4>(from + 2 * from_step), d = load<Float4>(from + 3 * from_step);
  const Float4 e = SHUFFLE(a, b, 0, 4, 1, 5), f = SHUFFLE(a, b, 2, 6, 3, 7);
  const Float4 g = SHUFFLE(c, d, 0, 4, 1, 5), h = SHUFFLE(c, d, 2, 6, 3, 7);
  store(SHUFFLE(e, g, 0, 1, 4, 5), to), store(SHUFFLE(e, g, 2, 3, 6, 7), to + to_step);
  store(SHUFFLE(f, h, 0, 1, 4, 5), to + 2 * to_step), store(SHUFFLE(f, h, 2, 3, 6, 7), to + 3 * to_step);
}

// to[c * to_step + r] = from[r * from_step + c] for all r < rows, c < columns; either may be float or bfloat16.
template <class From, class To>
inline void transpose(const From* from, int64_t from_step, int64_t rows, int64_t columns, To* to, int64_t to_step) {
  constexpr int64_t SIDE = 16;
  if ((rows == 1 && to_step == 1) || (columns == 1 && from_step == 1)) {  // one sample's: a copy
    for (int64_t i = 0; i < rows * columns; ++i) narrow(widen(from[i]), to + i);
    return;
  }
  for (int64_t row = 0; row < rows; row += SIDE)
    for (int64_t column = 0; column < columns; column += SIDE) {
      const int64_t last_row = std::min(rows, row + SIDE), last_column = std::min(columns, column + SIDE);
#if LANES == 16
      if constexpr (std::is_same<From, float>::value && std::is_same<To, float>::value)
        if (last_row - row == SIDE && last_column - column == SIDE) {
          transpose16(from + row * from_step + column, from_step, to + column * to_step + row, to_step);
          continue;
        }
#endif
      int64_t r = row;
      for (; r + 4 <= last_row; r += 4) {
        int64_t c = column;
        for (; c + 4 <= last_column; c += 4)
          transpose4(from + r * from_step + c, from_step, to + c * to_step + r, to_step);
        for (; c < last_column; ++c)
          for (int64_t i = r; i < r + 4; ++i) narrow(widen(from[i * from_step + c]), to + c * to_step + i);
      }
      for (; r < last_row; ++r)
        for (int64_t c = column; c < last_column; ++c) narrow(widen(from[r * from_step + c]), to + c * to_step + r);
    }
}

// `transpose` into floats from an array of floats or bfloat16, so that what works on the floats is compiled once for
// both.
typedef void (*Pack)(const void* from, int64_t at, int64_t from_step, int64_t rows, int64_t columns, float* to,
                     int64_t to_step);

template <class From>
void pack(const void* from, int64_t at, int64_t from_step, int64_t rows, int64_t columns, float* to, int64_t to_step) {
  transpose(static_cast<const From*>(from) + at, from_step, rows, columns, to, to_step);
}
