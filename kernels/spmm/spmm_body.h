// The products of spmm.cpp for one path; see each_path.h.

#include "../transpose_body.h"

// Four rows of a panel, `length` entries each, on COUNT vectors of samples.
template <class Vector, int COUNT, class Column, class Value>
INLINE void four_rows(const Column* column, const Value* value, int64_t length, const float* x, float* const sums[4]) {
  constexpr int WIDTH = sizeof(Vector) / sizeof(float), SAMPLES = WIDTH * COUNT;
  Vector sum[GROUP][COUNT];
  for (int i = 0; i < GROUP; ++i)
    for (int n = 0; n < COUNT; ++n) sum[i][n] = load<Vector>(sums[i] + n * WIDTH);
  for (int64_t j = 0; j < length; ++j, column += GROUP, value += GROUP)
    for (int i = 0; i < GROUP; ++i) {
      const float* from = x + int64_t(column[i]) * SAMPLES;
      const float weight = widen(value[i]);
      for (int n = 0; n < COUNT; ++n) sum[i][n] = weight * load<Vector>(from + n * WIDTH) + sum[i][n];
    }
  for (int i = 0; i < GROUP; ++i)
    for (int n = 0; n < COUNT; ++n) store(sum[i][n], sums[i] + n * WIDTH);
}

// A tile: up to SAMPLES samples, the rows of chunks [first, last).
template <class Vector, int COUNT, class Column, class Value>
void tile(const Layout& w, const Value* value, int64_t first, int64_t last, Pack pack_x, const void* x, int64_t samples,
          float* panel, float* sums) {
  constexpr int SAMPLES = sizeof(Vector) / sizeof(float) * COUNT;
  for (int64_t p = 0; p < w.panels; ++p) {
    const int64_t start = p * w.panel;
    const int64_t columns = std::min(w.panel, w.columns - start);
    if (samples < SAMPLES) std::fill_n(panel, columns * SAMPLES, 0.0f);
    pack_x(x, start, w.columns, samples, columns, panel, SAMPLES);
    for (int64_t c = first; c < last; ++c) {
      int64_t at = w.start[p * w.chunks + c] * GROUP;
      float* base = sums + (c - first) * CHUNK * SAMPLES;
      const int64_t stop = w.last_group(p, c);
      for (int64_t g = w.first_group(p, c); g < stop; ++g) {
        const uint8_t* row = w.row + g * GROUP;
        float* const to[4] = {base + row[0] * SAMPLES, base + row[1] * SAMPLES, base + row[2] * SAMPLES,
                              base + row[3] * SAMPLES};
        four_rows<Vector, COUNT>(w.column<Column>() + at, value + at, w.length[g], panel, to);
        at += w.length[g] * GROUP;
      }
    }
  }
}

// One sample: the lanes are the four rows of a group; two groups at once, for their latency.
template <class Column, class Value>
INLINE Float4 entry(const Column* column, const Value* value, const float* x, Float4 sum) {
  return load4(value) * Float4{x[column[0]], x[column[1]], x[column[2]], x[column[3]]} + sum;
}

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
        Float4 sum = {to[row[0]], to[row[1]], to[row[2]], to[row[3]]}, sum1 = {0, 0, 0, 0};
        if (pair) sum1 = Float4{to[row[4]], to[row[5]], to[row[6]], to[row[7]]};
        int64_t j = 0;
        for (; j < shorter * GROUP; j += GROUP) {
          __builtin_prefetch(value + 1024 + 2 * j);
          sum = entry(column + j, value + j, x, sum);
          sum1 = entry(column1 + j, value1 + j, x, sum1);
        }
        for (; j < longer * GROUP; j += GROUP) sum = entry(column + j, value + j, x, sum);
        for (int i = 0; i < GROUP; ++i) to[row[i]] = sum[i];
        for (int i = 0; pair && i < GROUP; ++i) to[row[4 + i]] = sum1[i];
        column = column1 + shorter * GROUP;
        value = value1 + shorter * GROUP;
      }
    }
}

template <class Vector, int64_t SAMPLES, class Column, class Value, class Element>
INLINE void tile_there_and_back(const Layout& w, const Value* value, const Part& part, const Element* x, float* panel,
                                float* sums, int64_t rows, Element* y) {
  constexpr int COUNT = SAMPLES * sizeof(float) / sizeof(Vector);
  tile<Vector, COUNT, Column>(w, value, part.first, part.last, pack<Element>, x, part.samples, panel, sums);
  transpose(sums, SAMPLES, rows, part.samples, y, w.rows);
}

template <class Column, class Value, class Element>
inline void product(const Layout& w, const Value* value, const Element* x, const float* bias, Element* y,
                    const Part& part, float* scratch) {
  const int64_t rows = std::min(part.last * CHUNK, w.rows) - part.first * CHUNK;
  const int64_t padded = (rows + GROUP - 1) / GROUP * GROUP, row = part.first * CHUNK;
  float* panel = scratch;
  float* sums = scratch + (part.width == 1 ? w.columns : part.width * w.panel);
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t s = 0; s < part.width; ++s) sums[r * part.width + s] = bias && r < rows ? bias[row + r] : 0.0f;
  x += part.sample * w.columns;
  y += part.sample * w.rows + row;
#if LANES == 16
  if (part.width == 32) return tile_there_and_back<Float16, 32, Column>(w, value, part, x, panel, sums, rows, y);
  if (part.width == 16) return tile_there_and_back<Float16, 16, Column>(w, value, part, x, panel, sums, rows, y);
#elif LANES == 8
  if (part.width == 16) return tile_there_and_back<Float8, 16, Column>(w, value, part, x, panel, sums, rows, y);
#endif
#if LANES >= 8
  if (part.width == 8) return tile_there_and_back<Float8, 8, Column>(w, value, part, x, panel, sums, rows, y);
#else
  if (part.width == 8) return tile_there_and_back<Float4, 8, Column>(w, value, part, x, panel, sums, rows, y);
#endif
  if (part.width == 4) return tile_there_and_back<Float4, 4, Column>(w, value, part, x, panel, sums, rows, y);
  for (int64_t k = 0; k < w.columns; ++k) panel[k] = widen(x[k]);
  single<Column>(w, value, part.first, part.last, panel, sums);
  for (int64_t r = 0; r < rows; ++r) narrow(sums[r], y + r);
}
