// What the tensor core kernels share: how tiles of bfloat16 matrices come to shared memory, and how they lie there.
//
// A tile moves in chunks of 8 elements, 16 bytes, the most that one cp.async copies. Tiles of 64 columns are read as
// operands of multiply_add whose inner dimension is the columns. A product does not care in which order its inner
// dimension is summed, so that order is chosen such that a lane's operands of two products lie together: of 32 columns
// lane l takes the 8 from 8 (l % 4) on, the first 4 for the first product, the others for the second, which makes one
// 128-bit load. The eight lanes that such a load serves at once read half of each of two neighbouring lines; in odd
// lines the halves change places, so that the eight read from all banks.

#pragma once

#include "cuda.h"

namespace hpcprune {

constexpr int CHUNK = 8;                    // elements
constexpr int TILE_COLUMNS = 64;            // an operand's columns in shared memory
constexpr int LINE = TILE_COLUMNS / CHUNK;  // chunks of a line
constexpr int HALF = LINE / 2;              // chunks that one load of all lanes takes from a line

// Where a chunk of a line of 64 columns lies, in chunks from the tile's first.
__device__ __forceinline__ int place(int line, int chunk) { return line * LINE + (chunk ^ (line & 1) * HALF); }

// Loads the 8 elements at `from` to shared memory one by one, of which the first `inside` are the matrix's and the rest
// zeros: where lines do not begin at multiples of 16 bytes.
__device__ __forceinline__ void load(uint4* shared, const uint16_t* from, int64_t inside) {
  uint16_t* const to = reinterpret_cast<uint16_t*>(shared);
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) to[i] = i < inside ? from[i] : uint16_t(0);
}

// Whether every line of a row-major matrix of bfloat16 is whole chunks that may be copied as such.
inline bool whole_chunks(const void* matrix, int64_t columns) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && columns % CHUNK == 0;
}

// The two operands that a lane's 128 bits hold: words 0 and 1, or 2 and 3.
__device__ __forceinline__ uint32_t word(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Allows a kernel more than the 48 KiB of shared memory that it has without being asked for.
template <class Kernel>
void allow_shared(Kernel* kernel, int64_t bytes) {
  if (bytes > 48 << 10)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace hpcprune
