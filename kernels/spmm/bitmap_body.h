// The product of bitmap.cpp for one path; see each_path.h.

#if LANES == 16

INLINE Float16 expand(const float* value, uint32_t mask) {
  return Float16(_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(value)));
}

INLINE Float16 expand(const bfloat16* value, uint32_t mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value)));
  return Float16(
      _mm512_castsi512_ps(_mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_slli_epi32(wide, 16))));
}

#else

// A path without an instruction for it: survivor by survivor into an array.
template <class Value>
INLINE Float16 expand(const Value* value, uint32_t mask) {
  float lanes[16] = {};
  for (; mask; mask &= mask - 1) lanes[__builtin_ctz(mask)] = widen(*value++);
  return load<Float16>(lanes);
}

#endif

// A row's masks, 16 bits each: where rows begin at a byte they are read as they are.
struct Aligned {
  const uint8_t* at;
  explicit Aligned(const uint8_t* bits, int64_t bit) : at(bits + uint64_t(bit) / 8) {}
  INLINE uint32_t next() {
    uint16_t mask;
    std::memcpy(&mask, at, sizeof mask);
    at += 2;
    return mask;
  }
};

struct Shifted {
  const uint8_t* at;
  int shift;
  Shifted(const uint8_t* bits, int64_t bit) : at(bits + uint64_t(bit) / 8), shift(bit % 8) {}
  INLINE uint32_t next() {
    uint32_t word;
    std::memcpy(&word, at, sizeof word);
    at += 2;
    return word >> shift & 0xffff;
  }
};

// A row with one sample, whose x ends in 32 zeros.
template <class Masks, class Value>
INLINE float row_sum(Masks masks, const Value* value, int64_t columns, const float* x) {
  Float16 sum = {}, sum1 = {};
  int64_t k = 0;
  for (; k + 32 <= columns; k += 32) {
    const uint32_t mask = masks.next(), mask1 = masks.next();
    __builtin_prefetch(value + 1024);
    const Float16 weights = expand(value, mask);
    value += __builtin_popcount(mask);
    const Float16 weights1 = expand(value, mask1);
    value += __builtin_popcount(mask1);
    sum = weights * load<Float16>(x + k) + sum;
    sum1 = weights1 * load<Float16>(x + k + 16) + sum1;
  }
  for (; k < columns; k += 16) {
    const uint32_t mask = masks.next() & ((uint32_t(1) << std::min<int64_t>(16, columns - k)) - 1);
    sum = expand(value, mask) * load<Float16>(x + k) + sum;
    value += __builtin_popcount(mask);
  }
  sum += sum1;
  float lanes[16], total = 0;
  store(sum, lanes);
  for (float each : lanes) total += each;
  return total;
}

template <class Value, class Element>
inline void bitmap_rows(const Bitmap<Value>& w, int64_t first, int64_t last, const float* x, const float* bias,
                        Element* y) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t bit = row * w.columns;
    const Value* value = w.value + w.first[row];
    const float sum = w.columns % 8 ? row_sum(Shifted(w.bits, bit), value, w.columns, x)
                                    : row_sum(Aligned(w.bits, bit), value, w.columns, x);
    narrow(bias ? sum + bias[row] : sum, y + row);
  }
}
