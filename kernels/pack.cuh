// Neighbours in memory that are loaded and stored by one instruction, of 128 bits at most.

#pragma once

#include <cstring>

#include "cuda.h"

namespace hpcprune {

template <class Element, int COUNT>
struct alignas(sizeof(Element) * COUNT) Pack {
  Element at[COUNT];
};

// How many elements fill 128 bits.
template <class Element>
constexpr int PACKED = 16 / sizeof(Element);

template <int COUNT, class Element>
__device__ __forceinline__ Pack<Element, COUNT> load(const Element* from) {
  return *reinterpret_cast<const Pack<Element, COUNT>*>(from);
}

template <int COUNT, class Element>
__device__ __forceinline__ void store(const Pack<Element, COUNT>& pack, Element* to) {
  *reinterpret_cast<Pack<Element, COUNT>*>(to) = pack;
}

template <int COUNT>
__device__ __forceinline__ void widen(const Pack<float, COUNT>& pack, float (&to)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) to[i] = pack.at[i];
}

// Two at a time, an instruction each: taken out of their pack first they would be two.
template <int COUNT>
__device__ __forceinline__ void widen(const Pack<uint16_t, COUNT>& pack, float (&to)[COUNT]) {
  uint32_t twos[COUNT / 2];
  memcpy(twos, pack.at, sizeof(twos));
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) {
    to[2 * i] = __uint_as_float(twos[i] << 16);
    to[2 * i + 1] = __uint_as_float(twos[i] & 0xffff0000u);
  }
}

template <int COUNT, class Element>
bool aligned(const Element* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(Element) * COUNT) == 0;
}

}  // namespace hpcprune
