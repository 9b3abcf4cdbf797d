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

// UNIT rows of Y for COUNT samples, of which `samples` are there and `rows` rows.
template <int COUNT, class Value, class Element>
inline void tile(const Blocks& w, int64_t block_row, const Value* value, const float* packed, int64_t unit,
                 const float* bias, Element* y, int64_t samples, int64_t rows) {
  Vector sum[COUNT][VECTORS];
  for (int i = 0; i < COUNT; ++i)
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = load<Vector>(bias + v * LANES);
  for (int64_t block = w.start[block_row]; block < w.start[block_row + 1]; ++block) {
    const float* x = packed + w.column[block] * w.units() * unit;
    const Value* weights = value + block * w.side * w.side;
    for (int64_t u = 0; u < w.units(); ++u, x += unit, weights += UNIT * w.side)
      add_products<COUNT, UNIT, 1>(sum, x, weights, w.side, UNIT);
  }
  for (int i = 0; i < COUNT && i < samples; ++i, y += w.rows) {
    if (rows == UNIT) {
      for (int v = 0; v < VECTORS; ++v) store(sum[i][v], y + v * LANES);
    } else {
      float line[UNIT];
      for (int v = 0; v < VECTORS; ++v) store(sum[i][v], line + v * LANES);
      for (int64_t r = 0; r < rows; ++r) narrow(line[r], y + r);
    }
  }
}

// Y of a part: its samples, the rows of its block rows.
template <class Value, class Element>
inline void product(const Blocks& w, const Value* value, const Element* x, const float* bias, Element* y,
                    const Part& part, float* packed) {
  const int64_t padded = (part.samples + WIDEST - 1) / WIDEST * WIDEST, unit = padded * UNIT;
  pack(x + part.sample * w.columns, w.columns, w.columns, w.block_columns() * w.side, part.samples, padded, packed);
  for (int64_t block_row = part.first; block_row < part.last; ++block_row)
    for (int64_t u = 0; u < w.units(); ++u) {
      const int64_t row = block_row * w.side + u * UNIT, rows = std::min<int64_t>(UNIT, w.rows - row);
      if (rows <= 0) break;
      float own_bias[UNIT] = {};
      if (bias) std::copy_n(bias + row, rows, own_bias);
      for (int64_t s = 0; s < part.samples;) {
        const int64_t left = part.samples - s;
        Element* to = y + (part.sample + s) * w.rows + row;
        s += with_width<WIDEST>(left, [&](auto width) {
          tile<decltype(width)::value>(w, block_row, value + u * UNIT, packed + s * UNIT, unit, own_bias, to, left,
                                       rows);
        });
      }
    }
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
