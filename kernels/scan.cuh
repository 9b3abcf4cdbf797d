// Prefix sums: over a warp, and over an array of any length by one block.
//
// One block is enough: what is scanned has one count for every 1,024 elements, a thousandth of what the kernels around
// it read.

#pragma once

#include "cuda.h"

namespace hpcprune {

constexpr int SCAN_THREADS = 1024;

// The sum of `value` over this lane and those before it.
template <class Number>
__device__ __forceinline__ Number sum_up_to_lane(Number value) {
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const Number below = __shfl_up_sync(ALL_LANES, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Calls write(i, sum of all before values[i], values[i]) for i in [0, count), in a block of SCAN_THREADS, and gives the
// sum of all. `write` may put something else in values[i].
template <class Write>
__device__ __forceinline__ int64_t scan(const int64_t* values, int64_t count, const Write& write) {
  constexpr int OWN = 4;  // neighbours that a thread takes: 32 bytes, as memory gives them
  __shared__ int64_t of_warp[SCAN_THREADS / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t before = 0;
  for (int64_t chunk = 0; chunk < count; chunk += OWN * SCAN_THREADS) {
    const int64_t first = chunk + OWN * threadIdx.x;
    int64_t own[OWN], sum = 0;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      own[i] = first + i < count ? values[first + i] : 0;
      sum += own[i];
    }
    const int64_t up_to_lane = sum_up_to_lane(sum);
    if (lane == 31) of_warp[warp] = up_to_lane;
    __syncthreads();
    const int64_t up_to_warp = sum_up_to_lane(of_warp[lane]);  // of the warp that has the lane's number
    const int64_t before_warp = __shfl_sync(ALL_LANES, up_to_warp, warp == 0 ? 0 : warp - 1);
    int64_t here = before + (warp == 0 ? 0 : before_warp) + up_to_lane - sum;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      if (first + i < count) write(first + i, here, own[i]);
      here += own[i];
    }
    before += __shfl_sync(ALL_LANES, up_to_warp, 31);
    __syncthreads();
  }
  return before;
}

}  // namespace hpcprune
