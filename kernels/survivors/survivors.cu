// Survivors between dense storage and a packed vector, by a mask of bits, as survivors.cpp has them.
//
//   survivors_before  before[t] = how many bits are 1 before tile t of 1,024 elements, and after the last tile of all
//   gather            packed[j] = dense[i] for the j-th bit i that is 1
//   scatter           dense[i] = packed[j] where bit i is 1, else 0
//   update            dense[i] = packed[j] where bit i is 1; the others are not touched
//
// A mask stays for many steps, so where each tile's survivors begin is found once and kept by the caller: a warp counts
// each tile, then a block scans the counts. With it a warp needs to know nothing of the others. It holds its tile's
// 1,024 bits in its lanes, and what comes before a lane's elements is a prefix sum over the warp and a popcount. Dense
// memory is read and written in 128 bits a lane, and where nothing of them survives not at all; survivors are packed in
// shared memory, so that what goes out lies together.
//
//   nvcc -O3 -std=c++17 -arch=sm_80 -shared -Xcompiler -fPIC kernels/survivors/survivors.cu
//
// Limits: memory-bound; arrays may be of any length and lie at any multiple of their element's size. Every 1,024
// elements cost 8 bytes in `before`.

#include <type_traits>

#include "../cuda.h"
#include "../mask.cuh"
#include "../pack.cuh"
#include "../scan.cuh"

namespace hpcprune {
namespace {

constexpr int WARPS = 4;  // of a block; their tiles of 8-byte elements fill 32 kB of shared memory

unsigned blocks_for(int64_t tiles) { return static_cast<unsigned>((tiles + WARPS - 1) / WARPS); }

__device__ __forceinline__ int64_t own_tile() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP; }

__global__ void __launch_bounds__(WARP* WARPS)
    count(const uint8_t* bits, int64_t length, int64_t tiles, int64_t* ones) {
  const int64_t tile = own_tile();
  if (tile >= tiles) return;
  const int lane = threadIdx.x % WARP;
  const int sum = sum_up_to_lane(__popc(load_word(bits, tile * TILE + WARP * lane, length)));
  if (lane == WARP - 1) ones[tile] = sum;
}

__global__ void __launch_bounds__(SCAN_THREADS) scan_counts(int64_t* before, int64_t tiles) {
  const int64_t total = scan(before, tiles, [=](int64_t tile, int64_t sum, int64_t) { before[tile] = sum; });
  if (threadIdx.x == 0) before[tiles] = total;
}

// A warp's tile of a mask, as its lanes take it: COUNT neighbouring elements each, step by step.
template <int COUNT>
class MaskTile {
 public:
  static constexpr int STEPS = TILE / (WARP * COUNT);

  __device__ MaskTile(const uint8_t* bits, int64_t start, int64_t length)
      : lane_(threadIdx.x % WARP), word_(load_word(bits, start + WARP * lane_, length)) {
    up_to_ = sum_up_to_lane(__popc(word_));
  }

  __device__ int survivors() const { return __shfl_sync(ALL_LANES, up_to_, WARP - 1); }

  // This lane's first element of a step, counted from the tile's first.
  __device__ int element(int step) const { return (step * WARP + lane_) * COUNT; }

  // The bits of this lane's elements, and how many survivors of the tile lie before them. For all lanes at once.
  __device__ uint32_t at(int step, int* before) const {
    const int first = element(step), shift = first % WARP;
    const uint32_t word = __shfl_sync(ALL_LANES, word_, first / WARP);
    *before = __shfl_sync(ALL_LANES, up_to_, first / WARP) - __popc(word >> shift);
    return word >> shift & ((1u << COUNT) - 1);
  }

