// Products with a matrix of which whole blocks of 16 x 16, 32 x 32 or 64 x 64 weights survive (BSR).
//
//   blocks_product   Y = X W^T + bias: X is [batch, columns] and Y [batch, rows], as F.linear has them
//   blocks_gradient  the gradient of the surviving weights alone, of those of dY^T X
//
// A block's weights lie transposed, one column after another, so that a vector of weights is sixteen rows of one
// column. It meets one number of each sample, spread over all lanes; the sums of sixteen rows, for up to sixteen
// samples, stay in registers over all blocks of the row and are stored as Y has them, so that nothing is transposed at
// run time. X is packed, as many samples at a time as fit the L2 cache: sixteen columns of a sample together, those of
// the samples one after another. What a block meets is then a stretch of memory, whatever the number of columns.
//
// The gradient has the samples as what is summed over and sixteen columns as the vector, so that its rows go where the
// survivors have them. dX = dY W is the product with the layout of W^T.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: sums for 2 samples in vectors of 4 floats
// 2. avx2: for 4 samples in vectors of 8, with fused multiply-add
// 3. avx512: for 16 samples in vectors of 16
//
// An element of Y is the same chain of sums, in the order of the columns, whatever the batch and the number of threads.
// Blocks that the matrix's edges cut off are whole in memory, with zeros beyond the edge.

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "../packed.h"
#include "../vectors.h"

namespace hpcprune {
namespace {

constexpr int64_t GRADIENT_SAMPLES = 64;  // whose products are summed before the sums go back to memory

// W [rows, columns] in block rows: block b of row r, for start[r] <= b < start[r + 1], begins at column[b] sides.
struct Blocks {
  int64_t side, rows, columns;
  const int32_t *start, *column;

  int64_t units() const { return side / UNIT; }
  int64_t block_row(int64_t row) const { return row >> __builtin_ctzll(side); }  // to divide takes longer than a block
  int64_t block_rows() const { return (rows + side - 1) / side; }
  int64_t block_columns() const { return (columns + side - 1) / side; }

  // Whether there are as many starts, blocks and weights as such a matrix has, and none beyond its edge; else products
  // would read what is not there.
  bool fits(int64_t starts, int64_t blocks, int64_t weights) const {
    if (side != 16 && side != 32 && side != 64) return false;
    if (starts != block_rows() + 1 || blocks != start[starts - 1] || weights != blocks * side * side) return false;
    const auto most = static_cast<uint32_t>(block_columns());
    bool wrong = start[0] != 0;  // all are looked at, several at once, since to stop at the first takes longer
    for (int64_t row = 0; row < block_rows(); ++row) wrong |= start[row] > start[row + 1];
    for (int64_t block = 0; block < blocks; ++block) wrong |= static_cast<uint32_t>(column[block]) >= most;
    return !wrong;
  }

  // Whether so many weights are within the matrix's edges, and `order` says no other: else gradients would be written
  // beyond them.
  bool packs(const int32_t* order, int64_t survivors) const {
    int64_t count = 0;
    for (int64_t row = 0; row < block_rows(); ++row)
      for (int64_t block = start[row]; block < start[row + 1]; ++block) {
        const int64_t height = std::min(side, rows - row * side),
                      width = std::min(side, columns - column[block] * side);
        const int32_t* place = order + block * side * side;  // where each row's survivors begin
        for (int64_t i = 0; i < height; ++i)
          if (place[i] < 0 || place[i] + width > survivors) return false;
        count += height * width;
      }
    return count == survivors;
  }
};

// Where block rows are cut so that each of `parts` has about as many blocks.
std::vector<int64_t> cut_rows(const Blocks& w, int64_t parts) {
  std::vector<int64_t> cuts{0};
  const int32_t *first = w.start, *last = w.start + w.block_rows();
  for (int64_t part = 1; part < parts; ++part)
    cuts.push_back(
        std::max<int64_t>(cuts.back(), std::lower_bound(first, last, int64_t(*last) * part / parts) - first));
  cuts.push_back(w.block_rows());
  return cuts;
}

}  // namespace
}  // namespace hpcprune

