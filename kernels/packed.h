// X as products read it that take sixteen of its columns at once, and the parts that such a product is cut into.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "product.h"
#include "vectors.h"

namespace hpcprune {

constexpr int64_t UNIT = 16;                  // columns that are taken at once
constexpr int64_t PACKED_FLOATS = 64 * 1024;  // that are packed at a time: an eighth of an L2 cache

// Packs `width` columns of samples whose lines are `step` apart: sixteen columns of a sample together, those of
// `places` samples one after another. Zeros where there is no sample, and from column `columns` on.
template <class Element>
void pack(const Element* x, int64_t step, int64_t columns, int64_t width, int64_t samples, int64_t places,
          float* packed) {
  for (int64_t k = 0; k < width; k += UNIT, packed += places * UNIT) {
    const int64_t here = std::max<int64_t>(0, std::min(UNIT, columns - k));
    for (int64_t s = 0; s < samples; ++s) {
      const Element* from = x + s * step + k;
      float* to = packed + s * UNIT;
      if (here == UNIT) {
        for (int64_t i = 0; i < UNIT; i += 4) store(load<Float4>(from + i), to + i);  // or GCC moves one at a time
      } else {
        for (int64_t i = 0; i < UNIT; ++i) to[i] = i < here ? widen(from[i]) : 0.0f;
      }
    }
    std::fill_n(packed + samples * UNIT, (places - samples) * UNIT, 0.0f);
  }
}

inline float* aligned_floats(int64_t count) {
  return static_cast<float*>(std::aligned_alloc(64, (count / 16 + 1) * 16 * sizeof(float)));
}

// A part of the work: samples from `sample` on, and [first, last) of the matrix's stripes of rows.
struct Part {
  int64_t sample, samples, first, last;
};

// Runs work(part, scratch) for all parts: as many samples at a time as fit the cache, `width` floats each and packed
// into scratch, but no more than leave something for every thread. cut(n) says where stripes are cut in n; its last is
// the end of them. A Status.
template <class Cut, class Work>
int in_parts(const Product& of, int64_t width, int64_t stripes, const Cut& cut, const Work& work) {
  const int64_t batch = of.batch;
  if (batch == 0 || stripes == 0) return DONE;
  const int64_t allowed = of.threads_for(of.values / UNIT * batch),
                fitting = PACKED_FLOATS / std::max<int64_t>(1, width) / UNIT * UNIT;
  const int64_t share = ((batch + allowed - 1) / allowed + UNIT - 1) / UNIT * UNIT;
  const int64_t most = std::max(UNIT, std::min(fitting, share)), chunks = (batch + most - 1) / most;
  const std::vector<int64_t> cuts = cut(parts_of_each(chunks, allowed, stripes));
  std::vector<Part> parts;
  for (int64_t sample = 0; sample < batch; sample += most)
    for (size_t i = 0; i + 1 < cuts.size(); ++i)
      if (cuts[i] < cuts[i + 1]) parts.push_back({sample, std::min(most, batch - sample), cuts[i], cuts[i + 1]});
  const int64_t runs = std::min<int64_t>(allowed, parts.size()), length = most * width;
  float* scratch = aligned_floats(runs * length);
  if (!scratch) return NO_MEMORY;
  in_pool(of.pool, runs, [&](int64_t run) {
    for (size_t i = run; i < parts.size(); i += runs) work(parts[i], scratch + run * length);
  });
  std::free(scratch);
  return DONE;
}

// Runs work(WIDTH), a constant, for the narrowest tile that holds `samples`, or for the widest; gives its width.
template <int WIDEST, int WIDTH = 1, class Work>
INLINE int with_width(int64_t samples, const Work& work) {
  if constexpr (WIDTH < WIDEST) {
    if (samples > WIDTH) return with_width<WIDEST, 2 * WIDTH>(samples, work);
  }
  work(std::integral_constant<int, WIDTH>());
  return WIDTH;
}

// How many samples the tiles of `with_width` have room for that hold so many.
template <int WIDEST>
INLINE int64_t places_for(int64_t samples) {
  const int64_t whole = samples / WIDEST * WIDEST;
  return samples == whole ? whole : whole + with_width<WIDEST>(samples - whole, [](auto) {});
}

}  // namespace hpcprune
