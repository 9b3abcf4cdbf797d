// The products of sddmm.cpp for one path; see each_path.h.

#include "../fold_body.h"
#include "../transpose_body.h"

// The sums of the elements of four vectors.
template <class Vector>
INLINE Float4 sums(const Vector* each) {
  const Float4 a = fold(each[0]), b = fold(each[1]), c = fold(each[2]), d = fold(each[3]);
  const Float4 low = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
  const Float4 high = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
  return SHUFFLE(low, high, 0, 1, 4, 5) + SHUFFLE(low, high, 2, 3, 6, 7);
}

// Adds to `length` entries of four rows the products of COUNT vectors of samples.
template <class Vector, int COUNT, class Column>
INLINE void four_rows(const Column* column, int64_t length, const float* x, const float* const rows[4], float* value) {
  constexpr int WIDTH = sizeof(Vector) / sizeof(float), SAMPLES = WIDTH * COUNT;
  Vector row[GROUP][COUNT];
  for (int i = 0; i < GROUP; ++i)
    for (int n = 0; n < COUNT; ++n) row[i][n] = load<Vector>(rows[i] + n * WIDTH);
  for (int64_t j = 0; j < length; ++j, column += GROUP, value += GROUP) {
    Vector sum[GROUP];
    for (int i = 0; i < GROUP; ++i) {
      const float* from = x + int64_t(column[i]) * SAMPLES;
      sum[i] = row[i][0] * load<Vector>(from);
      for (int n = 1; n < COUNT; ++n) sum[i] = row[i][n] * load<Vector>(from + n * WIDTH) + sum[i];
    }
    store(load<Float4>(value) + sums(sum), value);
  }
}

// A tile: up to SAMPLES samples, the rows of chunks [first, last).
template <class Vector, int COUNT, class Column>
void tile(const Layout& w, int64_t first, int64_t last, Pack pack_x, const void* x, const void* dy, int64_t samples,
          float* panel, float* lines, float* value) {
  constexpr int SAMPLES = sizeof(Vector) / sizeof(float) * COUNT;
  const int64_t rows = std::min(last * CHUNK, w.rows) - first * CHUNK;
  const int64_t padded = (rows + GROUP - 1) / GROUP * GROUP, clean = samples < SAMPLES ? 0 : rows;
  std::fill_n(lines + clean * SAMPLES, (padded - clean) * SAMPLES, 0.0f);
  pack_x(dy, first * CHUNK, w.rows, samples, rows, lines, SAMPLES);
  for (int64_t p = 0; p < w.panels; ++p) {
    const int64_t start = p * w.panel, columns = std::min(w.panel, w.columns - start);
    if (samples < SAMPLES) std::fill_n(panel, columns * SAMPLES, 0.0f);
    pack_x(x, start, w.columns, samples, columns, panel, SAMPLES);
    each_group(w, p, first, last, [=](int64_t c, const uint8_t* row, int64_t at, int64_t length) {
      const float* base = lines + (c - first) * CHUNK * SAMPLES;
      const float* const from[4] = {base + row[0] * SAMPLES, base + row[1] * SAMPLES, base + row[2] * SAMPLES,
                                    base + row[3] * SAMPLES};
      four_rows<Vector, COUNT>(w.column<Column>() + at, length, panel, from, value + at);
    });
  }
}

// The entries of chunks [first, last), summed over the batch.
template <class Column, class Element>
inline void product(const Layout& w, int64_t first, int64_t last, const Element* x, const Element* dy, int64_t batch,
                    float* scratch, float* value) {
  for (int64_t p = 0; p < w.panels; ++p) {
    const int64_t from = w.start[p * w.chunks + first], to = w.start[p * w.chunks + last];
    std::fill_n(value + from * GROUP, (to - from) * GROUP, 0.0f);
  }
  float* lines = scratch + LARGEST_TILE * w.panel;
  for (int64_t s = 0; s < batch;) {
    const int64_t left = batch - s;
    const Element *own_x = x + s * w.columns, *own_dy = dy + s * w.rows;
#if LANES == 16
    if (left > 32) {
      tile<Float16, 4, Column>(w, first, last, pack<Element>, own_x, own_dy, std::min<int64_t>(left, 64), scratch,
                               lines, value);
      s += 64;
      continue;
    }
    typedef Float16 Widest;
#elif LANES == 8
    typedef Float8 Widest;
#else
    typedef Float4 Widest;
#endif
    tile<Widest, 2, Column>(w, first, last, pack<Element>, own_x, own_dy, std::min<int64_t>(left, 2 * LANES), scratch,
                            lines, value);
    s += 2 * LANES;
  }
}
