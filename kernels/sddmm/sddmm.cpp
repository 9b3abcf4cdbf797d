// The gradient of the surviving weights alone: value[entry of (row, column)] = sum over b of dY[b, row] X[b, column].
//
// W is in panels (panels.h) and so is the gradient; `order` says which survivor an entry is. A tile of X and of dY is
// transposed as in spmm.cpp: four rows of dY stay in registers while the columns of X that they meet pass by, and the
// four sums of products, of samples that lie side by side, are folded into four numbers at once.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: tiles of 8 samples in vectors of 4 floats
// 2. avx2: tiles of 16 samples in vectors of 8
// 3. avx512: tiles of 64 samples, or 32, in vectors of 16

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "../panels.h"
#include "../paths.h"
#include "../vectors.h"

namespace hpcprune {
namespace {

constexpr int64_t LARGEST_TILE = 64;  // samples

}  // namespace
}  // namespace hpcprune

#define BODY "sddmm/sddmm_body.h"
#include "../each_path.h"

namespace hpcprune {
namespace {

template <class Column, class Element>
int sddmm(int path, const Layout& w, const int32_t* order, const Element* x, const Element* dy, int64_t batch,
          float* packed, int64_t survivors, int threads, const Pool* pool) {
  const int64_t tiles = batch / LARGEST_TILE + 1;
  const int64_t runs = std::max<int64_t>(1, std::min<int64_t>(threads_for(w.entries * tiles, threads), w.chunks));
  const std::vector<int64_t> cuts = cut_chunks(w, runs);
  int64_t most = 0;
  for (int64_t run = 0; run < runs; ++run) most = std::max(most, cuts[run + 1] - cuts[run]);
  const int64_t entries = w.entries * GROUP;
  const int64_t length = LARGEST_TILE * (w.panel + most * CHUNK);
  float* scratch =
      static_cast<float*>(std::aligned_alloc(64, (runs * length + (entries + 15) / 16 * 16) * sizeof(float)));
  if (!scratch) return NO_MEMORY;
  float* value = scratch + runs * length;
  in_pool(pool, runs, [&](int64_t run) {
    float* own = scratch + run * length;
    const int64_t first = cuts[run], last = cuts[run + 1];
    if (first == last) return;
    ON_PATH(path, product<Column>(w, first, last, x, dy, batch, own,
                                  {value, order, packed, static_cast<uint32_t>(survivors), true, true}));
  });
  std::free(scratch);
  return DONE;
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// `layout` is the `length` bytes that `hpcprune_panels_fill` made, with its `orders` of `order`. `half`: X and dY are
// bfloat16, else float. `packed` has a place for every survivor. A Status (paths.h).
int hpcprune_sddmm(int path, int half, const void* layout, int64_t length, const int32_t* order, int64_t orders,
                   const void* x, int64_t batch, int64_t columns, const void* dy, int64_t rows, float* packed,
                   int64_t survivors, int threads, const hpcprune::Pool* pool) {
  using namespace hpcprune;
  if (!Layout::fits(layout, length, rows, columns, orders)) return DOES_NOT_FIT;
  const Layout w(layout);
  const auto run = [&](const auto* from, const auto* gradient) {
    return w.panel > NARROW ? sddmm<uint16_t>(path, w, order, from, gradient, batch, packed, survivors, threads, pool)
                            : sddmm<uint8_t>(path, w, order, from, gradient, batch, packed, survivors, threads, pool);
  };
  return half ? run(static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(dy))
              : run(static_cast<const float*>(x), static_cast<const float*>(dy));
}
}
