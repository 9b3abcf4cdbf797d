// Scores as integer keys that are ordered as they are, in registers; the same keys as on the CPU (threshold.cpp).

#pragma once

#include <type_traits>

#include "../cuda.h"
#include "../pack.cuh"

namespace hpcprune {

// What an array holds: floats ranked by value, floats ranked by magnitude, or keys made earlier.
enum View { SIGNED = 0, ABSOLUTE = 1, KEYS = 2 };

template <class Key>
__device__ __forceinline__ Key magnitude_of(Key bits) {
  constexpr Key ALL_BUT_SIGN = static_cast<Key>(std::make_unsigned_t<Key>(-1) >> 1);
  return bits & ALL_BUT_SIGN;
}

template <View VIEW, class Key>
__device__ __forceinline__ Key to_key(Key bits) {
  if (VIEW == KEYS) return bits;
  return VIEW == SIGNED && bits < 0 ? -magnitude_of(bits) : magnitude_of(bits);
}

// Up to COUNT neighbouring scores from `first` on: `valid` of them.
template <int COUNT, class Key>
struct Scores {
  Pack<Key, COUNT> bits;
  int valid;

  __device__ __forceinline__ Scores(const Key* data, int64_t first, int64_t length) : bits{} {
    valid = first + COUNT <= length ? COUNT : first < length ? static_cast<int>(length - first) : 0;
    if (valid == COUNT) {
      bits = load<COUNT>(data + first);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        if (i < valid) bits.at[i] = data[first + i];
    }
  }
};

// Calls work(Key's zero, View, how many neighbours a lane takes) for the key's bits, the view and where `data` lies.
template <class Key, View VIEW, class Work>
void with_alignment(const void* data, const Work& work) {
  const std::integral_constant<View, VIEW> view{};
  if (aligned<PACKED<Key>>(static_cast<const Key*>(data))) {
    work(Key(), view, std::integral_constant<int, PACKED<Key>>());
  } else {
    work(Key(), view, std::integral_constant<int, 1>());
  }
}

template <View VIEW, class Work>
bool with_key(int bits, const void* data, const Work& work) {
  switch (bits) {
    case 16: with_alignment<int16_t, VIEW>(data, work); return true;
    case 32: with_alignment<int32_t, VIEW>(data, work); return true;
    case 64: with_alignment<int64_t, VIEW>(data, work); return true;
    default: return false;
  }
}

template <class Work>
int with_types(int bits, int view, const void* data, const Work& work) {
  bool known = false;
  switch (view) {
    case SIGNED: known = with_key<SIGNED>(bits, data, work); break;
    case ABSOLUTE: known = with_key<ABSOLUTE>(bits, data, work); break;
    case KEYS: known = with_key<KEYS>(bits, data, work); break;
  }
  return known ? static_cast<int>(cudaGetLastError()) : 1;
}

}  // namespace hpcprune
