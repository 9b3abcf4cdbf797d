// Y = X W^T + bias for a pruned W as its mask and its survivors in a row, sample by sample.
//
// At 50 to 80 % an index for each survivor costs as much as the zeros would. The mask's own bits cost 1 bit a weight,
// and the survivors lie as they are packed everywhere else, so there is nothing to lay out. Sixteen survivors are
// loaded at once and spread to where the mask's next 16 bits have ones. A weight is used once for each sample, so this
// is for one sample or a few; memory read falls with the density.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable, 2. avx2: survivor by survivor
// 3. avx512: with the instruction that expands

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "../product.h"
#include "../vectors.h"

namespace hpcprune {
namespace {

constexpr int64_t BYTES_AFTER = 8, VALUES_AFTER = 16;  // of the bits and of the values, which a vector's load may touch

// How many of the bits [first, last) are ones.
int64_t ones(const uint8_t* bits, int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i) count += bits[i / 8] >> i % 8 & 1;
  return count;
}

// `first` [rows] says where a row's survivors begin.
template <class Value>
struct Bitmap {
  int64_t rows, columns;
  const uint8_t* bits;
  const int64_t* first;
  const Value* value;
};

}  // namespace
}  // namespace hpcprune

#define BODY "spmm/bitmap_body.h"
#include "../each_path.h"

namespace hpcprune {
namespace {

template <class Value, class Element>
int multiply(const Product& of, const Bitmap<Value>& w, const Element* x, Element* y) {
  const int64_t length = (w.columns + 47) / 16 * 16;
  float* wide = static_cast<float*>(std::aligned_alloc(64, length * sizeof(float)));
  if (!wide) return NO_MEMORY;
  const int64_t runs = std::min<int64_t>(of.threads_for(w.rows * w.columns / 16), w.rows);
  for (int64_t sample = 0; sample < of.batch; ++sample, x += w.columns, y += w.rows) {
    for (int64_t k = 0; k < w.columns; ++k) wide[k] = widen(x[k]);
    std::fill(wide + w.columns, wide + length, 0.0f);
    in_pool(of.pool, runs, [&](int64_t run) {
      const int64_t first = w.rows * run / runs, last = w.rows * (run + 1) / runs;
      ON_PATH(of.path, bitmap_rows(w, first, last, wide, of.bias, y));
    });
  }
  std::free(wide);
  return DONE;
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// Of W: `bits` and how many bytes, `first` and how many; with what is beyond the ends, as `value` too. A Status.
int hpcprune_bitmap(const hpcprune::Product* of) {
  using namespace hpcprune;
  const uint8_t* bits = of->array<uint8_t>(0);
  const int64_t bytes = of->matrix[1], *first = of->array<int64_t>(2), firsts = of->matrix[3];
  const int64_t rows = of->rows, columns = of->columns, survivors = of->values - VALUES_AFTER;
  if (firsts != rows || bytes != (rows * columns + 7) / 8 + BYTES_AFTER) return DOES_NOT_FIT;
  if (rows == 0) return DONE;
  if (survivors != first[rows - 1] + ones(bits, (rows - 1) * columns, rows * columns)) return DOES_NOT_FIT;
  return with_types(of->kind, of->value, of->x, of->y, [&](const auto* weights, const auto* from, auto* to) {
    const Bitmap<std::decay_t<decltype(*weights)>> w{rows, columns, bits, first, weights};
    return multiply(*of, w, from, to);
  });
}
}
