// The gradient of a W of whole blocks: dY^T X at the blocks that are left; bfloat16, summed in float32.
//
// W is in blocks of SIDE x SIDE, SIDE 16, 32 or 64. A thread block computes one of them, a sum over all samples, which
// its warps take in turn, each with copies of its own under way while it computes: none waits for another until they
// add their sums up at the end, in the order of the warps, so that the gradient is the same every time.
//
// Both operands lie sample by sample, while the tensor core wants two samples of a row, or of a column, in a register.
// So a lane loads neighbours of four samples, as wide as a block allows, and exchanges halves of registers: two loads
// become the operands of two rows, or columns. Which rows and columns a fragment takes, and which samples a lane, is
// chosen for that; the sums go back to their places when they are added up.

#include "../tiles.h"

namespace hpcprune {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int TILE = 128;  // chunks of an operand in shared memory: 64, 32 or 16 samples of a block's 16, 32 or 64 rows

template <int SIDE>
struct Shape {
  static constexpr int LINE_CHUNKS = SIDE / CHUNK;
  static constexpr int DEPTH = TILE / LINE_CHUNKS;  // samples
  static constexpr int EACH = SIDE / 8;             // rows, or columns, of a lane
  static constexpr int WORDS = EACH / 2;
  static constexpr int SUMS = SIDE * SIDE / 4;                                // of a warp, in chunks
  static constexpr int64_t BYTES = 16 * (SUMS > 4 * TILE ? SUMS : 4 * TILE);  // of a warp's shared memory

  // Where a chunk of a sample lies, such that the lanes that a load serves at once read from all banks.
  static __device__ __forceinline__ int place(int line, int chunk) {
    return line * LINE_CHUNKS + (chunk ^ (line * SIDE / 64 % (SIDE / 16)) * 2);
  }
};

// Operands of 16 samples: `pair` 0 and 1 are a lane's registers for one of its rows or columns.
template <int SIDE>
struct Operands {
  using S = Shape<SIDE>;
  uint32_t of[S::EACH][2];

  __device__ __forceinline__ Operands(const uint4* tile, int first, int lane) {
    uint32_t loaded[4][S::WORDS];
    const int at = lane / 4 * S::EACH;  // the first of the lane's rows or columns
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t* const from =
          reinterpret_cast<const uint16_t*>(tile + S::place(first + lane % 4 + 4 * i, at / CHUNK)) + at % CHUNK;
      if constexpr (S::WORDS == 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from);
#pragma unroll
        for (int j = 0; j < 4; ++j) loaded[i][j] = word(four, j);
      } else if constexpr (S::WORDS == 2) {
        const uint64_t two = *reinterpret_cast<const uint64_t*>(from);
        loaded[i][0] = static_cast<uint32_t>(two), loaded[i][1] = static_cast<uint32_t>(two >> 32);
      } else {
        loaded[i][0] = *reinterpret_cast<const uint32_t*>(from);
      }
    }
#pragma unroll
    for (int j = 0; j < S::WORDS; ++j)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t one = loaded[2 * pair][j], other = loaded[2 * pair + 1][j];
        of[2 * j][pair] = (one & 0xffff) | other << 16;
        of[2 * j + 1][pair] = one >> 16 | (other & 0xffff0000);
      }
  }
};

