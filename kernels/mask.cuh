// Packed masks as warps take them: in tiles of 1,024 bits, a word of 32 for each lane.
//
// Bit i of byte j stands for element 8 j + i. A mask may begin at any byte and its last byte's padding is zeros, so a
// word is read and written whole only where it is aligned and lies inside.

#pragma once

#include "cuda.h"

namespace hpcprune {

constexpr int WARP = 32;    // lanes
constexpr int TILE = 1024;  // bits, and elements

inline int64_t tiles_of(int64_t length) { return (length + TILE - 1) / TILE; }

// The 32 bits from element `start` on, a multiple of 32; zeros from `length` on.
__device__ __forceinline__ uint32_t load_word(const uint8_t* bits, int64_t start, int64_t length) {
  if (start >= length) return 0;
  const uint8_t* from = bits + start / 8;
  if (length - start >= WARP) {
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0) return *reinterpret_cast<const uint32_t*>(from);
    return from[0] | from[1] << 8 | from[2] << 16 | uint32_t(from[3]) << 24;
  }
  const int here = static_cast<int>(length - start);
  uint32_t word = 0;
  for (int i = 0; 8 * i < here; ++i) word |= uint32_t(from[i]) << 8 * i;
  return word;
}

__device__ __forceinline__ void store_word(uint32_t word, uint8_t* bits, int64_t start, int64_t length) {
  if (start >= length) return;
  uint8_t* to = bits + start / 8;
  if (length - start >= WARP && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = word;
    return;
  }
  const int here = static_cast<int>(length - start < WARP ? length - start : WARP);
  for (int i = 0; 8 * i < here; ++i) to[i] = static_cast<uint8_t>(word >> 8 * i);
}

}  // namespace hpcprune
