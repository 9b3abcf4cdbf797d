// The gradient of the surviving weights alone, those of dY^T X, in the order of the survivors:
//
//   gradient[j] = sum over samples b of dY[b, row(j)] X[b, column(j)]
//
// dY and X are transposed first (transpose.cuh), so that a survivor is the product of two rows. A warp has a share of
// the survivors, wherever rows begin and end: a row that holds everything is split over all warps, and empty rows cost
// nothing. Within a row of W, dY's row stays in registers while X's rows pass, eight at a time: their loads are on
// their way together, and their sums over lanes are taken together, half of them going to each half of the lanes, which
// takes 9 shuffles in place of 40. With fewer samples than lanes can hold, groups of lanes take different survivors.
//
// A block is one warp: where a loop ends then depends on the block alone, which the compiler knows for all lanes to be
// the same, and it need not synchronise them before each shuffle.
//
//   nvcc -O3 -std=c++17 -arch=sm_80 -shared -Xcompiler -fPIC kernels/sddmm/csr.cu
//
// 1. once: samples that the lanes hold at once, groups of 4, 8, 16 or 32 lanes
// 2. loop: more samples, 32 lanes of them at a time

#include "../cuda.h"
#include "../pack.cuh"
#include "../transpose.cuh"

namespace hpcprune {
namespace {

// Survivors that a warp takes: a multiple of the least, so that its columns are loaded in whole lines.
constexpr int LEAST_SHARE = 32, LARGEST_SHARE = 256;
// About twice what an H100 holds at once: 132 SMs of 32 blocks. Where there would be more, larger shares save searches
// for rows.
constexpr int64_t ENOUGH_WARPS = 8192;

// The row that holds survivor j: the last from `row` on that begins no later. `step` is how far to look first.
__device__ __forceinline__ int row_of(const int32_t* __restrict__ row_start, int rows, int row, int step, int64_t j) {
  int beyond = rows;
  while (step < beyond - row) {
    if (row_start[row + step] > j) {
      beyond = row + step;
    } else {
      row += step;
      step *= 2;
    }
  }
  while (beyond - row > 1) {
    const int middle = row + (beyond - row) / 2;
    (row_start[middle] > j ? beyond : row) = middle;
  }
  return row;
}

// Adds COUNT sums over groups of LANES lanes; a lane ends with that of number lane % LANES * COUNT / LANES.
template <int LANES, int COUNT>
__device__ __forceinline__ float sum_of_lanes(float (&sums)[COUNT], int lane) {
  int left = COUNT;
#pragma unroll
  for (int apart = LANES / 2; apart > 0; apart /= 2) {
    if (left > 1) {
      left /= 2;
      const bool upper = lane & apart;
#pragma unroll
      for (int i = 0; i < left; ++i) {
        const float kept = upper ? sums[left + i] : sums[i], given = upper ? sums[i] : sums[left + i];
        sums[i] = kept + __shfl_xor_sync(ALL_LANES, given, apart);
      }
    } else {
      sums[0] += __shfl_xor_sync(ALL_LANES, sums[0], apart);
    }
  }
  return sums[0];
}

// Blocks that an SM shall hold, so that registers suffice for COUNT loads at once.
template <bool ONCE>
constexpr int RESIDENT = ONCE ? 24 : 20;

// x is [columns, stride] and dy [rows, stride]. Where `add` is set, sums are added to what the gradient is.
template <class Element, int LANES, bool ONCE>
__global__ void __launch_bounds__(32, RESIDENT<ONCE>)
    sddmm_share(int rows, int64_t survivors, int share, const int32_t* __restrict__ row_start,
                const int32_t* __restrict__ column, const Element* __restrict__ dy, const Element* __restrict__ x,
                int stride, bool add, float* __restrict__ gradient) {
  constexpr int WIDTH = PACKED<Element>, GROUPS = 32 / LANES, COUNT = LANES < 8 ? LANES : 8, TAKEN = COUNT * GROUPS;
  using Samples = Pack<Element, WIDTH>;
  // What is beyond the share is read, never used.
  alignas(16) __shared__ uint32_t offsets[LARGEST_SHARE + TAKEN];
  const int lane = threadIdx.x, group = lane / LANES;
  const int packs = stride / WIDTH;
  const int64_t first = int64_t(blockIdx.x) * share;
  const int count = int(min(int64_t(share), survivors - first));
  for (int j = lane; j < count; j += 32) offsets[j] = uint32_t(column[first + j]) * packs;
  __syncwarp();

  const auto* const from = reinterpret_cast<const Samples*>(x) + lane % LANES;
  const auto* const by = reinterpret_cast<const Samples*>(dy) + lane % LANES;
  for (int row = row_of(row_start, rows, 0, rows, first), done = 0; done < count;) {
    const int end = int(min(int64_t(count), row_start[row + 1] - first));
    const auto* const own = by + int64_t(row) * packs;
    Samples held = {};
    if (ONCE && lane % LANES < packs) held = *own;

    // Whole packs of survivors, the first of which may begin before the row.
    const auto take = [&](int j, auto whole) {
      const int mine = j + group * COUNT;
      Pack<uint32_t, 4> at[COUNT / 4];
#pragma unroll
      for (int i = 0; i < COUNT / 4; ++i) at[i] = load<4>(&offsets[mine + 4 * i]);
      float sums[COUNT] = {};
      for (int pack = 0; pack < packs; pack += LANES) {
        const bool inside = pack + lane % LANES < packs;
        if (!ONCE) held = inside ? own[pack] : Samples{};
        Samples samples[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          samples[i] = Samples{};
          const bool valid = decltype(whole)::value || (mine + i >= done && mine + i < end);
          if (inside && valid) samples[i] = from[at[i / 4].at[i % 4] + pack];
        }
        float of_row[WIDTH];
        widen(held, of_row);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          float values[WIDTH];
          widen(samples[i], values);
#pragma unroll
          for (int k = 0; k < WIDTH; ++k) sums[i] = fmaf(of_row[k], values[k], sums[i]);
        }
        if (ONCE) break;  // which the compiler cannot know
      }
      const float sum = sum_of_lanes<LANES>(sums, lane);
      const int summed = j + lane / (LANES / COUNT);
      if (lane % (LANES / COUNT) != 0 || summed < done || summed >= end) return;
      float* const target = gradient + first + summed;
      *target = add ? *target + sum : sum;
    };
    for (int j = done / COUNT * COUNT; j < end; j += TAKEN) {
      if (j >= done && j + TAKEN <= end)
        take(j, std::true_type{});
      else
        take(j, std::false_type{});
    }
    done = end;
    if (done < count) row = row_of(row_start, rows, row + 1, 1, first + done);
  }
}

// Scratch holds slabs of dY and X transposed.
template <class Element>
int64_t scratch_bytes(int64_t rows, int64_t columns, int64_t batch) {
  return padded<Element>(std::min(batch, SLAB)) * (rows + columns) * sizeof(Element);
}

template <class Element>
int sddmm(int64_t rows, int64_t columns, int64_t survivors, const int32_t* row_start, const int32_t* column,
          const Element* dy, const Element* x, int64_t batch, float* gradient, void* scratch, cudaStream_t stream) {
  if (survivors == 0) return int(cudaGetLastError());
  const int64_t even = survivors / ENOUGH_WARPS / LEAST_SHARE * LEAST_SHARE;
  const int64_t share = std::max<int64_t>(LEAST_SHARE, std::min<int64_t>(LARGEST_SHARE, even));
  int64_t start = 0;
  do {
    const int64_t samples = std::min(SLAB, batch - start), stride = padded<Element>(samples);
    Element* const x_across = static_cast<Element*>(scratch);
    Element* const dy_across = x_across + columns * stride;
    transpose(x + start * columns, samples, columns, columns, nullptr, x_across, stride, stream);
    transpose(dy + start * rows, samples, rows, rows, nullptr, dy_across, stride, stream);
    const auto run = [&](auto kernel) {
      LAUNCH(kernel, dim3((survivors + share - 1) / share), dim3(32), 0, stream, int(rows), survivors, int(share),
             row_start, column, static_cast<const Element*>(dy_across), static_cast<const Element*>(x_across),
             int(stride), start > 0, gradient);
    };
    const int64_t packs = stride / PACKED<Element>;
    if (packs > 32)
      run(sddmm_share<Element, 32, false>);
    else if (packs > 16)
      run(sddmm_share<Element, 32, true>);
    else if (packs > 8)
      run(sddmm_share<Element, 16, true>);
    else if (packs > 4)
      run(sddmm_share<Element, 8, true>);
    else
      run(sddmm_share<Element, 4, true>);
    start += SLAB;
  } while (start < batch);
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace hpcprune

// `kind` is 2 where dY and X are bfloat16, 0 where they are float. `scratch` begins at a multiple of 16 bytes.
EXPORT int64_t hpcprune_cuda_sddmm_csr_scratch(int kind, int64_t rows, int64_t columns, int64_t batch) {
  using namespace hpcprune;
  return kind & 2 ? scratch_bytes<uint16_t>(rows, columns, batch) : scratch_bytes<float>(rows, columns, batch);
}

EXPORT int hpcprune_cuda_sddmm_csr(int kind, int64_t rows, int64_t columns, int64_t survivors, const int32_t* row_start,
                                   const int32_t* column, const void* dy, const void* x, int64_t batch, float* gradient,
                                   void* scratch, void* stream) {
  using namespace hpcprune;
  const auto run = [&](const auto* of_y, const auto* of_x) {
    return sddmm(rows, columns, survivors, row_start, column, of_y, of_x, batch, gradient, scratch,
                 static_cast<cudaStream_t>(stream));
  };
  if (kind & 2) return run(static_cast<const uint16_t*>(dy), static_cast<const uint16_t*>(x));
  return run(static_cast<const float*>(dy), static_cast<const float*>(x));
}
