// What a register of integer keys can do, for each path: what the passes of passes.h are written in.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../paths.h"

namespace hpcprune {
namespace {

namespace portable {
template <class Key>
struct Lanes {
  static constexpr int WIDTH = 16;
  struct Register {
    Key key[WIDTH];
  };
  static Register load(const Key* from) {
    Register result;
    std::memcpy(&result, from, sizeof result);
    return result;
  }
  static Register all(Key key) {
    Register result;
    for (Key& lane : result.key) lane = key;
    return result;
  }
  static Register magnitude(Register x) {
    for (Key& lane : x.key) lane &= std::numeric_limits<Key>::max();
    return x;
  }
  static Register signed_key(const Register& x, Register magnitude) {
    for (int i = 0; i < WIDTH; ++i) magnitude.key[i] = x.key[i] < 0 ? -magnitude.key[i] : magnitude.key[i];
    return magnitude;
  }
  static uint64_t greater(const Register& a, const Register& b) {
    uint64_t ones = 0;
    for (int i = 0; i < WIDTH; ++i) ones |= uint64_t(a.key[i] > b.key[i]) << i;
    return ones;
  }
  static uint64_t equal(const Register& a, const Register& b) {
    uint64_t ones = 0;
    for (int i = 0; i < WIDTH; ++i) ones |= uint64_t(a.key[i] == b.key[i]) << i;
    return ones;
  }
  static void compress(Key* to, uint64_t ones, const Register& x) {
    for (; ones; ones &= ones - 1) *to++ = x.key[__builtin_ctzll(ones)];
  }
};
}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {

// What does not depend on the width of a key.
template <class Key>
struct Common {
  using Register = __m256i;
  static constexpr int WIDTH = 32 / sizeof(Key);
  AVX2 static Register load(const Key* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  AVX2 static void compress(Key* to, uint64_t ones, Register x) {
    if (!ones) return;
    alignas(32) Key keys[WIDTH];
    _mm256_store_si256(reinterpret_cast<__m256i*>(keys), x);
    for (; ones; ones &= ones - 1) *to++ = keys[__builtin_ctzll(ones)];
  }
};

template <class Key>
struct Lanes;

template <>
struct Lanes<int16_t> : Common<int16_t> {
  AVX2 static Register all(int16_t key) { return _mm256_set1_epi16(key); }
  AVX2 static Register magnitude(Register x) { return _mm256_and_si256(x, all(INT16_MAX)); }
  AVX2 static Register signed_key(Register x, Register m) {
    const Register sign = _mm256_srai_epi16(x, 15);
    return _mm256_sub_epi16(_mm256_xor_si256(m, sign), sign);
  }
  AVX2 static uint64_t bits(Register lanes) {
    const Register bytes = _mm256_packs_epi16(lanes, _mm256_setzero_si256());
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
  }
  AVX2 static uint64_t greater(Register a, Register b) { return bits(_mm256_cmpgt_epi16(a, b)); }
  AVX2 static uint64_t equal(Register a, Register b) { return bits(_mm256_cmpeq_epi16(a, b)); }
};

template <>
struct Lanes<int32_t> : Common<int32_t> {
  AVX2 static Register all(int32_t key) { return _mm256_set1_epi32(key); }
  AVX2 static Register magnitude(Register x) { return _mm256_and_si256(x, all(INT32_MAX)); }
  AVX2 static Register signed_key(Register x, Register m) {
    const Register sign = _mm256_srai_epi32(x, 31);
    return _mm256_sub_epi32(_mm256_xor_si256(m, sign), sign);
  }
  AVX2 static uint64_t bits(Register lanes) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
  }
  AVX2 static uint64_t greater(Register a, Register b) { return bits(_mm256_cmpgt_epi32(a, b)); }
  AVX2 static uint64_t equal(Register a, Register b) { return bits(_mm256_cmpeq_epi32(a, b)); }
};

template <>
struct Lanes<int64_t> : Common<int64_t> {
  AVX2 static Register all(int64_t key) { return _mm256_set1_epi64x(key); }
  AVX2 static Register magnitude(Register x) { return _mm256_and_si256(x, all(INT64_MAX)); }
  AVX2 static Register signed_key(Register x, Register m) {
    const Register sign = _mm256_cmpgt_epi64(_mm256_setzero_si256(), x);
    return _mm256_sub_epi64(_mm256_xor_si256(m, sign), sign);
  }
  AVX2 static uint64_t bits(Register lanes) {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(lanes)));
  }
  AVX2 static uint64_t greater(Register a, Register b) { return bits(_mm256_cmpgt_epi64(a, b)); }
  AVX2 static uint64_t equal(Register a, Register b) { return bits(_mm256_cmpeq_epi64(a, b)); }
};

}  // namespace avx2

