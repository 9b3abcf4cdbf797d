// Y = X W^T + bias for a pruned W in CSR: X is [batch, columns] and Y [batch, rows], as F.linear has them. With the CSR
// of W^T the same gives dX = dY W.
//
// For more than four samples X is transposed first (transpose.cuh), so that samples lie together: a nonzero is then one
// load of 128 bits by each lane, and as many fused multiply-adds. A warp takes a row and up to 32 packs of samples. Its
// nonzeros are staged in shared memory as pairs of column and weight, from where a lane takes two by one load; passed
// around by shuffles instead, the loop would hold a warp synchronisation a nonzero. With fewer samples than lanes can
// hold, the warp's lanes fall into groups which take different nonzeros of the row, and whose sums meet at its end.
// Sums are written as they lie, [rows, samples], and transposed into Y with the bias, so that all writes are whole
// lines in whatever order rows are taken.
//
// The caller gives that order, longest rows first: warps that run together then have equal work, and no long row is
// left for the end.
//
// For up to four samples nothing is transposed: a lane takes four nonzeros at a time and looks X up.
//
// An element's sum has a fixed order for a given number of samples, so results repeat bit by bit.
//
//   nvcc -O3 -std=c++17 -arch=sm_80 -shared -Xcompiler -fPIC kernels/spmm/csr.cu
//
// 1. few: one to four samples
// 2. tiles: more, 1 to 32 lanes wide

#include "../cuda.h"
#include "../pack.cuh"
#include "../transpose.cuh"

namespace hpcprune {
namespace {

constexpr int WARPS = 4;
constexpr int FEW = 4;

__device__ __forceinline__ int warp_index() { return blockIdx.x * WARPS + threadIdx.x / 32; }

template <class Value, class Element, int SAMPLES>
__global__ void __launch_bounds__(32 * WARPS)
    spmm_few(int rows, int columns, const int32_t* __restrict__ row_start, const int32_t* __restrict__ column,
             const Value* __restrict__ value, bool packs, const int32_t* __restrict__ row_order,
             const Element* __restrict__ x, const float* __restrict__ bias, Element* __restrict__ y) {
  if (warp_index() >= rows) return;
  const int lane = threadIdx.x % 32, row = row_order[warp_index()], begin = row_start[row];
  const int length = row_start[row + 1] - begin;
  column += begin;
  value += begin;
  float sums[SAMPLES] = {};
  const auto add = [&](int k, Value weight) {
#pragma unroll
    for (int b = 0; b < SAMPLES; ++b) sums[b] = fmaf(widen(weight), widen(x[b * columns + k]), sums[b]);
  };
  // Packs are aligned in memory, not in the row: its first may begin before it.
  for (int j = 4 * lane - begin % 4; j < length; j += 4 * 32) {
    if (packs && j >= 0 && j + 4 <= length) {
      const auto at = load<4>(column + j);
      const auto weight = load<4>(value + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) add(at.at[i], weight.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j + i >= 0 && j + i < length) add(column[j + i], value[j + i]);
    }
  }
#pragma unroll
  for (int b = 0; b < SAMPLES; ++b) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sums[b] += __shfl_xor_sync(ALL_LANES, sums[b], apart);
    if (lane == b) narrow(sums[b] + (bias ? bias[row] : 0.0f), &y[int64_t(b) * rows + row]);
  }
}

// `offset` is where the column's samples begin in X transposed, in packs: it fits 32 bits, as a slab is at most 256
// packs.
struct Nonzero {
  uint32_t offset;
  float weight;
};

// Blocks that an SM shall hold: with 80 registers a thread all of a group's loads are on their way at once, and none
// spills. Left to itself the compiler saves registers and takes loads two by two.
constexpr int RESIDENT = 6;

// What a group of lanes takes from the nonzeros that its warp has staged: two by two, in turns with the other groups,
// so that a warp reads neighbours. STEPS loads of X are on their way at once.
template <class Element, int LANES>
struct Group {
  static constexpr int WIDTH = PACKED<Element>, GROUPS = 32 / LANES;
  static constexpr int STAGED = GROUPS > 8 ? 4 * GROUPS : 32;
  static constexpr int STEPS = STAGED / GROUPS < 8 ? STAGED / GROUPS : 8;
  static constexpr int TAKEN = STEPS * GROUPS;  // by all groups at once

  float sums[WIDTH] = {};

