// Kernels that use every part of CUDA that the emulator has, each with bugs to plant: a test of the emulator itself.
//
// `bug` is NONE or what is to be wrong. Only what a bug changes looks at it.

#include "../../kernels/cuda.h"

namespace hpcprune {
namespace {

enum Bug {
  NONE,
  MISSING_BARRIER,
  MISSING_SECOND_BARRIER,
  OFF_BY_ONE,
  OFF_BY_ONE_IN_SHARED,
  OFF_BY_ONE_IN_DYNAMIC,
  MISALIGNED,
  WILD_ADDRESS,
  DIVERGENT_BARRIER,
  DIFFERENT_BARRIERS,
  BARRIER_AFTER_EXIT,
  EXITED_LANE,
  LANE_OUTSIDE_MASK,
  DIFFERENT_MASKS,
  DIFFERENT_INTRINSICS,
  NOT_IN_MASK,
  LANE_AT_BARRIER,
  MISSING_SYNCWARP,
  MISSING_WAIT,
  WAIT_FOR_TOO_FEW,
  LATE_MISSING_WAIT,
  MISSING_COMMIT,
  MISSING_BARRIER_AFTER_WAIT,
  MISALIGNED_COPY,
  FRAGMENT_A,
  FRAGMENT_B,
  FRAGMENT_D,
  FEW_LANES,
  NO_ATOMIC,
  NO_ATOMIC_BETWEEN_BLOCKS,
  LAST_BLOCK_WINS,
  LAST_THREAD_WINS,
};

constexpr int TILE = 64;

// to[i] is from[i] with each tile of 64 reversed; a short last tile is reversed as if zeros filled it up.
template <int TILE>
__global__ void __launch_bounds__(TILE) reverse_tiles(int bug, int64_t count, const float* from, float* to) {
  __shared__ float tile[TILE];
  const int64_t tiles = (count + TILE - 1) / TILE;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t at = i * TILE + threadIdx.x;
    const int64_t last = bug == OFF_BY_ONE ? count + 1 : count;
    tile[threadIdx.x] = at < last ? from[at] : 0.0f;
    if (bug != MISSING_BARRIER) __syncthreads();
    if (at < count) to[at] = tile[(bug == OFF_BY_ONE_IN_SHARED ? TILE : TILE - 1) - threadIdx.x];
    if (bug != MISSING_SECOND_BARRIER) __syncthreads();
  }
}

// The sum of a block's numbers, by warps; dynamic shared memory holds one float a warp.
__global__ void __launch_bounds__(128) sum_blocks(int bug, int64_t count, const float* from, float* sums) {
  DYNAMIC_SHARED(float, partial);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  float sum = at < count ? from[at] : 0.0f;
  if (bug == EXITED_LANE && threadIdx.x == 5) return;
  if (bug == LANE_AT_BARRIER && threadIdx.x == 7) __syncthreads();
  if (bug == DIFFERENT_INTRINSICS && lane == 7) sum += __any_sync(ALL_LANES, 0);
  const unsigned mask =
      bug == LANE_OUTSIDE_MASK ? 0xffffu : bug == DIFFERENT_MASKS && lane < 16 ? ALL_LANES >> 1 : ALL_LANES;
  if (bug == NOT_IN_MASK) __syncwarp(1);
  if (bug != LANE_OUTSIDE_MASK || lane < 16) {
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(mask, sum, by);
  }
  if (lane == 0) partial[bug == OFF_BY_ONE_IN_DYNAMIC ? warp + 1 : warp] = sum;
  if (bug == BARRIER_AFTER_EXIT && warp == 1) return;
  if (bug == DIVERGENT_BARRIER) {
    if (warp == 0) __syncthreads();
    else __syncwarp();
  } else if (bug == DIFFERENT_BARRIERS && warp == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int i = 0; i < warps; ++i) total += partial[i];
    sums[blockIdx.x] = total;
  }
}

