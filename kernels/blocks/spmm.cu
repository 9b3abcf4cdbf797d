// Y = X W^T + bias on tensor cores for a W of whole blocks: bfloat16, summed in float32.
//
// W is in blocks of SIDE x SIDE, SIDE 16, 32 or 64, those that are left in block rows (BSR), each row-major; with the
// blocks of W^T instead the same gives dX = dY W. A thread block computes a block row for a tile of samples, as a dense
// product does, but visits only the blocks that are left. It takes 64 columns at a time, which are 4, 2 or 1 blocks
// that need not be neighbours, so that the smallest blocks have as few barriers, and as wide loads, as the largest.
// While a step is computed the next one's blocks and X's columns for them are on their way to shared memory (tiles.h).
//
// A warp has 16 or 32 samples and all SIDE rows. The samples are the left operand and W the right one, and which of W's
// rows a fragment takes is chosen such that a lane's results of four fragments are 8 rows side by side: one 128-bit
// store (with blocks of 16, two fragments, 4 rows and 64 bits).

#include "../tiles.h"

namespace hpcprune {
namespace {

constexpr int64_t ENOUGH_BLOCKS = 128;

struct Blocks {
  int64_t rows, columns;
  const int32_t *start, *column;  // of each block row, of each block
  const uint16_t* value;
  bool aligned;
};

// How samples are shared out.
template <int SAMPLES>
struct Tile {
  static constexpr int WARPS = SAMPLES == 32 ? 2 : 4;
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int PARTS = SAMPLES / WARPS / 16;  // of 16 samples, a warp
};

// How W's rows are shared out: `line` of fragment n of multiply_add's right operand is a row of the block row.
template <int SIDE>
struct Rows {
  static constexpr int FRAGMENTS = SIDE / 8;
  static constexpr int TOGETHER = SIDE == 16 ? 2 : 4;  // fragments of which a lane's rows lie side by side
  static constexpr int RUN = 2 * TOGETHER;             // those rows

  static __device__ __forceinline__ int of(int n, int line) {
    return n / TOGETHER * 8 * TOGETHER + line / 2 * RUN + n % TOGETHER * 2 + line % 2;
  }
};

// Adds the bias to rows side by side of one sample, and writes them to Y.
template <int COUNT>
__device__ __forceinline__ void store(const float (&sum)[COUNT], int64_t row, int64_t rows, const float* bias,
                                      uint16_t* y, bool aligned) {
  uint16_t result[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) narrow(sum[i] + (bias && row + i < rows ? bias[row + i] : 0.0f), result + i);
  if (aligned && row < rows) {
    uint64_t four[COUNT / 4];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) four[i / 4] = (i % 4 ? four[i / 4] : 0) | uint64_t(result[i]) << 16 * (i % 4);
    if constexpr (COUNT == 8) {
      *reinterpret_cast<uint4*>(y + row) = {uint32_t(four[0]), uint32_t(four[0] >> 32), uint32_t(four[1]),
                                            uint32_t(four[1] >> 32)};
    } else {
      *reinterpret_cast<uint64_t*>(y + row) = four[0];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (row + i < rows) y[row + i] = result[i];
}

template <int SIDE, int SAMPLES>
__global__ void __launch_bounds__(Tile<SAMPLES>::THREADS, 2)
    spmm(Blocks w, const uint16_t* __restrict__ x, bool aligned_x, int64_t batch, const float* __restrict__ bias,
         uint16_t* __restrict__ y, bool aligned_y) {
  constexpr int PARTS = Tile<SAMPLES>::PARTS, LINES = Tile<SAMPLES>::THREADS / LINE, STEP = TILE_COLUMNS / SIDE;
  using Row = Rows<SIDE>;
  DYNAMIC_SHARED(uint4, shared);  // [2][SIDE + SAMPLES][LINE]: W's rows, then samples
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t sample_tiles = (batch + SAMPLES - 1) / SAMPLES;
  const int64_t block_row = blockIdx.x / sample_tiles, sample = blockIdx.x % sample_tiles * SAMPLES;
  const int32_t first = w.start[block_row], last = w.start[block_row + 1];

  // A thread fetches the same chunk of every eighth or sixteenth line, so it needs one block of a step.
  const int chunk = threadIdx.x % LINE, first_line = threadIdx.x / LINE, in_block = chunk * CHUNK % SIDE;
  int32_t block = first + chunk * CHUNK / SIDE;
  int64_t column = block < last ? w.column[block] : 0;
  const auto bring = [&](int32_t step, int turn) {
    if (step < last) {
      uint4* const tile = shared + turn * (SIDE + SAMPLES) * LINE;
      const bool left = block < last;
      const uint16_t* const from_w = w.value + int64_t(block) * SIDE * SIDE + in_block;
      if (w.aligned) {
#pragma unroll
        for (int line = first_line; line < SIDE; line += LINES)
          copy_async(tile + place(line, chunk), from_w + line * SIDE, left);
      } else {
#pragma unroll 1
        for (int line = first_line; line < SIDE; line += LINES)
          load(tile + place(line, chunk), from_w + line * SIDE, left ? CHUNK : 0);
      }
      const int64_t at = column * SIDE + in_block, inside = left ? w.columns - at : 0;
      const uint16_t* const from_x = x + sample * w.columns + at;
      if (aligned_x) {
#pragma unroll
        for (int line = first_line; line < SAMPLES; line += LINES)
          copy_async(tile + place(SIDE + line, chunk), from_x + line * w.columns, inside > 0 && sample + line < batch);
      } else {
#pragma unroll 1
        for (int line = first_line; line < SAMPLES; line += LINES)
          load(tile + place(SIDE + line, chunk), from_x + line * w.columns, sample + line < batch ? inside : 0);
      }
      block += STEP;
      column = block < last ? w.column[block] : 0;
    }
    commit_copies();
  };

  float sum[PARTS][Row::FRAGMENTS][4] = {};
  bring(first, 0);
  int turn = 0;
  for (int32_t step = first; step < last; step += STEP, turn ^= 1) {
    bring(step + STEP, turn ^ 1);
    wait_for_copies<1>();
    __syncthreads();
    const uint4* const tile = shared + turn * (SIDE + SAMPLES) * LINE;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = half * HALF + lane % 4;
      uint4 top[PARTS], bottom[PARTS];
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
        const int line = SIDE + (warp * PARTS + i) * 16 + lane / 4;
        top[i] = tile[place(line, from)];
        bottom[i] = tile[place(line + 8, from)];
      }
#pragma unroll
      for (int n = 0; n < Row::FRAGMENTS; ++n) {
        const uint4 right = tile[place(Row::of(n, lane / 4), from)];
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            const uint32_t a[4] = {word(top[i], j), word(bottom[i], j), word(top[i], j + 1), word(bottom[i], j + 1)};
            const uint32_t b[2] = {word(right, j), word(right, j + 1)};
            multiply_add(sum[i][n], a, b);
          }
      }
    }
    __syncthreads();  // the next turn's copies go where this one read
  }

#pragma unroll
  for (int i = 0; i < PARTS; ++i)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int64_t to_sample = sample + (warp * PARTS + i) * 16 + lower * 8 + lane / 4;
      if (to_sample >= batch) continue;
#pragma unroll
      for (int n = 0; n < Row::FRAGMENTS; n += Row::TOGETHER) {
        float run[Row::RUN];
#pragma unroll
        for (int r = 0; r < Row::RUN; ++r) run[r] = sum[i][n + r / 2][2 * lower + r % 2];
        const int64_t row = block_row * SIDE + Row::of(n, lane % 4 * 2);
        store(run, row, w.rows, bias, y + to_sample * w.rows, aligned_y);
      }
    }
}

