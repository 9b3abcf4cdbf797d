// Counting towards the exact k-th smallest score, and packing the mask of what lies above it, as threshold.cpp does.
//
//   count_around   how many scores lie below, at and between the two ends of a bracket; those between are collected
//   histogram      how many scores lie in each of the equal bins of a range (for when a bracket misses)
//   pack           one bit a score: 1 = above the threshold, or one of its later ties
//
// Scores are compared as the same integer keys as on the CPU, made in registers. A call takes one array; what it counts
// is added to what earlier calls counted, and how many ties are still to go stays on the device, so that a group of
// arrays is a row of calls with no wait between them.
//
// Collected keys go through a warp's buffer in shared memory: one atomic operation reserves room for hundreds. A block
// counts a histogram in shared memory, 8,192 bins at a time. Which of a tile's ties are cut depends on the ties before
// it, so where some are to be cut a first pass counts each tile's and a block scans the counts; where none or all are,
// that pass ends at once. Scores are read in 128 bits a lane where the array is aligned.
//
//   nvcc -O3 -std=c++17 -arch=sm_80 -shared -Xcompiler -fPIC kernels/threshold/threshold.cu
//
// Limits: memory-bound; the counts are 64-bit; arrays may be of any length, aligned to their element.

#include <type_traits>

#include "../cuda.h"
#include "../mask.cuh"
#include "../scan.cuh"
#include "keys.cuh"

namespace hpcprune {
namespace {

constexpr int WARPS = 8;            // of a block
constexpr int64_t BLOCKS = 1024;    // at most, where blocks go on to further elements: several for each multiprocessor
constexpr int BINS = 8192;          // that a block counts at a time: 32 kB
constexpr int STAGED_BYTES = 2048;  // of a warp's buffer for keys: at least eight times what it adds at once

template <class Key>
struct Bracket {
  Key lo, hi, infinity;
};

typedef unsigned long long Counter;  // as atomic operations take it; in memory an int64_t

// A warp's keys on their way into the candidates. Keys beyond the capacity are counted and dropped.
template <class Key>
class Collector {
 public:
  static constexpr int ROOM = STAGED_BYTES / sizeof(Key);

  __device__ Collector(Key* staged, Key* candidates, int64_t capacity, Counter* collected)
      : staged_(staged), candidates_(candidates), capacity_(capacity), collected_(collected) {}

  // Adds those of each lane's keys whose bit is 1. For all lanes at once.
  template <int COUNT>
  __device__ void add(const Key (&keys)[COUNT], uint32_t chosen) {
    if (!__ballot_sync(ALL_LANES, chosen != 0)) return;
    const int own = __popc(chosen), up_to = sum_up_to_lane(own), total = __shfl_sync(ALL_LANES, up_to, WARP - 1);
    if (used_ + total > ROOM) flush();
    int to = used_ + up_to - own;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (chosen >> i & 1) staged_[to++] = keys[i];
    used_ += total;
  }

  __device__ void flush() {
    __syncwarp();
    const int lane = threadIdx.x % WARP;
    Counter start = 0;
    if (lane == 0 && used_ > 0) start = atomicAdd(collected_, Counter(used_));
    const int64_t first = static_cast<int64_t>(__shfl_sync(ALL_LANES, start, 0));
    for (int i = lane; i < used_; i += WARP)
      if (first + i < capacity_) candidates_[first + i] = staged_[i];
    used_ = 0;
    __syncwarp();
  }

