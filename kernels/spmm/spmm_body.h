// The products of spmm.cpp for one path; see each_path.h.

#include "operands_body.h"

// Four rows of a panel, `length` entries each, on COUNT vectors of samples.
template <class Vector, int COUNT, class Column, class Value>
INLINE void four_rows(const Column* column, const Value* value, int64_t length, const float* x, float* const sums[4]) {
  constexpr int WIDTH = sizeof(Vector) / sizeof(float), SAMPLES = WIDTH * COUNT;
  Vector sum[GROUP][COUNT];
  for (int i = 0; i < GROUP; ++i)
    for (int n = 0; n < COUNT; ++n) sum[i][n] = load<Vector>(sums[i] + n * WIDTH);
  for (int64_t j = 0; j < length; ++j, column += GROUP, value += GROUP) {
    __builtin_prefetch(value + 1024);  // else up to 1.7 times slower where W does not fit the L2 cache
    uint64_t columns = 0;              // of all four by one load, since it is loads that this waits for
    std::memcpy(&columns, column, GROUP * sizeof(Column));
    for (int i = 0; i < GROUP; ++i) {
      const float* from = x + int64_t(Column(columns >> 8 * sizeof(Column) * i)) * SAMPLES;
      const float weight = widen(value[i]);
      for (int n = 0; n < COUNT; ++n) sum[i][n] = weight * load<Vector>(from + n * WIDTH) + sum[i][n];
    }
  }
  for (int i = 0; i < GROUP; ++i)
    for (int n = 0; n < COUNT; ++n) store(sum[i][n], sums[i] + n * WIDTH);
}

// A tile: up to SAMPLES samples, the rows of chunks [first, last).
template <class Vector, int COUNT, class Column, class Value>
void tile(const Layout& w, const Value* value, const Part& part, Read read_x, const void* operand, float* panel,
          float* sums) {
  constexpr int SAMPLES = sizeof(Vector) / sizeof(float) * COUNT;
  for (int64_t p = 0; p < w.panels; ++p) {
    const int64_t start = p * w.panel;
    const int64_t columns = std::min(w.panel, w.columns - start);
    if (part.samples < SAMPLES) std::fill_n(panel, columns * SAMPLES, 0.0f);
    read_x(operand, part.image, part.sample, part.samples, start, columns, panel, SAMPLES);
    each_group(w, p, part.first, part.last, [=](int64_t c, const uint8_t* row, int64_t at, int64_t length) {
      float* base = sums + (c - part.first) * CHUNK * SAMPLES;
      float* const to[4] = {base + row[0] * SAMPLES, base + row[1] * SAMPLES, base + row[2] * SAMPLES,
                            base + row[3] * SAMPLES};
      four_rows<Vector, COUNT>(w.column<Column>() + at, value + at, length, panel, to);
    });
  }
}

// One sample: the lanes are the four rows of a group.
INLINE Float4 sums_of(const float* to, const uint8_t* row) {
  return Float4{to[row[0]], to[row[1]], to[row[2]], to[row[3]]};
}

INLINE void store_sums(const Float4& sum, float* to, const uint8_t* row) {
  for (int i = 0; i < GROUP; ++i) to[row[i]] = sum[i];
}

template <class Column, class Value>
INLINE Float4 entry(const Column* column, const Value* value, const float* x, Float4 sum) {
  return load<Float4>(value) * Float4{x[column[0]], x[column[1]], x[column[2]], x[column[3]]} + sum;
}

// Two groups at once, for the latency of their sums.
template <class Column, class Value>
inline void single(const Layout& w, const Value* weights, int64_t first, int64_t last, const float* x, float* sums) {
  for (int64_t p = 0; p < w.panels; ++p, x += w.panel)
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = w.start[p * w.chunks + c] * GROUP, stop = w.last_group(p, c);
      const Column* column = w.column<Column>() + at;
      const Value* value = weights + at;
      float* to = sums + (c - first) * CHUNK;
      for (int64_t g = w.first_group(p, c); g < stop; g += 2) {
        const bool pair = g + 1 < stop;
        const uint8_t* row = w.row + g * GROUP;
        const int64_t longer = w.length[g], shorter = pair ? w.length[g + 1] : 0;
        const Column* column1 = column + longer * GROUP;
        const Value* value1 = value + longer * GROUP;
        Float4 sum = sums_of(to, row), sum1 = {0, 0, 0, 0};
        if (pair) sum1 = sums_of(to, row + GROUP);
        int64_t j = 0;
        for (; j < shorter * GROUP; j += GROUP) {
          __builtin_prefetch(value + 1024 + 2 * j);
          sum = entry(column + j, value + j, x, sum);
          sum1 = entry(column1 + j, value1 + j, x, sum1);
        }
        for (; j < longer * GROUP; j += GROUP) sum = entry(column + j, value + j, x, sum);
        store_sums(sum, to, row);
        if (pair) store_sums(sum1, to, row + GROUP);
        column = column1 + shorter * GROUP;
        value = value1 + shorter * GROUP;
      }
    }
}

