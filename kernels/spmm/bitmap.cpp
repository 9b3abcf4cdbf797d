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

#include "../paths.h"
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
int multiply(int path, const Bitmap<Value>& w, const Element* x, int64_t batch, const float* bias, Element* y,
             int threads, const Pool* pool) {
  const int64_t length = (w.columns + 47) / 16 * 16;
  float* wide = static_cast<float*>(std::aligned_alloc(64, length * sizeof(float)));
  if (!wide) return NO_MEMORY;
  const int64_t runs = std::max<int64_t>(1, std::min<int64_t>(threads_for(w.rows * w.columns / 16, threads), w.rows));
  for (int64_t sample = 0; sample < batch; ++sample, x += w.columns, y += w.rows) {
    for (int64_t k = 0; k < w.columns; ++k) wide[k] = widen(x[k]);
    std::fill(wide + w.columns, wide + length, 0.0f);
    in_pool(pool, runs, [&](int64_t run) {
      const int64_t first = w.rows * run / runs, last = w.rows * (run + 1) / runs;
      ON_PATH(path, bitmap_rows(w, first, last, wide, bias, y));
    });
  }
  std::free(wide);
  return DONE;
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// `bits` are `bytes`, `first` has `firsts` and `value` `values`, what is beyond the ends counted. `kind` says of what
// types weights, X and Y are (vectors.h); bias is float, or null. A Status (paths.h).
int hpcprune_bitmap(int path, int kind, const uint8_t* bits, int64_t bytes, const int64_t* first, int64_t firsts,
                    const void* value, int64_t values, const void* x, int64_t batch, int64_t columns, const float* bias,
                    void* y, int64_t rows, int threads, const hpcprune::Pool* pool) {
  using namespace hpcprune;
  if (firsts != rows || bytes != (rows * columns + 7) / 8 + BYTES_AFTER) return DOES_NOT_FIT;
  if (rows && values - VALUES_AFTER != first[rows - 1] + ones(bits, (rows - 1) * columns, rows * columns))
    return DOES_NOT_FIT;
  return with_types(kind, value, x, y, [&](const auto* weights, const auto* from, auto* to) {
    const Bitmap<std::decay_t<decltype(*weights)>> w{rows, columns, bits, first, weights};
    return multiply(path, w, from, batch, bias, to, threads, pool);
  });
}
}