 private:
  Key* staged_;
  Key* candidates_;
  int64_t capacity_;
  Counter* collected_;
  int used_ = 0;
};

template <int COUNT, View VIEW, class Key>
__global__ void __launch_bounds__(WARP* WARPS)
    count_around(const Key* __restrict__ data, int64_t length, Bracket<Key> bracket, Key* candidates, int64_t capacity,
                 Counter* counts) {
  __shared__ Key staged[WARPS][Collector<Key>::ROOM];
  __shared__ int of_warp[WARPS][4];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  Collector<Key> between(staged[warp], candidates, capacity, counts + 2);
  int below = 0, at_lo = 0, at_hi = 0, nan = 0;
  const int64_t step = WARP * COUNT, stride = gridDim.x * WARPS * step;
  for (int64_t start = (int64_t(blockIdx.x) * WARPS + warp) * step; start < length; start += stride) {
    const Scores<COUNT, Key> scores(data, start + lane * COUNT, length);
    Key keys[COUNT];
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const bool valid = i < scores.valid;
      const Key key = keys[i] = to_key<VIEW>(scores.bits.at[i]);
      nan |= VIEW != KEYS && valid && magnitude_of(scores.bits.at[i]) > bracket.infinity;
      below += valid && key < bracket.lo;
      at_lo += valid && key == bracket.lo;
      at_hi += valid && key == bracket.hi;
      inside |= uint32_t(valid && bracket.lo < key && key < bracket.hi) << i;
    }
    between.add(keys, inside);
  }
  between.flush();
  if (bracket.lo == bracket.hi) at_hi = 0;
  const int own[4] = {below, at_lo, at_hi, nan};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int sum = sum_up_to_lane(own[i]);
    if (lane == WARP - 1) of_warp[warp][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  int64_t sum = 0;
  for (int i = 0; i < WARPS; ++i) sum += of_warp[i][threadIdx.x];
  if (sum == 0) return;
  if (threadIdx.x == 3) {
    counts[4] = 1;
  } else {
    atomicAdd(counts + (threadIdx.x == 2 ? 3 : threadIdx.x), Counter(sum));
  }
}

// A window of bins after another, `sharing` blocks each, which share out the scores.
template <int COUNT, View VIEW, class Key>
__global__ void __launch_bounds__(WARP* WARPS) histogram(const Key* __restrict__ data, int64_t length, Key lo, Key hi,
                                                         int shift, int64_t bins, unsigned sharing, Counter* counts) {
  using Unsigned = std::make_unsigned_t<Key>;
  __shared__ unsigned counted[BINS];
  const int64_t window = int64_t(blockIdx.x / sharing) * BINS;
  const int here = static_cast<int>(bins - window < BINS ? bins - window : BINS);
  for (int bin = threadIdx.x; bin < here; bin += blockDim.x) counted[bin] = 0;
  __syncthreads();
  const Unsigned width = static_cast<Unsigned>(hi) - static_cast<Unsigned>(lo);
  const int64_t step = WARP * WARPS * COUNT;
  for (int64_t start = blockIdx.x % sharing * step; start < length; start += sharing * step) {
    const Scores<COUNT, Key> scores(data, start + threadIdx.x * COUNT, length);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Unsigned from_lo = static_cast<Unsigned>(to_key<VIEW>(scores.bits.at[i])) - static_cast<Unsigned>(lo);
      const uint64_t bin = uint64_t(from_lo >> shift) - uint64_t(window);
      if (i < scores.valid && from_lo <= width && bin < uint64_t(here)) atomicAdd(counted + bin, 1u);
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < here; bin += blockDim.x)
    if (counted[bin]) atomicAdd(counts + window + bin, Counter(counted[bin]));
}

__device__ __forceinline__ int64_t own_tile() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP; }

template <int COUNT, View VIEW, class Key>
__global__ void __launch_bounds__(WARP* WARPS) count_ties(const Key* __restrict__ data, int64_t length, Key threshold,
                                                          const int64_t* cut, int64_t tiles, int64_t* ties) {
  const int64_t tile = own_tile();
  if (tile >= tiles || *cut <= 0) return;
  const int lane = threadIdx.x % WARP;
  int own = 0;
#pragma unroll
  for (int step = 0; step < TILE; step += WARP * COUNT) {
    const Scores<COUNT, Key> scores(data, tile * TILE + step + lane * COUNT, length);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) own += i < scores.valid && to_key<VIEW>(scores.bits.at[i]) == threshold;
  }
  const int sum = sum_up_to_lane(own);
  if (lane == WARP - 1) ties[tile] = sum;
}

// Turns the number of each tile's ties into how many of its first ones go (those it has, or more), and takes them from
// `cut`.
__global__ void __launch_bounds__(SCAN_THREADS) share_cut(int64_t* ties, int64_t tiles, int64_t* cut) {
  const int64_t left = *cut;
  if (left <= 0) {
    for (int64_t tile = threadIdx.x; tile < tiles; tile += SCAN_THREADS) ties[tile] = left < 0 ? TILE : 0;
    return;
  }
  const int64_t total =
      scan(ties, tiles, [=](int64_t tile, int64_t before, int64_t) { ties[tile] = before < left ? left - before : 0; });
  if (threadIdx.x == 0) *cut = total < left ? left - total : 0;
}

// Gives lane `lane` of a tile its word, of the bits that all lanes have found in step `step`: COUNT of them each.
template <int COUNT>
__device__ __forceinline__ void place(uint32_t found, int step, int lane, uint32_t* word) {
  constexpr int SHARING = WARP / COUNT;  // lanes to a word
  found <<= lane % SHARING * COUNT;
#pragma unroll
  for (int apart = 1; apart < SHARING; apart *= 2) found |= __shfl_xor_sync(ALL_LANES, found, apart);
  found = __shfl_sync(ALL_LANES, found, lane % COUNT * SHARING);
  if (lane / COUNT == step) *word = found;
}