namespace avx512 {

template <class Key>
struct Common {
  using Register = __m512i;
  static constexpr int WIDTH = 64 / sizeof(Key);
  AVX512 static Register load(const Key* from) { return _mm512_loadu_si512(from); }
};

template <class Key>
struct Lanes;

template <>
struct Lanes<int16_t> : Common<int16_t> {
  AVX512 static Register all(int16_t key) { return _mm512_set1_epi16(key); }
  AVX512 static Register magnitude(Register x) { return _mm512_and_si512(x, all(INT16_MAX)); }
  AVX512 static Register signed_key(Register x, Register m) {
    return _mm512_mask_sub_epi16(m, _mm512_movepi16_mask(x), _mm512_setzero_si512(), m);
  }
  AVX512 static uint64_t greater(Register a, Register b) { return _mm512_cmpgt_epi16_mask(a, b); }
  AVX512 static uint64_t equal(Register a, Register b) { return _mm512_cmpeq_epi16_mask(a, b); }
  // 16-bit lanes compress in a register only with VBMI2, which not every AVX-512 CPU has.
  AVX512 static void compress(int16_t* to, uint64_t ones, Register x) {
    if (!ones) return;
    alignas(64) int16_t keys[WIDTH];
    _mm512_store_si512(keys, x);
    for (; ones; ones &= ones - 1) *to++ = keys[__builtin_ctzll(ones)];
  }
};

template <>
struct Lanes<int32_t> : Common<int32_t> {
  AVX512 static Register all(int32_t key) { return _mm512_set1_epi32(key); }
  AVX512 static Register magnitude(Register x) { return _mm512_and_si512(x, all(INT32_MAX)); }
  AVX512 static Register signed_key(Register x, Register m) {
    return _mm512_mask_sub_epi32(m, _mm512_movepi32_mask(x), _mm512_setzero_si512(), m);
  }
  AVX512 static uint64_t greater(Register a, Register b) { return _mm512_cmpgt_epi32_mask(a, b); }
  AVX512 static uint64_t equal(Register a, Register b) { return _mm512_cmpeq_epi32_mask(a, b); }
  AVX512 static void compress(int32_t* to, uint64_t ones, Register x) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(ones), x));
  }
};

template <>
struct Lanes<int64_t> : Common<int64_t> {
  AVX512 static Register all(int64_t key) { return _mm512_set1_epi64(key); }
  AVX512 static Register magnitude(Register x) { return _mm512_and_si512(x, all(INT64_MAX)); }
  AVX512 static Register signed_key(Register x, Register m) {
    return _mm512_mask_sub_epi64(m, _mm512_movepi64_mask(x), _mm512_setzero_si512(), m);
  }
  AVX512 static uint64_t greater(Register a, Register b) { return _mm512_cmpgt_epi64_mask(a, b); }
  AVX512 static uint64_t equal(Register a, Register b) { return _mm512_cmpeq_epi64_mask(a, b); }
  AVX512 static void compress(int64_t* to, uint64_t ones, Register x) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(static_cast<__mmask8>(ones), x));
  }
};

}  // namespace avx512

#endif

}  // namespace
}  // namespace hpcprune
