// Survivors between dense storage and a packed vector, by a mask of bits.
//
//   gather    packed[j] = dense[i] for the j-th bit i that is 1
//   scatter   dense[i] = packed[j] where bit i is 1, else 0
//   update    dense[i] = packed[j] where bit i is 1; the others are not touched
//   popcount  how many bits are 1
//
// Elements are 2, 4 or 8 bytes and are moved as they are: what number they stand for does not matter here. Bit i of
// byte j stands for element 8 j + i; bits beyond the last element must be 0 (the caller has checked it).
//
//   g++ -O3 -std=c++17 -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: walks the set bits of 64-bit words; full and empty words are copied or cleared whole
// 2. avx512: compress and expand, a register at a time (2-byte elements need VBMI2, else they take version 1)

#include <cstdint>
#include <cstring>
#include <vector>

#include "../paths.h"

namespace hpcprune {
namespace {

// The 64 mask bits that begin at element `start`, of which elements before `stop` count.
inline uint64_t word(const uint8_t* bits, int64_t start, int64_t stop) {
  uint64_t result = 0;
  std::memcpy(&result, bits + start / 8, std::min<int64_t>(8, (stop - start + 7) / 8));
  return stop - start >= 64 ? result : result & ((uint64_t(1) << (stop - start)) - 1);
}

int64_t count(const uint8_t* bits, int64_t start, int64_t stop) {
  int64_t ones = 0;
  for (int64_t i = start; i < stop; i += 64) ones += __builtin_popcountll(word(bits, i, stop));
  return ones;
}

template <class Element>
void gather(const Element* dense, const uint8_t* bits, int64_t start, int64_t stop, Element* packed) {
  for (int64_t i = start; i < stop; i += 64) {
    uint64_t left = word(bits, i, stop);
    if (left == ~uint64_t(0)) {
      std::memcpy(packed, dense + i, 64 * sizeof(Element));
      packed += 64;
      continue;
    }
    for (; left; left &= left - 1) *packed++ = dense[i + __builtin_ctzll(left)];
  }
}

template <bool CLEAR, class Element>
void scatter(Element* dense, const uint8_t* bits, int64_t start, int64_t stop, const Element* packed) {
  for (int64_t i = start; i < stop; i += 64) {
    const int64_t here = std::min<int64_t>(64, stop - i);
    uint64_t left = word(bits, i, stop);
    if (left == ~uint64_t(0)) {
      std::memcpy(dense + i, packed, 64 * sizeof(Element));
      packed += 64;
      continue;
    }
    if (CLEAR) std::memset(dense + i, 0, here * sizeof(Element));
    for (; left; left &= left - 1) dense[i + __builtin_ctzll(left)] = *packed++;
  }
}

#if defined(__x86_64__)

// As many low bits set as `ones` has. (Compressing in a register and storing under such a mask is several times faster
// than a compressing store on some CPUs, and stores nothing beyond the end either.)
template <class Mask>
inline Mask leading(uint64_t ones) {
  return static_cast<Mask>((uint64_t(1) << __builtin_popcountll(ones)) - 1);
}

// Element-wise compress and expand of a whole register, by the element's size.
template <class Element>
struct Register;

template <>
struct Register<uint32_t> {
  AVX512 static void compress(uint32_t* to, uint64_t ones, const uint32_t* from) {
    const __mmask16 mask = static_cast<__mmask16>(ones);
    const __m512i packed = _mm512_maskz_compress_epi32(mask, _mm512_maskz_loadu_epi32(mask, from));
    _mm512_mask_storeu_epi32(to, leading<__mmask16>(ones), packed);
  }
  AVX512 static void expand(uint32_t* to, uint64_t ones, const uint32_t* from) {
    _mm512_storeu_si512(to, _mm512_maskz_expandloadu_epi32(static_cast<__mmask16>(ones), from));
  }
  AVX512 static void update(uint32_t* to, uint64_t ones, const uint32_t* from) {
    const __mmask16 mask = static_cast<__mmask16>(ones);
    _mm512_mask_storeu_epi32(to, mask, _mm512_maskz_expandloadu_epi32(mask, from));
  }
};

template <>
struct Register<uint64_t> {
  AVX512 static void compress(uint64_t* to, uint64_t ones, const uint64_t* from) {
    const __mmask8 mask = static_cast<__mmask8>(ones);
    const __m512i packed = _mm512_maskz_compress_epi64(mask, _mm512_maskz_loadu_epi64(mask, from));
    _mm512_mask_storeu_epi64(to, leading<__mmask8>(ones), packed);
  }
  AVX512 static void expand(uint64_t* to, uint64_t ones, const uint64_t* from) {
    _mm512_storeu_si512(to, _mm512_maskz_expandloadu_epi64(static_cast<__mmask8>(ones), from));
  }
  AVX512 static void update(uint64_t* to, uint64_t ones, const uint64_t* from) {
    const __mmask8 mask = static_cast<__mmask8>(ones);
    _mm512_mask_storeu_epi64(to, mask, _mm512_maskz_expandloadu_epi64(mask, from));
  }
};

template <>
struct Register<uint16_t> {
  AVX512_VBMI2 static void compress(uint16_t* to, uint64_t ones, const uint16_t* from) {
    const __mmask32 mask = static_cast<__mmask32>(ones);
    const __m512i packed = _mm512_maskz_compress_epi16(mask, _mm512_maskz_loadu_epi16(mask, from));
    _mm512_mask_storeu_epi16(to, leading<__mmask32>(ones), packed);
  }
  AVX512_VBMI2 static void expand(uint16_t* to, uint64_t ones, const uint16_t* from) {
    _mm512_storeu_si512(to, _mm512_maskz_expandloadu_epi16(static_cast<__mmask32>(ones), from));
  }
  AVX512_VBMI2 static void update(uint16_t* to, uint64_t ones, const uint16_t* from) {
    const __mmask32 mask = static_cast<__mmask32>(ones);
    _mm512_mask_storeu_epi16(to, mask, _mm512_maskz_expandloadu_epi16(mask, from));
  }
};

// Whether version 2 serves elements of this size on this CPU.
template <class Element>
bool with_registers(int path) {
  return path == WITH_AVX512 && (sizeof(Element) != 2 || __builtin_cpu_supports("avx512vbmi2"));
}

template <class Element>
constexpr int64_t WIDTH = 64 / sizeof(Element);

template <class Element>
AVX512 void gather_avx512(const Element* dense, const uint8_t* bits, int64_t start, int64_t stop, Element* packed) {
  const int64_t whole = start + (stop - start) / 64 * 64;
  for (int64_t i = start; i < whole; i += 64) {
    const uint64_t ones = word(bits, i, stop);
    for (int64_t j = 0; j < 64; j += WIDTH<Element>) {
      const uint64_t here = ones >> j & (~uint64_t(0) >> (64 - WIDTH<Element>));
      if (here == 0) continue;
      Register<Element>::compress(packed, here, dense + i + j);
      packed += _mm_popcnt_u64(here);
    }
  }
  gather(dense, bits, whole, stop, packed);
}

template <bool CLEAR, class Element>
AVX512 void scatter_avx512(Element* dense, const uint8_t* bits, int64_t start, int64_t stop, const Element* packed) {
  const int64_t whole = start + (stop - start) / 64 * 64;
  for (int64_t i = start; i < whole; i += 64) {
    const uint64_t ones = word(bits, i, stop);
    for (int64_t j = 0; j < 64; j += WIDTH<Element>) {
      const uint64_t here = ones >> j & (~uint64_t(0) >> (64 - WIDTH<Element>));
      if (CLEAR) {
        Register<Element>::expand(dense + i + j, here, packed);
      } else if (here) {
        Register<Element>::update(dense + i + j, here, packed);
      }
      packed += _mm_popcnt_u64(here);
    }
  }
  scatter<CLEAR>(dense, bits, whole, stop, packed);
}

#endif

// Where in the packed vector each run of slices begins.
std::vector<int64_t> offsets(const std::vector<std::vector<Slice>>& runs, const uint8_t* bits) {
  std::vector<int64_t> ones(runs.size()), result(runs.size());
  in_threads(runs.size(), [&](int64_t run) {
    for (const Slice& slice : runs[run]) ones[run] += count(bits, slice.start, slice.stop);
  });
  for (size_t run = 1; run < runs.size(); ++run) result[run] = result[run - 1] + ones[run - 1];
  return result;
}

template <class Element>
void gather_all([[maybe_unused]] int path, const void* dense, int64_t length, const uint8_t* bits, void* packed,
                int threads) {
  const auto runs = cut(&length, 1, threads);
  const auto offset = offsets(runs, bits);
  in_threads(runs.size(), [&](int64_t run) {
    for (const Slice& slice : runs[run]) {  // one at most: there is one array
      const Element* from = static_cast<const Element*>(dense);
      Element* to = static_cast<Element*>(packed) + offset[run];
#if defined(__x86_64__)
      if (with_registers<Element>(path)) {
        gather_avx512(from, bits, slice.start, slice.stop, to);
        continue;
      }
#endif
      gather(from, bits, slice.start, slice.stop, to);
    }
  });
}

template <bool CLEAR, class Element>
void scatter_all([[maybe_unused]] int path, void* dense, int64_t length, const uint8_t* bits, const void* packed,
                 int threads) {
  const auto runs = cut(&length, 1, threads);
  const auto offset = offsets(runs, bits);
  in_threads(runs.size(), [&](int64_t run) {
    for (const Slice& slice : runs[run]) {
      Element* to = static_cast<Element*>(dense);
      const Element* from = static_cast<const Element*>(packed) + offset[run];
#if defined(__x86_64__)
      if (with_registers<Element>(path)) {
        scatter_avx512<CLEAR>(to, bits, slice.start, slice.stop, from);
        continue;
      }
#endif
      scatter<CLEAR>(to, bits, slice.start, slice.stop, from);
    }
  });
}

}  // namespace
}  // namespace hpcprune