  // Adds the TAKEN nonzeros from `staged` on, or where they are not WHOLE only the first `count` of them.
  template <bool WHOLE>
  __device__ __forceinline__ void add(const Nonzero* staged, int group, int count, const Pack<Element, WIDTH>* x) {
    Pack<Element, WIDTH> samples[STEPS];
    float weight[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
      const int first = 2 * group + step * GROUPS;
      const auto two = load<2>(staged + first);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool valid = WHOLE || first + i < count;
        weight[step + i] = valid ? two.at[i].weight : 0.0f;
        samples[step + i] = Pack<Element, WIDTH>{};
        if (valid) samples[step + i] = x[two.at[i].offset];
      }
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      float values[WIDTH];
      widen(samples[step], values);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) sums[i] = fmaf(weight[step], values[i], sums[i]);
    }
  }
};

// x is [columns, stride], `sums` [rows, stride].
template <class Value, class Element, int LANES>
__global__ void __launch_bounds__(32 * WARPS, RESIDENT)
    spmm_tile(int rows, const int32_t* __restrict__ row_start, const int32_t* __restrict__ column,
              const Value* __restrict__ value, const int32_t* __restrict__ row_order, const Element* __restrict__ x,
              int first_sample, int stride, float* __restrict__ sums) {
  using Own = Group<Element, LANES>;
  constexpr int STAGED = Own::STAGED, WIDTH = Own::WIDTH;
  alignas(16) __shared__ Nonzero staged[WARPS][STAGED];
  if (warp_index() >= rows) return;
  const int lane = threadIdx.x % 32, group = lane / LANES, row = row_order[warp_index()];
  Nonzero* const here = staged[threadIdx.x / 32];
  const int sample = first_sample + blockIdx.y * LANES * WIDTH + lane % LANES * WIDTH;
  // Lanes beyond the last sample add the first ones' again, and store nothing.
  const auto* const samples = reinterpret_cast<const Pack<Element, WIDTH>*>(x + (sample < stride ? sample : 0));
  const uint32_t packs = stride / WIDTH;

  const int begin = row_start[row], length = row_start[row + 1] - begin;
  column += begin;
  value += begin;
  Nonzero next[STAGED / 32];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < STAGED / 32; ++i) {
      const int j = from + 32 * i + lane;
      next[i] = j < length ? Nonzero{column[j] * packs, widen(value[j])} : Nonzero{0, 0.0f};
    }
  };
  Own own;
  fetch(0);
  for (int from = 0; from < length; from += STAGED) {
#pragma unroll
    for (int i = 0; i < STAGED / 32; ++i) here[32 * i + lane] = next[i];
    __syncwarp();
    fetch(from + STAGED);
    const int count = min(STAGED, length - from);
    int taken = 0;
#pragma unroll 1
    for (; taken + Own::TAKEN <= count; taken += Own::TAKEN)
      own.template add<true>(here + taken, group, Own::TAKEN, samples);
    if (taken < count) own.template add<false>(here + taken, group, count - taken, samples);
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i)
#pragma unroll
    for (int apart = LANES; apart < 32; apart *= 2) own.sums[i] += __shfl_xor_sync(ALL_LANES, own.sums[i], apart);
  if (group > 0 || sample >= stride) return;
  float* const target = sums + int64_t(row) * stride + sample;
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4)
    store(Pack<float, 4>{own.sums[i], own.sums[i + 1], own.sums[i + 2], own.sums[i + 3]}, target + i);
}

template <class Value>
struct Matrix {
  int64_t rows, columns;
  const int32_t *row_start, *column;
  const Value* value;
  const int32_t* row_order;
};

template <class Value, class Element>
void few(const Matrix<Value>& w, const Element* x, int64_t batch, const float* bias, Element* y, cudaStream_t stream) {
  const bool packs = aligned<4>(w.column) && aligned<4>(w.value);
  const auto run = [&](auto kernel) {
    LAUNCH(kernel, dim3((w.rows + WARPS - 1) / WARPS), dim3(32 * WARPS), 0, stream, int(w.rows), int(w.columns),
           w.row_start, w.column, w.value, packs, w.row_order, x, bias, y);
  };
  switch (batch) {
    case 1: return run(spmm_few<Value, Element, 1>);
    case 2: return run(spmm_few<Value, Element, 2>);
    case 3: return run(spmm_few<Value, Element, 3>);
    default: return run(spmm_few<Value, Element, 4>);
  }
}