 private:
  int lane_;
  uint32_t word_;
  int up_to_;
};

template <int COUNT, class Element>
__global__ void __launch_bounds__(WARP* WARPS)
    gather(const Element* __restrict__ dense, int64_t length, const uint8_t* __restrict__ bits,
           const int64_t* __restrict__ before, int64_t tiles, Element* __restrict__ packed) {
  __shared__ Element staged[WARPS][TILE];
  const int64_t tile = own_tile();
  if (tile >= tiles) return;
  Element* own = staged[threadIdx.x / WARP];
  const MaskTile<COUNT> mask(bits, tile * TILE, length);
  const int survivors = mask.survivors();
  dense += tile * TILE;
#pragma unroll
  for (int step = 0; step < mask.STEPS; ++step) {
    int to;
    const uint32_t ones = mask.at(step, &to);
    const Element* from = dense + mask.element(step);
    const bool whole = tile * TILE + mask.element(step) + COUNT <= length;
    Pack<Element, COUNT> values = {};
    if (ones && whole) values = load<COUNT>(from);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (ones >> i & 1) own[to++] = whole ? values.at[i] : from[i];
  }
  __syncwarp();
  packed += before[tile];
  for (int i = threadIdx.x % WARP; i < survivors; i += WARP) packed[i] = own[i];
}

template <bool CLEAR, int COUNT, class Element>
__global__ void __launch_bounds__(WARP* WARPS)
    scatter(Element* __restrict__ dense, int64_t length, const uint8_t* __restrict__ bits,
            const int64_t* __restrict__ before, int64_t tiles, const Element* __restrict__ packed) {
  const int64_t tile = own_tile();
  if (tile >= tiles) return;
  const MaskTile<COUNT> mask(bits, tile * TILE, length);
  const int64_t left = length - tile * TILE;
  dense += tile * TILE;
  packed += before[tile];
#pragma unroll
  for (int step = 0; step < mask.STEPS; ++step) {
    int from;
    const uint32_t ones = mask.at(step, &from);
    const int element = mask.element(step);
    Pack<Element, COUNT> values;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values.at[i] = ones >> i & 1 ? packed[from++] : Element(0);
    const bool all = CLEAR || ones == (1u << COUNT) - 1;
    if (all && element + COUNT <= left) {
      store(values, dense + element);
      continue;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (element + i < left && (CLEAR || ones >> i & 1)) dense[element + i] = values.at[i];
  }
}

// Calls work(Element's zero, how many neighbours a lane takes: as `dense` allows) where there is anything to do.
template <class Element, class Work>
int with_alignment(const void* dense, int64_t length, const Work& work) {
  if (length > 0) {
    const Element* address = static_cast<const Element*>(dense);
    if (aligned<PACKED<Element>>(address)) {
      work(Element(), std::integral_constant<int, PACKED<Element>>());
    } else {
      work(Element(), std::integral_constant<int, 1>());
    }
  }
  return static_cast<int>(cudaGetLastError());
}

template <class Work>
int with_element(int size, const void* dense, int64_t length, const Work& work) {
  switch (size) {
    case 2: return with_alignment<uint16_t>(dense, length, work);
    case 4: return with_alignment<uint32_t>(dense, length, work);
    case 8: return with_alignment<uint64_t>(dense, length, work);
    default: return 1;
  }
}

template <bool CLEAR>
int scatter_all(int size, void* dense, int64_t length, const uint8_t* bits, const int64_t* before, const void* packed,
                void* stream) {
  const int64_t tiles = tiles_of(length);
  return with_element(size, dense, length, [&](auto zero, auto together) {
    using Element = decltype(zero);
    constexpr int COUNT = decltype(together)::value;
    LAUNCH((scatter<CLEAR, COUNT, Element>), blocks_for(tiles), WARP * WARPS, 0, static_cast<cudaStream_t>(stream),
           static_cast<Element*>(dense), length, bits, before, tiles, static_cast<const Element*>(packed));
  });
}

}  // namespace
}  // namespace hpcprune

using namespace hpcprune;

// `size`: an element's bytes; the functions that take it return 1 where it is not 2, 4 or 8. `bits` holds
// (length + 7) / 8 bytes, `packed` as many elements as bits are 1, `dense` `length` elements, and `before`, which
// hpcprune_cuda_survivors_before fills, (length + 1023) / 1024 + 1 numbers, of which the last is the count of all.

EXPORT int hpcprune_cuda_survivors_before(const uint8_t* bits, int64_t length, int64_t* before, void* stream) {
  const int64_t tiles = tiles_of(length);
  if (tiles > 0) {
    LAUNCH(count, blocks_for(tiles), WARP * WARPS, 0, static_cast<cudaStream_t>(stream), bits, length, tiles, before);
  }
  LAUNCH(scan_counts, 1, SCAN_THREADS, 0, static_cast<cudaStream_t>(stream), before, tiles);
  return static_cast<int>(cudaGetLastError());
}

EXPORT int hpcprune_cuda_gather(int size, const void* dense, int64_t length, const uint8_t* bits, const int64_t* before,
                                void* packed, void* stream) {
  const int64_t tiles = tiles_of(length);
  return with_element(size, dense, length, [&](auto zero, auto together) {
    using Element = decltype(zero);
    constexpr int COUNT = decltype(together)::value;
    LAUNCH((gather<COUNT, Element>), blocks_for(tiles), WARP * WARPS, 0, static_cast<cudaStream_t>(stream),
           static_cast<const Element*>(dense), length, bits, before, tiles, static_cast<Element*>(packed));
  });
}

EXPORT int hpcprune_cuda_scatter(int size, void* dense, int64_t length, const uint8_t* bits, const int64_t* before,
                                 const void* packed, void* stream) {
  return scatter_all<true>(size, dense, length, bits, before, packed, stream);
}

EXPORT int hpcprune_cuda_update(int size, void* dense, int64_t length, const uint8_t* bits, const int64_t* before,
                                const void* packed, void* stream) {
  return scatter_all<false>(size, dense, length, bits, before, packed, stream);
}
