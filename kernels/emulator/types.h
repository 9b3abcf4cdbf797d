// CUDA's vectors and what its headers define on single numbers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using std::max;
using std::min;

namespace cuemu __attribute__((visibility("hidden"))) {

  template <class To, class From>
  inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "bits are neither cut nor made up");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
  }

}  // namespace cuemu

inline float __uint_as_float(unsigned bits) { return cuemu::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return cuemu::bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return cuemu::bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return cuemu::bits_as<int>(value); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }

template <class Value>
inline Value __ldg(const Value* from) {
  return *from;
}