template <int SIDE, int SAMPLES>
void launch(const Blocks& w, const uint16_t* x, int64_t batch, const float* bias, uint16_t* y, cudaStream_t stream) {
  const int64_t block_rows = (w.rows + SIDE - 1) / SIDE, tiles = (batch + SAMPLES - 1) / SAMPLES;
  if constexpr (SAMPLES > 32)
    if (batch <= SAMPLES / 2 || block_rows * tiles < ENOUGH_BLOCKS)
      return launch<SIDE, SAMPLES / 2>(w, x, batch, bias, y, stream);
  constexpr size_t BYTES = 2 * (SIDE + SAMPLES) * LINE * 16;
  static_assert(BYTES <= 48 << 10, "no more than a kernel has without being asked for");
  LAUNCH((spmm<SIDE, SAMPLES>), dim3(static_cast<unsigned>(block_rows * tiles)), dim3(Tile<SAMPLES>::THREADS), BYTES,
         stream, w, x, whole_chunks(x, w.columns), batch, bias, y, whole_chunks(y, w.rows));
}

}  // namespace
}  // namespace hpcprune

// W [rows, columns] is block_start [block rows + 1], block_column [blocks] and value [blocks, side, side]; what of a
// block lies beyond W's edges must be 0. X [batch, columns] and Y [batch, rows] are bfloat16, bias is float, or null.
// cudaErrorInvalidValue for a side that is not 16, 32 or 64.
EXPORT int hpcprune_cuda_block_spmm(int side, int64_t rows, int64_t columns, const int32_t* block_start,
                                    const int32_t* block_column, const uint16_t* value, const uint16_t* x,
                                    int64_t batch, const float* bias, uint16_t* y, void* stream) {
  using namespace hpcprune;
  if (side != 16 && side != 32 && side != 64) return 1;
  if (rows == 0 || batch == 0) return 0;
  const Blocks w{rows, columns, block_start, block_column, value, whole_chunks(value, side)};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (side == 16)
    launch<16, 128>(w, x, batch, bias, y, on);
  else if (side == 32)
    launch<32, 128>(w, x, batch, bias, y, on);
  else
    launch<64, 128>(w, x, batch, bias, y, on);
  return static_cast<int>(cudaGetLastError());
}