// Each warp turns its 32 pairs round through shared memory that no other warp touches.
__global__ void __launch_bounds__(64) turn_pairs(int bug, const float2* from, float2* to) {
  __shared__ float2 pairs[2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float2* at = from + threadIdx.x;
  if (bug == MISALIGNED) at = reinterpret_cast<const float2*>(reinterpret_cast<const float*>(at) + 1);
  if (bug == WILD_ADDRESS && threadIdx.x == 40) at += int64_t(1) << 40;
  pairs[warp][lane] = threadIdx.x == 63 ? make_float2(0.0f, 0.0f) : *at;
  if (bug != MISSING_SYNCWARP) __syncwarp();
  to[threadIdx.x] = pairs[warp][31 - lane];
}

// to[tile][i] = from[tile][i ^ 1], 4 floats at a time, of which the next tile is under way while one is written.
__global__ void __launch_bounds__(TILE) copy_tiles(int bug, int tiles, const float4* from, float4* to) {
  __shared__ float4 stage[2][TILE];
  const int i = threadIdx.x;
  const auto fetch = [&](int tile) {
    const char* at = reinterpret_cast<const char*>(from + int64_t(tile) * TILE + i);
    copy_async(&stage[tile % 2][i], at + (bug == MISALIGNED_COPY ? 4 : 0), tile < tiles);
    if (bug != MISSING_COMMIT) commit_copies();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if (bug == WAIT_FOR_TOO_FEW) wait_for_copies<2>();
    else if (bug != MISSING_WAIT && (bug != LATE_MISSING_WAIT || tile < 2)) wait_for_copies<1>();
    if (bug != MISSING_BARRIER_AFTER_WAIT) __syncthreads();
    to[int64_t(tile) * TILE + i] = stage[tile % 2][i ^ 1];
    __syncthreads();
  }
}

// d += a b by one warp, from and to fragments: a [32][4], b [32][2], d [32][4].
__global__ void __launch_bounds__(32) multiply_fragments(int bug, const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + (bug == FRAGMENT_A && i % 3 ? 3 - i : i)];
  for (int i = 0; i < 2; ++i) right[i] = b[lane * 2 + (bug == FRAGMENT_B ? 1 - i : i)];
  for (int i = 0; i < 4; ++i) sum[i] = d[lane * 4 + i];
  if (bug == FEW_LANES && lane == 31) return;
  multiply_add(sum, left, right);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[bug == FRAGMENT_D ? i ^ 1 : i];
}

// How often each of 16 values occurs, and the last block's number.
__global__ void __launch_bounds__(64) count_values(int bug, int count, const int* values, int* counts, int* last) {
  __shared__ int own[16];
  if (threadIdx.x < 16) own[threadIdx.x] = 0;
  __syncthreads();
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < count) {
    if (bug == NO_ATOMIC) ++own[values[at]];
    else atomicAdd(&own[values[at]], 1);
  }
  __syncthreads();
  if (threadIdx.x < 16) {
    if (bug == NO_ATOMIC_BETWEEN_BLOCKS) counts[threadIdx.x] += own[threadIdx.x];
    else atomicAdd(&counts[threadIdx.x], own[threadIdx.x]);
  }
  if (bug == LAST_THREAD_WINS && blockIdx.x == gridDim.x - 1) *last = blockIdx.x + threadIdx.x - 63;
  else if (threadIdx.x == 0 && (bug == LAST_BLOCK_WINS || blockIdx.x == gridDim.x - 1)) *last = blockIdx.x;
}

// What each lane's intrinsics give: 12 integers a lane.
__global__ void __launch_bounds__(32) ask_intrinsics(const unsigned* values, unsigned* answers, float* sum,
                                                     unsigned* extremes, unsigned long long* total) {
  const int lane = threadIdx.x;
  const unsigned value = __ldg(values + lane);
  unsigned* to = answers + lane * 12;
  to[0] = __shfl_sync(ALL_LANES, value, lane * 7);
  to[1] = __shfl_sync(ALL_LANES, value, 3, 8);
  to[2] = __shfl_xor_sync(ALL_LANES, value, 5);
  to[3] = __shfl_xor_sync(ALL_LANES, value, 9, 8);
  to[4] = __shfl_down_sync(ALL_LANES, value, 3);
  to[5] = __shfl_up_sync(ALL_LANES, value, 3, 16);
  to[6] = __ballot_sync(ALL_LANES, value & 1);
  // Two halves that do not wait for each other, and come together again.
  to[7] = lane < 16 ? __any_sync(0xffffu, __shfl_xor_sync(0xffffu, value, 1) == values[0])
                    : __any_sync(0xffff0000u, value == values[0]);
  to[8] = __popc(value);
  to[9] = __ffs(value);
  to[10] = __clz(value);
  to[11] = __float_as_uint(float(__shfl_down_sync(ALL_LANES, double(lane), 1)));
  atomicAdd(sum, 0.5f);
  atomicMin(&extremes[0], value);
  atomicMax(&extremes[1], value);
  atomicAdd(&extremes[2], 1u);
  atomicAdd(total, static_cast<unsigned long long>(value) << 8);
}