// Samples from `first` on, in the narrowest tiles that hold them: whole ones, then what is left.
template <class Value, class Element>
void tiles(const Matrix<Value>& w, const Element* x, int64_t first, int64_t stride, float* sums, cudaStream_t stream) {
  const int64_t left = stride - first;
  if (left <= 0) return;
  const auto run = [&](auto kernel, int lanes) {
    const int64_t width = lanes * PACKED<Element>;
    // A rest of more than half a tile goes with the whole ones.
    const int64_t count = std::max<int64_t>(1, (left + width / 2 - 1) / width);
    LAUNCH(kernel, dim3((w.rows + WARPS - 1) / WARPS, count), dim3(32 * WARPS), 0, stream, int(w.rows), w.row_start,
           w.column, w.value, w.row_order, x, int(first), int(stride), sums);
    tiles(w, x, first + count * width, stride, sums, stream);
  };
  const int64_t packs = left / PACKED<Element>;
  if (packs > 16) return run(spmm_tile<Value, Element, 32>, 32);
  if (packs > 8) return run(spmm_tile<Value, Element, 16>, 16);
  if (packs > 4) return run(spmm_tile<Value, Element, 8>, 8);
  if (packs > 2) return run(spmm_tile<Value, Element, 4>, 4);
  if (packs > 1) return run(spmm_tile<Value, Element, 2>, 2);
  run(spmm_tile<Value, Element, 1>, 1);
}

// Scratch holds a slab of X transposed, and its sums.
template <class Element>
int64_t scratch_bytes(int64_t rows, int64_t columns, int64_t batch) {
  if (batch <= FEW) return 0;
  return padded<Element>(std::min(batch, SLAB)) * (columns * sizeof(Element) + rows * sizeof(float));
}

template <class Value, class Element>
int spmm(const Matrix<Value>& w, const Element* x, int64_t batch, const float* bias, Element* y, void* scratch,
         void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (w.rows == 0 || batch == 0) return int(cudaGetLastError());
  if (batch <= FEW) {
    few(w, x, batch, bias, y, stream);
    return int(cudaGetLastError());
  }
  for (int64_t start = 0; start < batch; start += SLAB) {
    const int64_t samples = std::min(SLAB, batch - start), stride = padded<Element>(samples);
    Element* const across = static_cast<Element*>(scratch);
    float* const sums = reinterpret_cast<float*>(across + w.columns * stride);
    transpose(x + start * w.columns, samples, w.columns, w.columns, nullptr, across, stride, stream);
    tiles(w, static_cast<const Element*>(across), 0, stride, sums, stream);
    transpose(static_cast<const float*>(sums), w.rows, samples, stride, bias, y + start * w.rows, w.rows, stream);
  }
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace hpcprune

// Of `kind`, 1 is set where the weights are bfloat16, else float, and 2 where X and Y are; bias is float, or null.
// `row_order` holds every row once, longest first. `scratch` begins at a multiple of 16 bytes.
EXPORT int64_t hpcprune_cuda_spmm_csr_scratch(int kind, int64_t rows, int64_t columns, int64_t batch) {
  using namespace hpcprune;
  return kind & 2 ? scratch_bytes<uint16_t>(rows, columns, batch) : scratch_bytes<float>(rows, columns, batch);
}

EXPORT int hpcprune_cuda_spmm_csr(int kind, int64_t rows, int64_t columns, const int32_t* row_start,
                                  const int32_t* column, const void* value, const int32_t* row_order, const void* x,
                                  int64_t batch, const float* bias, void* y, void* scratch, void* stream) {
  using namespace hpcprune;
  const auto run = [&](const auto* weights, const auto* from, auto* to) {
    const Matrix<std::decay_t<decltype(*weights)>> w{rows, columns, row_start, column, weights, row_order};
    return spmm(w, from, batch, bias, to, scratch, stream);
  };
  const auto *whole = static_cast<const float*>(value), *x32 = static_cast<const float*>(x);
  const auto *half = static_cast<const uint16_t*>(value), *x16 = static_cast<const uint16_t*>(x);
  switch (kind) {
    case 0: return run(whole, x32, static_cast<float*>(y));
    case 1: return run(half, x32, static_cast<float*>(y));
    case 2: return run(whole, x16, static_cast<uint16_t*>(y));
    default: return run(half, x16, static_cast<uint16_t*>(y));
  }
}
