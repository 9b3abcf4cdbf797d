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

#if LANES == 16
// As above. Blends, which go where shuffles cannot, take the place of half of those.
template <>
INLINE Float4 sums<Float16>(const Float16* each) {
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_mask_blend_ps(0xff00, a, b) + _mm512_shuffle_f32x4(a, b, 0x4e);
  };
  const __m512 ab = halves(__m512(each[0]), __m512(each[1])), cd = halves(__m512(each[2]), __m512(each[3]));
  const __m512 crossed = _mm512_mask_blend_ps(0x0f0f, ab, cd);
  const __m512 acbd = _mm512_mask_blend_ps(0xf0f0, ab, cd) + _mm512_shuffle_f32x4(crossed, crossed, 0xb1);
  const __m512 pairs = acbd + _mm512_permute_ps(acbd, 0x4e), all = pairs + _mm512_permute_ps(pairs, 0xb1);
  return Float4(_mm512_castps512_ps128(
      _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 4, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), all)));
}
#endif

// Where the sums of entries go: to `value` while samples are still to come, and from there to their survivors.
struct Sums {
  float* value;
  const int32_t* order;
  float* packed;
  uint32_t survivors;
  bool first, last;  // of the tiles of samples

  INLINE void add(int64_t at, Float4 sum) const {
    if (!first) sum += load<Float4>(value + at);
    if (!last) return store(sum, value + at);
    for (int i = 0; i < GROUP; ++i)
      if (uint32_t(order[at + i]) < survivors) packed[order[at + i]] = sum[i];
  }
};

// The products of COUNT vectors of samples, for `length` entries of four rows.
template <class Vector, int COUNT, class Column>
INLINE void four_rows(const Column* column, int64_t length, const float* x, const float* const rows[4], int64_t at,
                      const Sums& to) {
  constexpr int WIDTH = sizeof(Vector) / sizeof(float), SAMPLES = WIDTH * COUNT;
  Vector row[GROUP][COUNT];
  for (int i = 0; i < GROUP; ++i)
    for (int n = 0; n < COUNT; ++n) row[i][n] = load<Vector>(rows[i] + n * WIDTH);
  for (int64_t j = 0; j < length * GROUP; j += GROUP) {
    Vector sum[GROUP];
    for (int i = 0; i < GROUP; ++i) {
      const float* from = x + int64_t(column[j + i]) * SAMPLES;
      sum[i] = row[i][0] * load<Vector>(from);
      for (int n = 1; n < COUNT; ++n) sum[i] = row[i][n] * load<Vector>(from + n * WIDTH) + sum[i];
    }
    to.add(at + j, sums(sum));
  }
}

// A tile: up to SAMPLES samples, the rows of chunks [first, last).
template <class Vector, int COUNT, class Column>
void tile(const Layout& w, int64_t first, int64_t last, Pack pack_x, const void* x, const void* dy, int64_t samples,
          float* panel, float* lines, const Sums& to) {
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
      four_rows<Vector, COUNT>(w.column<Column>() + at, length, panel, from, at, to);
    });
  }
}

// The entries of chunks [first, last), summed over the batch.
template <class Column, class Element>
inline void product(const Layout& w, int64_t first, int64_t last, const Element* x, const Element* dy, int64_t batch,
                    float* scratch, Sums to) {
  float* lines = scratch + LARGEST_TILE * w.panel;
  int64_t sample = 0;
  do {  // without samples there are sums too: zeros
    const int64_t left = batch - sample;
    int64_t width = 0;
    const auto run = [&](auto tile, int64_t widest) {
      width = widest;
      to.first = sample == 0, to.last = left <= width;
      tile(w, first, last, pack<Element>, x + sample * w.columns, dy + sample * w.rows, std::min(left, width), scratch,
           lines, to);
    };
    if (left <= 4) run(tile<Float4, 1, Column>, 4);
#if LANES == 16
    else if (left <= 8)
      run(tile<Float8, 1, Column>, 8);
    else if (left <= 16)
      run(tile<Float16, 1, Column>, 16);
    else if (left <= 32)
      run(tile<Float16, 2, Column>, 32);
    else
      run(tile<Float16, 4, Column>, 64);
#elif LANES == 8
    else if (left <= 8)
      run(tile<Float8, 1, Column>, 8);
    else
      run(tile<Float8, 2, Column>, 16);
#else
    else
      run(tile<Float4, 2, Column>, 8);
#endif
    sample += width;
  } while (sample < batch);
}