template <int SIDE>
__global__ void __launch_bounds__(THREADS)
    sddmm(int64_t rows, int64_t columns, const int32_t* __restrict__ block_row,
          const int32_t* __restrict__ block_column, const uint16_t* __restrict__ x, bool aligned_x,
          const uint16_t* __restrict__ dy, bool aligned_dy, int64_t batch, float* __restrict__ gradient,
          bool aligned_gradient) {
  using S = Shape<SIDE>;
  DYNAMIC_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint4* const own = shared + warp * (S::BYTES / 16);  // [2][dY, X][TILE]
  const int64_t first_row = int64_t(block_row[blockIdx.x]) * SIDE,
                first_column = int64_t(block_column[blockIdx.x]) * SIDE;

  const auto bring_operand = [&](uint4* to, const uint16_t* from, int64_t samples, int64_t across, int64_t length,
                                 bool aligned) {
    const int chunk = lane % S::LINE_CHUNKS;
    const int64_t inside = across - chunk * CHUNK;
    if (aligned) {
#pragma unroll
      for (int line = lane / S::LINE_CHUNKS; line < S::DEPTH; line += 32 / S::LINE_CHUNKS)
        copy_async(to + S::place(line, chunk), from + line * length + chunk * CHUNK, inside > 0 && line < samples);
    } else {
#pragma unroll 1
      for (int line = lane / S::LINE_CHUNKS; line < S::DEPTH; line += 32 / S::LINE_CHUNKS)
        load(to + S::place(line, chunk), from + line * length + chunk * CHUNK, line < samples ? inside : 0);
    }
  };
  const auto bring = [&](int64_t sample, int turn) {
    if (sample < batch) {
      uint4* const to = own + turn * 2 * TILE;
      bring_operand(to, dy + sample * rows + first_row, batch - sample, rows - first_row, rows, aligned_dy);
      bring_operand(to + TILE, x + sample * columns + first_column, batch - sample, columns - first_column, columns,
                    aligned_x);
    }
    commit_copies();
  };

  float sum[S::WORDS][S::EACH][4] = {};  // of rows 2 i and 2 i + 1 of a lane, and of its column j
  bring(warp * S::DEPTH, 0);
  int turn = 0;
  for (int64_t sample = warp * S::DEPTH; sample < batch; sample += warps * S::DEPTH, turn ^= 1) {
    bring(sample + warps * S::DEPTH, turn ^ 1);
    wait_for_copies<1>();
    __syncwarp();
#pragma unroll
    for (int first = 0; first < S::DEPTH; first += 16) {
      const Operands<SIDE> left(own + turn * 2 * TILE, first, lane), right(own + (turn * 2 + 1) * TILE, first, lane);
#pragma unroll
      for (int i = 0; i < S::WORDS; ++i) {
        const uint32_t a[4] = {left.of[2 * i][0], left.of[2 * i + 1][0], left.of[2 * i][1], left.of[2 * i + 1][1]};
#pragma unroll
        for (int j = 0; j < S::EACH; ++j) multiply_add(sum[i][j], a, right.of[j]);
      }
    }
    __syncwarp();  // the next turn's copies go where this one read
  }

  float4* const sums = reinterpret_cast<float4*>(own);
#pragma unroll
  for (int i = 0; i < S::WORDS; ++i)
#pragma unroll
    for (int j = 0; j < S::EACH; ++j)
      sums[(i * S::EACH + j) * 32 + lane] = make_float4(sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]);
  __syncthreads();
  float* const block = gradient + int64_t(blockIdx.x) * SIDE * SIDE;
  for (int at = threadIdx.x; at < S::WORDS * 128; at += blockDim.x) {
    const int i = at / 128, from = at / 4 % 32, part = at % 4;  // of a lane's four sums
    float total[S::EACH] = {};
    for (int other = 0; other < warps; ++other) {
      const float* const theirs = reinterpret_cast<const float*>(shared + other * (S::BYTES / 16));
#pragma unroll
      for (int j = 0; j < S::EACH; ++j) total[j] += theirs[((i * S::EACH + j) * 32 + from) * 4 + part];
    }
    float* const to = block + (from / 4 * S::EACH + 2 * i + part / 2) * SIDE + (from % 4 * 2 + part % 2) * S::EACH;
    if (S::EACH >= 4 && aligned_gradient) {
#pragma unroll
      for (int j = 0; j + 3 < S::EACH; j += 4)
        *reinterpret_cast<float4*>(to + j) = make_float4(total[j], total[j + 1], total[j + 2], total[j + 3]);
    } else {
#pragma unroll
      for (int j = 0; j < S::EACH; ++j) to[j] = total[j];
    }
  }
}

template <int SIDE>
void launch(int64_t rows, int64_t columns, const int32_t* block_row, const int32_t* block_column, int64_t blocks,
            const uint16_t* x, const uint16_t* dy, int64_t batch, float* gradient, cudaStream_t stream) {
  using S = Shape<SIDE>;
  int64_t warps = 1;
  while (warps < WARPS && warps * S::DEPTH < batch) ++warps;
  allow_shared(sddmm<SIDE>, warps * S::BYTES);
  LAUNCH(sddmm<SIDE>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * warps)),
         static_cast<size_t>(warps * S::BYTES), stream, rows, columns, block_row, block_column, x,
         whole_chunks(x, columns), dy, whole_chunks(dy, rows), batch, gradient,
         reinterpret_cast<uintptr_t>(gradient) % 16 == 0);
}

}  // namespace
}  // namespace hpcprune

// Writes gradient [blocks, side, side], of the block that each of block_row and block_column [blocks] says; zeros for
// what of it lies beyond W's edges. X [batch, columns] and dY [batch, rows] are bfloat16. cudaErrorInvalidValue for a
// side that is not 16, 32 or 64.
EXPORT int hpcprune_cuda_block_sddmm(int side, int64_t rows, int64_t columns, const int32_t* block_row,
                                     const int32_t* block_column, int64_t blocks, const uint16_t* x, const uint16_t* dy,
                                     int64_t batch, float* gradient, void* stream) {
  using namespace hpcprune;
  if (side != 16 && side != 32 && side != 64) return 1;
  if (blocks == 0) return 0;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (side == 16)
    launch<16>(rows, columns, block_row, block_column, blocks, x, dy, batch, gradient, on);
  else if (side == 32)
    launch<32>(rows, columns, block_row, block_column, blocks, x, dy, batch, gradient, on);
  else
    launch<64>(rows, columns, block_row, block_column, blocks, x, dy, batch, gradient, on);
  return static_cast<int>(cudaGetLastError());
}
