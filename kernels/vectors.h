// Vectors of floats in the compiler's own notation, for the bodies that `each_path.h` compiles for every path.
//
// Everything here is inlined into functions of a path and takes that path's instructions.

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, hpcprune::Index4{i, j, k, l})
#endif

namespace hpcprune {

typedef float Float4 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Index4 __attribute__((vector_size(16)));

struct bfloat16 {
  uint16_t bits;
};

template <class Vector>
INLINE Vector load(const float* from) {
  Vector result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

template <class Vector>
INLINE void store(const Vector& value, float* to) {
  std::memcpy(to, &value, sizeof value);
}

INLINE float widen(float value) { return value; }

INLINE float widen(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <class Vector>
INLINE Vector load(const bfloat16* from) {
  uint32_t lanes[sizeof(Vector) / sizeof(float)];
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(float); ++i) lanes[i] = uint32_t(from[i].bits) << 16;
  Vector result;
  std::memcpy(&result, lanes, sizeof result);
  return result;
}

// Calls a product with its pointers as the types that they have: of `kind`, 1 is set where the weights are bfloat16,
// else float, and 2 where X and Y are.
template <class Product>
int with_types(int kind, const void* value, const void* x, void* y, const Product& product) {
  const auto* whole = static_cast<const float*>(value);
  const auto* half = static_cast<const bfloat16*>(value);
  const auto weights = [&](const auto* from, auto* to) {
    return kind & 1 ? product(half, from, to) : product(whole, from, to);
  };
  return kind & 2 ? weights(static_cast<const bfloat16*>(x), static_cast<bfloat16*>(y))
                  : weights(static_cast<const float*>(x), static_cast<float*>(y));
}

INLINE void narrow(float value, float* to) { *to = value; }

// To the nearest, ties to even; NaN stays NaN.
INLINE void narrow(float value, bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Vector>
INLINE void store(const Vector& value, bfloat16* to) {
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(float); ++i) narrow(value[i], to + i);
}

}  // namespace hpcprune