// By how many steps one of two warps was ahead, at most.
__global__ void __launch_bounds__(64) watch_warps(int steps, unsigned* farthest) {
  __shared__ int done[2];
  if (threadIdx.x < 2) done[threadIdx.x] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step <= steps; ++step) {
    if (lane == 0) {
      const int ahead = atomicAdd(&done[warp], 1) + 1 - atomicAdd(&done[1 - warp], 0);
      atomicMax(farthest, unsigned(max(ahead, 0)));
    }
    __syncwarp();
  }
}

// A copy of 4 floats a lane, as it is before it is waited for, and after.
__global__ void __launch_bounds__(32) look_early(const float4* from, float4* early, float4* late) {
  __shared__ float4 stage[32];
  const int lane = threadIdx.x;
  copy_async(&stage[lane], from + lane, true);
  commit_copies();
  early[lane] = stage[lane];
  wait_for_copies<0>();
  late[lane] = stage[lane];
}

__global__ void __launch_bounds__(1024) fill(int64_t count, float value, float* to) {
  const int64_t at = (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (at < count && threadIdx.x == 0) to[at] = value;
}

// As many blocks as there are tiles, until a block loops.
unsigned blocks_for(int64_t tiles) { return unsigned(min(tiles, int64_t(0x7fffffff))); }

}  // namespace
}  // namespace hpcprune

using namespace hpcprune;

EXPORT int hpcprune_cuda_reverse_tiles(int bug, int64_t count, const float* from, float* to, void* stream) {
  if (count == 0) return 0;
  const unsigned blocks = blocks_for((count + 2 * TILE - 1) / (2 * TILE));
  LAUNCH(reverse_tiles<TILE>, dim3(blocks), dim3(TILE), 0, static_cast<cudaStream_t>(stream), bug, count, from, to);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_sum_blocks(int bug, int64_t count, const float* from, float* sums, void* stream) {
  if (count == 0) return 0;
  const unsigned blocks = blocks_for((count + 127) / 128);
  LAUNCH(sum_blocks, dim3(blocks), dim3(128), 4 * sizeof(float), static_cast<cudaStream_t>(stream), bug, count, from,
         sums);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_turn_pairs(int bug, const float2* from, float2* to, void* stream) {
  LAUNCH(turn_pairs, dim3(1), dim3(64), 0, static_cast<cudaStream_t>(stream), bug, from, to);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_copy_tiles(int bug, int tiles, const float4* from, float4* to, void* stream) {
  LAUNCH(copy_tiles, dim3(1), dim3(TILE), 0, static_cast<cudaStream_t>(stream), bug, tiles, from, to);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_multiply_fragments(int bug, const uint32_t* a, const uint32_t* b, float* d, void* stream) {
  LAUNCH(multiply_fragments, dim3(1), dim3(32), 0, static_cast<cudaStream_t>(stream), bug, a, b, d);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_count_values(int bug, int count, const int* values, int* counts, int* last, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(counts, 0, 16 * sizeof(int), on);
  LAUNCH(count_values, dim3(count / 64 + 1), dim3(64), 0, on, bug, count, values, counts, last);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_ask_intrinsics(const unsigned* values, unsigned* answers, float* sum, unsigned* extremes,
                                        unsigned long long* total, void* stream) {
  LAUNCH(ask_intrinsics, dim3(1), dim3(32), 0, static_cast<cudaStream_t>(stream), values, answers, sum, extremes, total);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_watch_warps(int steps, unsigned* farthest, void* stream) {
  LAUNCH(watch_warps, dim3(1), dim3(64), 0, static_cast<cudaStream_t>(stream), steps, farthest);
  return int(cudaGetLastError());
}

EXPORT int hpcprune_cuda_look_early(const float4* from, float4* early, float4* late, void* stream) {
  LAUNCH(look_early, dim3(1), dim3(32), 0, static_cast<cudaStream_t>(stream), from, early, late);
  return int(cudaGetLastError());
}

// A launch of any shape; `allowed` bytes of shared memory are asked for first, unless 0.
EXPORT int hpcprune_cuda_fill(const unsigned* grid, const unsigned* block, int shared, int allowed, int64_t count,
                              float value, float* to, void* stream) {
  if (allowed) cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
  LAUNCH(fill, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared,
         static_cast<cudaStream_t>(stream), count, value, to);
  return int(cudaGetLastError());
}