#define BODY "blocks/blocks_body.h"
#include "../each_path.h"

namespace hpcprune {
namespace {

template <class Value, class Element>
int product(const Product& of, const Blocks& w, const Value* value, const Element* x, Element* y) {
  const auto cut = [&](int64_t parts) { return cut_rows(w, parts); };
  return in_parts(of, w.block_columns() * w.side, w.block_rows(), cut, [&](const Part& part, float* packed) {
    ON_PATH(of.path, product(w, value, x, of.bias, y, part, packed));
  });
}

template <class Element>
int gradient(int path, const Blocks& w, const int32_t* order, const Element* x, const Element* dy, int64_t batch,
             float* survivors, int threads, const Pool* pool) {
  const int64_t runs = std::max<int64_t>(1, std::min<int64_t>(threads, w.block_rows()));
  const std::vector<int64_t> cuts = cut_rows(w, runs);
  int64_t most = 0;
  for (int64_t run = 0; run < runs; ++run) most = std::max(most, cuts[run + 1] - cuts[run]);
  const int64_t padded_columns = w.block_columns() * w.side;
  const int64_t length = std::min(GRADIENT_SAMPLES, batch) * (padded_columns + most * w.side);
  float* scratch = aligned_floats(runs * length);
  if (!scratch) return NO_MEMORY;
  in_pool(pool, runs, [&](int64_t run) {
    const int64_t first = cuts[run], last = cuts[run + 1], row = first * w.side;
    float *packed_x = scratch + run * length,
          *packed_dy = packed_x + std::min(GRADIENT_SAMPLES, batch) * padded_columns;
    if (w.start[first] == w.start[last]) return;
    // Without samples the sums begin too, as zeros.
    for (int64_t s = 0; s == 0 || s < batch; s += GRADIENT_SAMPLES) {
      const int64_t samples = std::min(GRADIENT_SAMPLES, batch - s);
      pack(x + s * w.columns, w.columns, w.columns, padded_columns, samples, samples, packed_x);
      pack(dy + s * w.rows + row, w.rows, w.rows - row, (last - first) * w.side, samples, samples, packed_dy);
      ON_PATH(path, gradient(w, order, first, last, packed_x, packed_dy, samples, s == 0, survivors));
    }
  });
  std::free(scratch);
  return DONE;
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// Of W: `side`; `start`, for each block row and one more, and how many; `column`, one for each block, ascending within
// a row, and how many. `value` holds side x side weights for each block, a column's after another. A Status.
int hpcprune_blocks_product(const hpcprune::Product* of) {
  using namespace hpcprune;
  const Blocks w{of->matrix[0], of->rows, of->columns, of->array<int32_t>(1), of->array<int32_t>(3)};
  if (!w.fits(of->matrix[2], of->matrix[4], of->values)) return DOES_NOT_FIT;
  return with_types(of->kind, of->value, of->x, of->y, [&](const auto* weights, const auto* from, auto* to) {
    return product(*of, w, weights, from, to);
  });
}

// `order` says which survivor each weight of `value` is; those of a block's row follow one another. `half`: X and dY
// are bfloat16, else float. `packed` gets the gradient of all `survivors`. A Status.
int hpcprune_blocks_gradient(int path, int half, int64_t side, const int32_t* start, int64_t starts,
                             const int32_t* column, int64_t blocks, const int32_t* order, int64_t orders, const void* x,
                             int64_t batch, int64_t columns, const void* dy, int64_t rows, float* packed,
                             int64_t survivors, int threads, const hpcprune::Pool* pool) {
  using namespace hpcprune;
  const Blocks w{side, rows, columns, start, column};
  if (!w.fits(starts, blocks, orders) || !w.packs(order, survivors)) return DOES_NOT_FIT;
  const int useful = threads_for(orders / UNIT * batch, threads);
  const auto run = [&](const auto* from, const auto* given) {
    return gradient(path, w, order, from, given, batch, packed, useful, pool);
  };
  return half ? run(static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(dy))
              : run(static_cast<const float*>(x), static_cast<const float*>(dy));
}
}