#if LANES == 16

INLINE __m512i wide(const uint8_t* column) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(column)));
}

INLINE __m512i wide(const uint16_t* column) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(column)));
}

// The numbers of a panel of X that 16 columns meet, by the one instruction for it: where that is fast.
struct Gathered {
  const float* x;

  Gathered(const float* x, int64_t) : x(x) {}

  template <class Column>
  INLINE __m512 operator()(const Column* column) const {
    return _mm512_i32gather_ps(wide(column), x, sizeof(float));
  }
};

// The same, from registers that hold a whole narrow panel.
struct Permuted {
  __m512 x[NARROW / 16];

  Permuted(const float* from, int64_t columns) {
    for (int64_t i = 0; i < NARROW; i += 16) {
      const int64_t left = std::clamp<int64_t>(columns - i, 0, 16);
      x[i / 16] = _mm512_maskz_loadu_ps((1 << left) - 1, from + i);
    }
  }

  INLINE __m512 operator()(const uint8_t* column) const { return among<0, NARROW>(wide(column)); }

  // Of WIDTH columns from FIRST on: an instruction knows 32, and with each further bit it is one half or the other.
  template <int FIRST, int WIDTH>
  INLINE __m512 among(__m512i column) const {
    if constexpr (WIDTH == 32) {
      return _mm512_permutex2var_ps(x[FIRST / 16], column, x[FIRST / 16 + 1]);
    } else {
      constexpr int HALF = WIDTH / 2;
      const __mmask16 second = _mm512_test_epi32_mask(column, _mm512_set1_epi32(HALF));
      return _mm512_mask_blend_ps(second, among<FIRST, HALF>(column), among<FIRST + HALF, HALF>(column));
    }
  }
};

// `single` with four entries of each row of a group at a time; Met is one of the two above.
template <class Met, class Column, class Value>
inline void single_by_sixteen(const Layout& w, const Value* weights, int64_t first, int64_t last, const float* x,
                              float* sums) {
  for (int64_t p = 0; p < w.panels; ++p, x += w.panel) {
    const Met met(x, w.columns - p * w.panel);
    each_group(w, p, first, last, [=](int64_t c, const uint8_t* row, int64_t at, int64_t length) {
      const Column* column = w.column<Column>() + at;
      const Value* value = weights + at;
      float* to = sums + (c - first) * CHUNK;
      Float4 sum = sums_of(to, row);
      int64_t j = 0;
      for (; j + 16 <= length * GROUP; j += 16) {
        __builtin_prefetch(value + 1024 + j);
        float found[16];  // read back by fours, which is faster than to extract them
        _mm512_storeu_ps(found, met(column + j));
        for (int i = 0; i < 16; i += GROUP) sum = load<Float4>(value + j + i) * load<Float4>(found + i) + sum;
      }
      for (; j < length * GROUP; j += GROUP) sum = entry(column + j, value + j, x, sum);
      store_sums(sum, to, row);
    });
  }
}

#endif

template <class Column, class Value, class Operand>
inline void product(const Layout& w, const Value* value, const Operand& operand, const float* bias, const Part& part,
                    float* scratch) {
  const int64_t rows = std::min(part.last * CHUNK, w.rows) - part.first * CHUNK;
  const int64_t padded = (rows + GROUP - 1) / GROUP * GROUP, row = part.first * CHUNK;
  float* panel = scratch;
  float* sums = scratch + (part.width == 1 ? w.columns : part.width * w.panel);
  std::fill_n(sums, padded * part.width, 0.0f);
  if (bias)
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums + r * part.width, part.width, bias[row + r]);
#define TILE(VECTOR, COUNT) tile<VECTOR, COUNT, Column>(w, value, part, read_any<Operand>, &operand, panel, sums)
  switch (part.width) {
#if LANES == 16
    case 32: TILE(Float16, 2); break;
    case 16: TILE(Float16, 1); break;
    case 8: TILE(Float8, 1); break;
#elif LANES == 8
    case 16: TILE(Float8, 2); break;
    case 8: TILE(Float8, 1); break;
#else
    case 8: TILE(Float4, 2); break;
#endif
    case 4: TILE(Float4, 1); break;
    default: read(operand, part.image, part.sample, 1, 0, w.columns, panel, 1);
#if LANES == 16
      if (gathers_fast()) {
        single_by_sixteen<Gathered, Column>(w, value, part.first, part.last, panel, sums);
        break;
      }
      if constexpr (sizeof(Column) == 1) {
        single_by_sixteen<Permuted, Column>(w, value, part.first, part.last, panel, sums);
        break;
      }
#endif
      single<Column>(w, value, part.first, part.last, panel, sums);
  }
#undef TILE
  write(operand, part.image, part.sample, part.samples, row, rows, sums, part.width);
}
