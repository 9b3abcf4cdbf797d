// The products of blocks.cpp for one path; see each_path.h.

#if LANES == 16
typedef Float16 Vector;
constexpr int WIDEST = 16;  // lines of sums that fit the registers, each UNIT floats
#elif LANES == 8
typedef Float8 Vector;
constexpr int WIDEST = 4;
#else
typedef Float4 Vector;
constexpr int WIDEST = 2;
#endif
constexpr int VECTORS = UNIT / LANES;

// sum[i] += a[i * ACROSS + k * DOWN] b[k * step ...], over k < length: an outer product a step.
template <int COUNT, int ACROSS, int DOWN, class Value>
INLINE void add_products(Vector (&sum)[COUNT][VECTORS], const float* a, const Value* b, int64_t step, int64_t length) {
  for (int64_t k = 0; k < length; ++k, a += DOWN, b += step) {
    Vector line[VECTORS];
    for (int v = 0; v < VECTORS; ++v) line[v] = load<Vector>(b + v * LANES);
    for (int i = 0; i < COUNT; ++i)
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = a[i * ACROSS] * line[v] + sum[i][v];
  }
}

// ROWS times UNIT rows of Y, from `row` on, for COUNT samples, of which `samples` are there. The sums of rows, as those
// of samples, hide each other's latency.
template <int COUNT, int ROWS, class Value, class Element>
inline void tile(const Blocks& w, int64_t row, const Value* value, const float* packed, int64_t unit, const float* bias,
                 Element* y, int64_t samples) {
  Vector sum[ROWS][COUNT][VECTORS];
  int64_t next[ROWS], last[ROWS], together = w.block_columns();
  for (int r = 0; r < ROWS; ++r) {
    const int64_t first = row + r * UNIT, block_row = w.block_row(first);
    float own_bias[UNIT] = {};
    if (bias) std::copy_n(bias + first, std::min(UNIT, w.rows - first), own_bias);
    for (int i = 0; i < COUNT; ++i)
      for (int v = 0; v < VECTORS; ++v) sum[r][i][v] = load<Vector>(own_bias + v * LANES);
    next[r] = w.start[block_row];
    last[r] = w.start[block_row + 1];
    together = std::min(together, last[r] - next[r]);
  }
  const auto add_block = [&](int r) {
    const int64_t block = next[r]++;
    const float* x = packed + w.column[block] * w.units() * unit;
    const Value* weights = value + block * w.side * w.side + ((row + r * UNIT) & (w.side - 1));
    for (int64_t u = 0; u < w.units(); ++u, x += unit, weights += UNIT * w.side)
      add_products<COUNT, UNIT, 1>(sum[r], x, weights, w.side, UNIT);
  };
  for (int64_t i = 0; i < together; ++i)
#pragma GCC unroll 4  // sums stay in registers only so
    for (int r = 0; r < ROWS; ++r) add_block(r);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
    while (next[r] < last[r]) add_block(r);
  for (int i = 0; i < COUNT && i < samples; ++i, y += w.rows)
    for (int r = 0; r < ROWS; ++r) {
      const int64_t rows = w.rows - row - r * UNIT;
      Element* to = y + row + r * UNIT;
      if (rows >= UNIT) {
        for (int v = 0; v < VECTORS; ++v) store(sum[r][i][v], to + v * LANES);
      } else {
        float line[UNIT];
        for (int v = 0; v < VECTORS; ++v) store(sum[r][i][v], line + v * LANES);
        for (int64_t j = 0; j < rows; ++j) narrow(line[j], to + j);
      }
    }
}

// Y of a part's samples, from row `row` up to `end`, in steps of ROWS units as long as there are so many; gives where
// it ends.
template <int ROWS, class Value, class Element>
inline int64_t rows_of(const Blocks& w, const Value* value, const float* packed, int64_t places, const float* bias,
                       Element* y, int64_t samples, int64_t row, int64_t end) {
  for (; row + (ROWS - 1) * UNIT < end; row += ROWS * UNIT)
    for (int64_t s = 0; s < samples;)
      s += with_width<WIDEST>(samples - s, [&](auto width) {
        constexpr int COUNT = decltype(width)::value;
        tile<COUNT, ROWS>(w, row, value, packed + s * UNIT, places * UNIT, bias, y + s * w.rows, samples - s);
      });
  return row;
}

// Y of a part: its samples, the rows of its block rows.
template <class Value, class Element>
inline void product(const Blocks& w, const Value* value, const Element* x, const float* bias, Element* y,
                    const Part& part, float* packed) {
  const int64_t places = places_for<WIDEST>(part.samples), end = std::min(part.last * w.side, w.rows);
  int64_t row = part.first * w.side;
  pack(x + part.sample * w.columns, w.columns, w.columns, w.block_columns() * w.side, part.samples, places, packed);
  y += part.sample * w.rows;
  if (part.samples * VECTORS <= 4) row = rows_of<4>(w, value, packed, places, bias, y, part.samples, row, end);
  rows_of<1>(w, value, packed, places, bias, y, part.samples, row, end);
}

// UNIT neighbouring survivors, of which `width` are inside the matrix.
INLINE void load_line(const float* from, int64_t width, Vector (&line)[VECTORS]) {
  float whole[UNIT] = {};
  if (width < UNIT) std::copy_n(from, width, whole);
  const float* at = width < UNIT ? whole : from;
  for (int v = 0; v < VECTORS; ++v) line[v] = load<Vector>(at + v * LANES);
}

INLINE void store_line(const Vector (&line)[VECTORS], int64_t width, float* to) {
  float whole[UNIT];
  float* at = width < UNIT ? whole : to;
  for (int v = 0; v < VECTORS; ++v) store(line[v], at + v * LANES);
  if (width < UNIT) std::copy_n(whole, width, to);
}

// Adds to the gradient of the blocks of [first, last) what `samples` samples give, both operands packed; the first
// samples of all begin it.
inline void gradient(const Blocks& w, const int32_t* order, int64_t first, int64_t last, const float* x,
                     const float* dy, int64_t samples, bool begin, float* survivors) {
  const int64_t unit = samples * UNIT;
  for (int64_t block_row = first; block_row < last; ++block_row)
    for (int64_t block = w.start[block_row]; block < w.start[block_row + 1]; ++block) {
      const int64_t rows = std::min(w.side, w.rows - block_row * w.side);
      const int32_t* place = order + block * w.side * w.side;  // where each row's survivors begin
      for (int64_t i = 0; i < rows; i += WIDEST)
        for (int64_t u = 0; u < w.units(); ++u) {
          const int64_t column_unit = w.column[block] * w.units() + u;
          const int64_t width = std::min(UNIT, w.columns - column_unit * UNIT);
          if (width <= 0) break;
          const float* lines = dy + ((block_row - first) * w.units() + i / UNIT) * unit + i % UNIT;
          float* to = survivors + u * UNIT;
          Vector sum[WIDEST][VECTORS] = {};
          if (!begin)
            for (int j = 0; j < WIDEST && i + j < rows; ++j) load_line(to + place[i + j], width, sum[j]);
          add_products<WIDEST, 1, UNIT>(sum, lines, x + column_unit * unit, UNIT, samples);
          for (int j = 0; j < WIDEST && i + j < rows; ++j) store_line(sum[j], width, to + place[i + j]);
        }
    }
}
