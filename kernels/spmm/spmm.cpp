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
// 3. avx512: tiles of 32 samples in vectors of 16; with one sample 16 entries meet theirs by one gather, on a CPU that
//    is fast at it, else by permutations of registers that hold the panel

#include <algorithm>
#include <cstdlib>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../panels.h"
#include "../product.h"
#include "../vectors.h"
#include "operands.h"

namespace hpcprune {
namespace {

// A part of the work: samples of an image from `sample` on, at most `width`, and the rows of chunks [first, last).
struct Part {
  int64_t image, sample, samples, width, first, last;
};

#if defined(__x86_64__)
// Whether one instruction that fetches 16 numbers takes less time than 16: Intel's does since it has AMX. AMD's takes
// longer, and that of earlier Intel's was slowed down to close a leak.
bool gathers_fast() {
  static const bool fast = [] {
    unsigned a, b, c, d;
    return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & 1;
  }();
  return fast;
}
#endif

}  // namespace
}  // namespace hpcprune

#define BODY "spmm/spmm_body.h"
#include "../each_path.h"

namespace hpcprune {
namespace {

// The narrowest tile that holds `samples`, of those that a path has.
int64_t tile_width(int64_t path, int64_t samples) {
  if (samples == 1) return 1;
  const int64_t widest = path == WITH_AVX512 ? 32 : path == WITH_AVX2 ? 16 : 8;
  int64_t width = 4;
  while (width < samples && width < widest) width *= 2;
  return width;
}

template <class Column, class Value, class Operand>
int spmm(const Product& of, const Layout& w, const Value* value, const Operand& operand, int64_t images,
         int64_t samples) {
  std::vector<Part> tiles, parts;
  for (int64_t image = 0; image < images; ++image)
    for (int64_t sample = 0; sample < samples;) {
      const int64_t width = tile_width(of.path, samples - sample);
      tiles.push_back({image, sample, std::min(width, samples - sample), width, 0, w.chunks});
      sample += tiles.back().samples;
    }
  const int threads = of.threads_for(w.entries * tiles.size());
  // Blocks of rows whose sums fit the L2 cache.
  const int64_t blocks = (w.chunks + 63) / 64;
  const std::vector<int64_t> cuts = cut_chunks(w, std::max(blocks, parts_of_each(tiles.size(), threads, w.chunks)));
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
  in_pool(of.pool, runs, [&](int64_t run) {
    for (size_t i = run; i < parts.size(); i += runs) {
      float* own = scratch + run * length;
      ON_PATH(of.path, product<Column>(w, value, operand, of.bias, parts[i], own));
    }
  });
  std::free(scratch);
  return DONE;
}

template <class Value, class Operand>
int spmm(const Product& of, const Layout& w, const Value* value, const Operand& operand, int64_t images,
         int64_t samples) {
  return w.panel > NARROW ? spmm<uint16_t>(of, w, value, operand, images, samples)
                          : spmm<uint8_t>(of, w, value, operand, images, samples);
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// Of W: `layout`, which `hpcprune_panels_fill` made, and its bytes; `value` has a weight for each of its entries. A
// Status.
int hpcprune_spmm(const hpcprune::Product* of) {
  using namespace hpcprune;
  if (!Layout::fits(of->array<char>(0), of->matrix[1], of->rows, of->columns, of->values)) return DOES_NOT_FIT;
  const Layout w(of->array<char>(0));
  return with_types(of->kind, of->value, of->x, of->y, [&](const auto* weights, const auto* from, auto* to) {
    return spmm(*of, w, weights, Rows{from, to, w.columns, w.rows}, 1, of->batch);
  });
}

// A convolution of `batch` images. Of W: as above, and a third: channels, then height and width of the image, the
// kernel, the stride, the padding, the dilation and the output.
int hpcprune_convolution(const hpcprune::Product* of) {
  using namespace hpcprune;
  const int64_t* shape = of->array<int64_t>(2);
  const Images shaped(static_cast<const float*>(of->x), static_cast<float*>(of->y), of->rows, shape);
  if (!shaped.possible() || !Layout::fits(of->array<char>(0), of->matrix[1], of->rows, shaped.columns(), of->values))
    return DOES_NOT_FIT;
  const Layout w(of->array<char>(0));
  return with_types(of->kind, of->value, of->x, of->y, [&](const auto* weights, const auto* from, auto* to) {
    const Images images{from, to, w.rows, shape};
    return spmm(*of, w, weights, images, of->batch, images.out[0] * images.out[1]);
  });
}
}
