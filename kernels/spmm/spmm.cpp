// Y = X W^T + bias for a pruned W in panels (panels.h): X is [batch, columns] and Y [batch, rows], as F.linear has
// them.
//
// A tile of X, one panel wide, is transposed into a buffer that fits the L1 cache, so that a weight is one broadcast
// and vectors of samples that lie together; the tile's sums stay in the L2 cache over all panels and are transposed
// back at the end. The fewer samples there are, the narrower the tile: 32, 16, 8, 4 samples, or one. An element of Y is
// the same chain of sums, in the order of the columns, whatever the tile and the number of threads: a sample's result
// does not depend on the batch that it came with.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: tiles of 8 samples in vectors of 4 floats
// 2. avx2: tiles of 16 samples in vectors of 8, with fused multiply-add
// 3. avx512: tiles of 32 samples in vectors of 16

#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../panels.h"
#include "../paths.h"
#include "../vectors.h"
#include "operands.h"

namespace hpcprune {
namespace {

// A part of the work: samples of an image from `sample` on, at most `width`, and the rows of chunks [first, last).
struct Part {
  int64_t image, sample, samples, width, first, last;
};

}  // namespace
}  // namespace hpcprune

#define BODY "spmm/spmm_body.h"
#include "../each_path.h"

namespace hpcprune {
namespace {

// The narrowest tile that holds `samples`, of those that a path has.
int64_t tile_width(int path, int64_t samples) {
  if (samples == 1) return 1;
  const int64_t widest = path == WITH_AVX512 ? 32 : path == WITH_AVX2 ? 16 : 8;
  int64_t width = 4;
  while (width < samples && width < widest) width *= 2;
  return width;
}

template <class Column, class Value, class Operand>
int spmm(int path, const Layout& w, const Value* value, const Operand& operand, int64_t images, int64_t samples,
         const float* bias, int threads, const Pool* pool) {
  std::vector<Part> tiles, parts;
  for (int64_t image = 0; image < images; ++image)
    for (int64_t sample = 0; sample < samples;) {
      const int64_t width = tile_width(path, samples - sample);
      tiles.push_back({image, sample, std::min(width, samples - sample), width, 0, w.chunks});
      sample += tiles.back().samples;
    }
  threads = threads_for(w.entries * tiles.size(), threads);
  // Blocks of rows whose sums fit the L2 cache.
  const int64_t blocks = (w.chunks + 63) / 64;
  const std::vector<int64_t> cuts =
      cut_chunks(w, std::max(blocks, parts_of_each(tiles.size(), threads, w.chunks)));
  int64_t most = 0, widest = 1;
  for (const Part& whole : tiles) {
    widest = std::max(widest, whole.width);
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      if (cuts[i] == cuts[i + 1]) continue;
      most = std::max(most, cuts[i + 1] - cuts[i]);
      parts.push_back({whole.image, whole.sample, whole.samples, whole.width, cuts[i], cuts[i + 1]});
    }
  }
  const int64_t runs = std::min<int64_t>(threads, parts.size());
  if (runs == 0) return DONE;
  const size_t length = (std::max(widest * w.panel, w.columns) + most * CHUNK * widest + 15) / 16 * 16;
  float* scratch = static_cast<float*>(std::aligned_alloc(64, runs * length * sizeof(float)));
  if (!scratch) return NO_MEMORY;
  in_pool(pool, runs, [&](int64_t run) {
    for (size_t i = run; i < parts.size(); i += runs) {
      float* own = scratch + run * length;
      ON_PATH(path, product<Column>(w, value, operand, bias, parts[i], own));
    }
  });
  std::free(scratch);
  return DONE;
}

template <class Value, class Operand>
int spmm(int path, const Layout& w, const Value* value, const Operand& operand, int64_t images, int64_t samples,
         const float* bias, int threads, const Pool* pool) {
  return w.panel > NARROW ? spmm<uint16_t>(path, w, value, operand, images, samples, bias, threads, pool)
                          : spmm<uint8_t>(path, w, value, operand, images, samples, bias, threads, pool);
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// `layout` is the `length` bytes that `hpcprune_panels_fill` made, `value` has a weight for each of its entries. `kind`
// says of what types weights, X and Y are (vectors.h); bias is float, or null. A Status (paths.h).
int hpcprune_spmm(int path, int kind, const void* layout, int64_t length, const void* value, int64_t values,
                  const void* x, int64_t batch, int64_t columns, const float* bias, void* y, int64_t rows, int threads,
                  const hpcprune::Pool* pool) {
  using namespace hpcprune;
  if (!Layout::fits(layout, length, rows, columns, values)) return DOES_NOT_FIT;
  const Layout w(layout);
  return with_types(kind, value, x, y, [&](const auto* weights, const auto* from, auto* to) {
    return spmm(path, w, weights, Rows{from, to, w.columns, w.rows}, 1, batch, bias, threads, pool);
  });
}

// A convolution of images. `shape` is channels, then height and width of the image, the kernel, the stride, the
// padding, the dilation and the output.
int hpcprune_convolution(int path, int kind, const void* layout, int64_t length, const void* value, int64_t values,
                         const void* x, int64_t count, const int64_t* shape, const float* bias, void* y, int64_t rows,
                         int threads, const hpcprune::Pool* pool) {
  using namespace hpcprune;
  const Images shaped(static_cast<const float*>(x), static_cast<float*>(y), rows, shape);
  if (!shaped.possible() || !Layout::fits(layout, length, rows, shaped.columns(), values)) return DOES_NOT_FIT;
  const Layout w(layout);
  return with_types(kind, value, x, y, [&](const auto* weights, const auto* from, auto* to) {
    const Images images{from, to, w.rows, shape};
    return spmm(path, w, weights, images, count, images.out[0] * images.out[1], bias, threads, pool);
  });
}
}
