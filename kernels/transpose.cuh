// Transposes what products with CSR need the other way round: samples lie together, so that a nonzero is met with many
// of them by one load.
//
// A block moves a tile of 32 x 32 through shared memory, four elements a thread; rows of the tile are 33 words apart,
// so that neither the writes of rows nor the reads of columns meet in a bank. Each row of the result is padded with
// zeros up to its stride: with a stride of whole packs all that reads it uses loads of 128 bits, whatever the number of
// samples.

#pragma once

#include <algorithm>

#include "pack.cuh"

namespace hpcprune {
namespace {

// Samples that are transposed at a time: scratch does not grow with the batch, and stays in the L2 cache.
constexpr int64_t SLAB = 1024;

// The distance of rows of `samples` elements in scratch, in elements: whole packs.
template <class Element>
int64_t padded(int64_t samples) {
  const int64_t pack = PACKED<Element>;
  return (samples + pack - 1) / pack * pack;
}

constexpr int TILE = 32;

// to[c, r] = from[r, c] + bias[r] for r < height and c < width; 0 for r from `height` on. `from` and `to` are row-major
// with the given strides. A flag says whether a side is all whole packs, and aligned.
template <class From, class To>
__global__ void __launch_bounds__(TILE* TILE / 4)
    transpose_tile(const From* __restrict__ from, int height, int width, int64_t from_stride, bool from_packs,
                   const float* __restrict__ bias, To* __restrict__ to, int64_t to_stride, bool to_packs) {
  __shared__ float tile[TILE][TILE + 1];
  const int slow = threadIdx.x / (TILE / 4), fast = threadIdx.x % (TILE / 4) * 4;
  const int row = blockIdx.y * TILE + slow, column = blockIdx.x * TILE + fast;
  float value[4] = {0, 0, 0, 0};
  if (row < height) {
    const From* source = from + row * from_stride + column;
    if (from_packs && column < from_stride) {
      const Pack<From, 4> pack = load<4>(source);
      for (int i = 0; i < 4; ++i) value[i] = widen(pack.at[i]);
    } else {
      for (int i = 0; i < 4; ++i)
        if (column + i < width) value[i] = widen(source[i]);
    }
    if (bias)
      for (int i = 0; i < 4; ++i) value[i] += bias[row];
  }
  for (int i = 0; i < 4; ++i) tile[slow][fast + i] = value[i];
  __syncthreads();

  const int sample = blockIdx.x * TILE + slow, first = blockIdx.y * TILE + fast;
  if (sample >= width) return;
  Pack<To, 4> pack;
  for (int i = 0; i < 4; ++i) narrow(tile[fast + i][slow], &pack.at[i]);
  To* target = to + sample * to_stride + first;
  if (to_packs && first < to_stride) {
    store<4>(pack, target);
  } else {
    for (int i = 0; i < 4; ++i)
      if (first + i < to_stride) target[i] = pack.at[i];
  }
}

// `bias` is [height], or null.
template <class From, class To>
void transpose(const From* from, int64_t height, int64_t width, int64_t from_stride, const float* bias, To* to,
               int64_t to_stride, cudaStream_t stream) {
  if (width == 0 || to_stride == 0) return;
  const bool from_packs = from_stride % 4 == 0 && aligned<4>(from), to_packs = to_stride % 4 == 0 && aligned<4>(to);
  const dim3 grid((width + TILE - 1) / TILE, (to_stride + TILE - 1) / TILE);
  LAUNCH((transpose_tile<From, To>), grid, dim3(TILE * TILE / 4), 0, stream, from, int(height), int(width), from_stride,
         from_packs, bias, to, to_stride, to_packs);
}

}  // namespace
}  // namespace hpcprune