using namespace hpcprune;

// All return 0, or 1 for an element size that is not 2, 4 or 8. `bits` holds (length + 7) / 8 bytes; `packed` holds
// as many elements as bits are 1; `dense` holds `length` elements.
extern "C" {

int hpcprune_gather(int path, int size, const void* dense, int64_t length, const uint8_t* bits, void* packed,
                    int threads) {
  switch (size) {
    case 2: gather_all<uint16_t>(path, dense, length, bits, packed, threads); return 0;
    case 4: gather_all<uint32_t>(path, dense, length, bits, packed, threads); return 0;
    case 8: gather_all<uint64_t>(path, dense, length, bits, packed, threads); return 0;
    default: return 1;
  }
}

int hpcprune_scatter(int path, int size, void* dense, int64_t length, const uint8_t* bits, const void* packed,
                     int threads) {
  switch (size) {
    case 2: scatter_all<true, uint16_t>(path, dense, length, bits, packed, threads); return 0;
    case 4: scatter_all<true, uint32_t>(path, dense, length, bits, packed, threads); return 0;
    case 8: scatter_all<true, uint64_t>(path, dense, length, bits, packed, threads); return 0;
    default: return 1;
  }
}

int hpcprune_update(int path, int size, void* dense, int64_t length, const uint8_t* bits, const void* packed,
                    int threads) {
  switch (size) {
    case 2: scatter_all<false, uint16_t>(path, dense, length, bits, packed, threads); return 0;
    case 4: scatter_all<false, uint32_t>(path, dense, length, bits, packed, threads); return 0;
    case 8: scatter_all<false, uint64_t>(path, dense, length, bits, packed, threads); return 0;
    default: return 1;
  }
}

int64_t hpcprune_popcount(const uint8_t* bits, int64_t bytes) { return count(bits, 0, 8 * bytes); }

}  // extern "C"
