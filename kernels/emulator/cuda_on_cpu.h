// The part of CUDA that the kernels here use, on a CPU: tests run a .cu file where there is no GPU, and see more.
//
// A thread of the GPU is a fiber: a stack of its own, run until it waits. So kernels do what they would do on a GPU, in
// an order that the seed in CUEMU_SEED decides, and what a GPU would let pass ends the launch with an error:
//
//   - threads of a block that wait at different barriers, or for each other, or for some that have exited
//   - lanes of a warp that meet at different intrinsics, or with different masks; a shuffle from a lane that is not
//   there
//   - shared memory that is read before it is written, or before its asynchronous copy was waited for: it holds NaN, -1
//   - an access where no memory is
//   - a launch over CUDA's limits
//
// and, where the compiler is told, accesses out of bounds (-fsanitize=address) and races (-fsanitize=thread). Blocks
// run one after the other, and the thread sanitizer looks at each and the next one: of two that race, and are apart in
// one order, another seed brings them together.
//
//   g++ -O2 -std=c++17 -DCUDA_ON_CPU -fdata-sections -Wl,-T,kernels/emulator/shared.ld -x c++ -shared -fPIC file.cu
//
// `cudaGetLastError` tells that a launch failed, `cuemu_error` why.

#pragma once

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "the emulator switches stacks in x86-64 assembly, for GCC"
#endif

#include <cmath>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after the other and can have the same memory.
#define __shared__ static

#include "block.h"
#include "launch.h"
#include "memory.h"
#include "mma.h"
#include "runtime.h"
#include "types.h"
#include "warp.h"

#define threadIdx (cuemu::block.current->index)
#define blockIdx (cuemu::block.index)
#define blockDim (cuemu::block.size)
#define gridDim (cuemu::block.grid)

#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuemu::launch(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuemu::dynamic_shared)