template <int COUNT, View VIEW, class Key>
__global__ void __launch_bounds__(WARP* WARPS)
    pack(const Key* __restrict__ data, int64_t length, Key threshold, const int64_t* __restrict__ cuts, int64_t tiles,
         uint8_t* __restrict__ mask) {
  const int64_t tile = own_tile();
  if (tile >= tiles) return;
  const int lane = threadIdx.x % WARP;
  uint32_t above = 0, ties = 0;  // of this lane's word of the tile
#pragma unroll
  for (int step = 0; step < TILE / (WARP * COUNT); ++step) {
    const Scores<COUNT, Key> scores(data, tile * TILE + (step * WARP + lane) * COUNT, length);
    uint32_t own_above = 0, own_ties = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Key key = to_key<VIEW>(scores.bits.at[i]);
      own_above |= uint32_t(i < scores.valid && key > threshold) << i;
      own_ties |= uint32_t(i < scores.valid && key == threshold) << i;
    }
    place<COUNT>(own_above, step, lane, &above);
    if (__ballot_sync(ALL_LANES, own_ties != 0)) place<COUNT>(own_ties, step, lane, &ties);
  }
  const int own = __popc(ties), before = sum_up_to_lane(own) - own;
  const int64_t cut = cuts[tile] - before;
  if (cut >= own) {
    ties = 0;
  } else {
    for (int64_t i = 0; i < cut; ++i) ties &= ties - 1;
  }
  store_word(above | ties, mask, tile * TILE + WARP * lane, length);
}

// As many blocks as `length` needs where each takes `step`, but no more than go at once.
unsigned blocks_for(int64_t length, int64_t step) {
  const int64_t blocks = (length + step - 1) / step;
  return static_cast<unsigned>(blocks < BLOCKS ? blocks : BLOCKS);
}

}  // namespace
}  // namespace hpcprune

using namespace hpcprune;

// bits: 16, 32 or 64, an element's and a key's size. view: see View. All return 1 for bits or a view that there is not.
// What is counted or decided lies in device memory and goes on from call to call.

// Adds to counts[0 ... 5): below lo, at lo, strictly between, at hi (0 if hi == lo); counts[4] becomes 1 if there is a
// NaN (then the rest means nothing). Keys between, up to `capacity` of them and in no particular order, go to
// `candidates`, after as many as counts[2] says.
EXPORT int hpcprune_cuda_count_around(int bits, int view, const void* data, int64_t length, int64_t lo, int64_t hi,
                                      int64_t infinity, void* candidates, int64_t capacity, int64_t* counts,
                                      void* stream) {
  return with_types(bits, view, data, [&](auto zero, auto kind, auto together) {
    using Key = decltype(zero);
    constexpr int COUNT = decltype(together)::value;
    if (length == 0) return;
    const Bracket<Key> bracket{static_cast<Key>(lo), static_cast<Key>(hi), static_cast<Key>(infinity)};
    LAUNCH((count_around<COUNT, decltype(kind)::value, Key>), blocks_for(length, WARPS * WARP * COUNT), WARPS * WARP, 0,
           static_cast<cudaStream_t>(stream), static_cast<const Key*>(data), length, bracket,
           static_cast<Key*>(candidates), capacity, reinterpret_cast<Counter*>(counts));
  });
}

// Adds to histogram[0 ... bins): keys in lo <= key <= hi by (key - lo) >> shift; (hi - lo) >> shift must be less than
// bins.
EXPORT int hpcprune_cuda_histogram(int bits, int view, const void* data, int64_t length, int64_t lo, int64_t hi,
                                   int shift, int64_t bins, int64_t* histogram, void* stream) {
  return with_types(bits, view, data, [&](auto zero, auto kind, auto together) {
    using Key = decltype(zero);
    constexpr int COUNT = decltype(together)::value;
    if (length == 0 || bins == 0) return;
    const unsigned sharing = blocks_for(length, WARPS * WARP * COUNT);
    const unsigned windows = static_cast<unsigned>((bins + BINS - 1) / BINS);
    LAUNCH((hpcprune::histogram<COUNT, decltype(kind)::value, Key>), sharing * windows, WARPS * WARP, 0,
           static_cast<cudaStream_t>(stream), static_cast<const Key*>(data), length, static_cast<Key>(lo),
           static_cast<Key>(hi), shift, bins, sharing, reinterpret_cast<Counter*>(histogram));
  });
}

// mask gets (length + 7) / 8 bytes. *cut, in device memory: how many of the first ties go; negative: all. What is left
// of it is there for a further call. scratch: (length + 1023) / 1024 numbers.
EXPORT int hpcprune_cuda_pack(int bits, int view, const void* data, int64_t length, int64_t threshold, int64_t* cut,
                              int64_t* scratch, uint8_t* mask, void* stream) {
  return with_types(bits, view, data, [&](auto zero, auto kind, auto together) {
    using Key = decltype(zero);
    constexpr int COUNT = decltype(together)::value;
    constexpr View VIEW = decltype(kind)::value;
    if (length == 0) return;
    const int64_t tiles = tiles_of(length);
    const unsigned blocks = static_cast<unsigned>((tiles + WARPS - 1) / WARPS);
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const Key* const keys = static_cast<const Key*>(data);
    const Key limit = static_cast<Key>(threshold);
    LAUNCH((count_ties<COUNT, VIEW, Key>), blocks, WARPS * WARP, 0, queue, keys, length, limit, cut, tiles, scratch);
    LAUNCH(share_cut, 1, SCAN_THREADS, 0, queue, scratch, tiles, cut);
    LAUNCH((hpcprune::pack<COUNT, VIEW, Key>), blocks, WARPS * WARP, 0, queue, keys, length, limit, scratch, tiles,
           mask);
  });
}
