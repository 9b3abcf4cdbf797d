// Y = X W^T + bias on tensor cores for a pruned W and few samples; bfloat16, summed in float32.
//
// With few samples a product waits for the weights to come from memory, so what counts is how few bytes they are. At 50
// to 80 % an index for each survivor would cost what is saved; the mask costs a bit a weight. W stays so until it is in
// registers: the mask's bits before a lane's own, counted, say where its weights are, zeros stand in for those that are
// gone, and the tensor core multiplies a dense tile. This is SpInfer's way (Fan et al., EuroSys 2025), after
// Flash-LLM's (Xia et al., VLDB 2023), with the weights in another order (bitmap_tiles.cpp): there a lane counts anew
// for each 8 x 8 weights; here it has a word of the mask for a whole group of 16 x 64, and its weights of a tile lie
// side by side, so one sum over the lanes, of the four tiles' counts in one register, serves all. By count of
// instructions, expanding W takes about as long as loading it, so they matter as much as bytes.
//
// A block computes STRIPS times 16 rows for SAMPLES samples. Its warps take the groups of 64 columns in turn, each with
// copies of its own under way while it computes: the next group's weights and X's 64 columns. So none waits for another
// until they add their sums up at the end. The more samples there are, the more strips share a tile of X, as long as
// there are blocks enough for the device.

#include "../tiles.h"

namespace hpcprune {
namespace {

constexpr int STRIP_ROWS = 16;
constexpr int MASK = 8;                     // chunks of 16 bytes that a group's mask is
constexpr int FULL = MASK + 128;            // a group that all is left of
constexpr int64_t SHARED_BYTES = 80 << 10;  // two blocks fit a multiprocessor of compute capability 8.0
constexpr int64_t ENOUGH_BLOCKS = 128;

struct Weights {
  int64_t rows, columns;
  const int32_t* start;  // of each group, in chunks
  const uint4* groups;
  int strips, across;  // of 16 rows, and groups of a strip
  int largest;         // group, in chunks
};

// Warps of a block: more of 64 samples do not fit shared memory.
template <int SAMPLES>
constexpr int MOST_WARPS = SAMPLES < 64 ? 8 : 4;

// A warp's shared memory in chunks: X's tiles, the groups, both twice.
template <int SAMPLES, int STRIPS>
__host__ __device__ int chunks_of_warp(int largest) {
  return 2 * (SAMPLES * LINE + STRIPS * largest);
}

// A group's place in memory, in chunks.
struct Span {
  int32_t first, last;
};

// A lane's survivors of a group: its bits of the mask, where tiles begin, and where in a tile its survivors are, a byte
// a tile: the first of each quadrant, and of the last quadrant the second one's too.
struct Place {
  uint32_t bits, tile[4], in_tile[5];
};

// All counts are sums of fields of a register: of bits, then of columns, then of pairs of quadrants, then of tiles.
__device__ __forceinline__ Place find_survivors(const uint4* group, int lane) {
  const uint32_t bits = reinterpret_cast<const uint32_t*>(group)[lane];
  const uint32_t quadrants = bits - (bits >> 1 & 0x55555555);
  const uint32_t even = quadrants & 0x33333333, pairs = even + (quadrants >> 2 & 0x33333333);
  const uint32_t half = pairs & 0x0f0f0f0f, count = half + (pairs >> 4 & 0x0f0f0f0f);
  // What lanes before this one have: 31 times 8 at most, where all 32 could be more than a byte holds.
  uint32_t before = __shfl_up_sync(ALL_LANES, count, 1);
  if (lane == 0) before = 0;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(ALL_LANES, before, distance);
    if (lane >= distance) before += other;
  }
  const uint32_t others = __shfl_sync(ALL_LANES, before, 31), last = __shfl_sync(ALL_LANES, count, 31);
  const uint32_t second = before + half, fourth = second + (even >> 4 & 0x0f0f0f0f);
  Place place{bits, {}, {before, before + (even & 0x0f0f0f0f), second, fourth, fourth + (bits >> 6 & 0x01010101)}};
#pragma unroll
  for (int i = 1; i < 4; ++i)
    place.tile[i] = place.tile[i - 1] + (others >> 8 * (i - 1) & 0xff) + (last >> 8 * (i - 1) & 0xff);
  return place;
}

// A lane's part of a tile of W. A quadrant's second survivor is the one before the next quadrant's first.
__device__ __forceinline__ void expand(const uint16_t* survivor, const Place& place, int tile, uint32_t (&a)[4]) {
  const uint32_t bits = place.bits >> 8 * tile;
  const uint16_t* first[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) first[i] = survivor + place.tile[tile] + (place.in_tile[i] >> 8 * tile & 0xff);
#pragma unroll
  for (int quadrant = 0; quadrant < 4; ++quadrant) {
    uint32_t low = 0, high = 0;
    if (bits & 1u << 2 * quadrant) low = first[quadrant][0];
    if (bits & 2u << 2 * quadrant) high = first[quadrant + 1][quadrant < 3 ? -1 : 0];
    a[quadrant] = low + (high << 16);
  }
}

template <int SAMPLES, int STRIPS>
__global__ void __launch_bounds__(32 * MOST_WARPS<SAMPLES>, 2)
    bitmap(Weights w, const uint16_t* __restrict__ x, bool aligned, int64_t batch, const float* __restrict__ bias,
           uint16_t* __restrict__ y) {
  constexpr int FRAGMENTS = SAMPLES / 8;
  DYNAMIC_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const unsigned sample_tiles = (batch + SAMPLES - 1) / SAMPLES;
  const int strip = blockIdx.x / sample_tiles * STRIPS;
  const int64_t sample = int64_t(blockIdx.x % sample_tiles) * SAMPLES;

  const int each = chunks_of_warp<SAMPLES, STRIPS>(w.largest);
  uint4* const tiles = shared + warp * each;         // [2][SAMPLES][LINE]
  uint4* const groups = tiles + 2 * SAMPLES * LINE;  // [2][STRIPS][largest]

  // Where each strip's groups begin. Strips after the last are the last once more; nothing is stored of them.
  const int32_t* starts[STRIPS];
#pragma unroll
  for (int i = 0; i < STRIPS; ++i) starts[i] = w.start + int64_t(min(strip + i, w.strips - 1)) * w.across;
  const auto find = [&](int group, Span(&span)[STRIPS]) {
    if (group >= w.across) return;
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) span[i] = {starts[i][group], starts[i][group + 1]};
  };
  // A lane brings one chunk of each fourth sample.
  const int64_t first_sample = sample + lane / LINE, step = 32 / LINE * w.columns;
  const int samples = first_sample < batch ? static_cast<int>(min(batch - first_sample, int64_t(SAMPLES))) : 0;
  const int first_column = lane % LINE * CHUNK;
  const uint16_t* const from_x = x + first_sample * w.columns + first_column;
  const uint4* const from_groups = w.groups + lane;
  uint4 *const to_x = tiles + place(lane / LINE, lane % LINE), *const to_groups = groups + lane;
  const auto bring = [&](int group, const Span(&span)[STRIPS], int turn) {
    if (group < w.across) {
#pragma unroll
      for (int i = 0; i < STRIPS; ++i) {
        const uint4* const from = from_groups + span[i].first;
        uint4* const to = to_groups + (turn * STRIPS + i) * w.largest;
        const int left = span[i].last - span[i].first - lane;
#pragma unroll
        for (int at = 0; at < FULL; at += 32)
          if (at < left) copy_async(to + at, from + at, true);
      }
      const int64_t column = int64_t(group) * TILE_COLUMNS, inside = w.columns - first_column - column;
      const uint16_t* from = from_x + column;
      uint4* const to = to_x + turn * SAMPLES * LINE;
      if (aligned) {
#pragma unroll 4
        for (int i = 0; i < SAMPLES * LINE / 32; ++i, from += step)
          copy_async(to + 32 * i, from, i * (32 / LINE) < samples && inside > 0);
      } else {
#pragma unroll 1
        for (int i = 0; i < SAMPLES * LINE / 32; ++i, from += step)
          load(to + 32 * i, from, i * (32 / LINE) < samples ? inside : 0);
      }
    }
    commit_copies();
  };

  float sum[STRIPS][FRAGMENTS][4] = {};
  Span next[STRIPS] = {};
  find(warp, next);
  bring(warp, next, 0);
  find(warp + warps, next);
  int turn = 0;
  for (int group = warp; group < w.across; group += warps, turn ^= 1) {
    bring(group + warps, next, turn ^ 1);
    find(group + 2 * warps, next);  // so early that it is there when it is needed
    wait_for_copies<1>();
    __syncwarp();
    const uint4* const tile = tiles + turn * SAMPLES * LINE;
    const uint4* const weights = groups + turn * STRIPS * w.largest;
    Place survivors[STRIPS];
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) survivors[i] = find_survivors(weights + i * w.largest, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 b[FRAGMENTS];
#pragma unroll
      for (int n = 0; n < FRAGMENTS; ++n) b[n] = tile[place(n * 8 + lane / 4, half * HALF + lane % 4)];
#pragma unroll
      for (int i = 0; i < STRIPS; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t a[4];
          const uint16_t* const first = reinterpret_cast<const uint16_t*>(weights + i * w.largest + MASK);
          expand(first, survivors[i], 2 * half + j, a);
#pragma unroll
          for (int n = 0; n < FRAGMENTS; ++n) {
            const uint32_t pair[2] = {word(b[n], 2 * j), word(b[n], 2 * j + 1)};
            multiply_add(sum[i][n], a, pair);
          }
        }
    }
    __syncwarp();  // the next turn's copies go where this one read
  }

  // A warp's sums take the place of its tiles of X.
  float4* const own = reinterpret_cast<float4*>(tiles);
#pragma unroll
  for (int i = 0; i < STRIPS; ++i)
#pragma unroll
    for (int n = 0; n < FRAGMENTS; ++n)
      own[(i * FRAGMENTS + n) * 32 + lane] = make_float4(sum[i][n][0], sum[i][n][1], sum[i][n][2], sum[i][n][3]);
  __syncthreads();
  const auto store = [&](float value, int64_t row, int64_t to_sample) {
    if (row >= w.rows || to_sample >= batch) return;
    narrow(value + (bias ? bias[row] : 0.0f), y + to_sample * w.rows + row);
  };
  for (int at = threadIdx.x; at < STRIPS * FRAGMENTS * 32; at += blockDim.x) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int i = 0; i < warps; ++i) {
      const float4 part = reinterpret_cast<const float4*>(shared + i * each)[at];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    const int64_t row = int64_t(strip + at / 32 / FRAGMENTS) * STRIP_ROWS + at % 32 / 4;
    const int64_t to_sample = sample + at / 32 % FRAGMENTS * 8 + at % 4 * 2;
    store(total.x, row, to_sample);
    store(total.y, row, to_sample + 1);
    store(total.z, row + 8, to_sample);
    store(total.w, row + 8, to_sample + 1);
  }
}

template <int SAMPLES, int STRIPS>
void launch(const Weights& w, const uint16_t* x, int64_t batch, const float* bias, uint16_t* y, cudaStream_t stream) {
  static_assert(4 * STRIPS * SAMPLES <= 2 * SAMPLES * LINE, "a warp's sums fit where its tiles of X were");
  if constexpr (STRIPS > 1)
    if ((w.strips + STRIPS - 1) / STRIPS < ENOUGH_BLOCKS)
      return launch<SAMPLES, STRIPS / 2>(w, x, batch, bias, y, stream);
  const int64_t bytes = 16 * chunks_of_warp<SAMPLES, STRIPS>(w.largest);
  int64_t warps = w.across < 1 ? 1 : w.across < MOST_WARPS<SAMPLES> ? w.across : MOST_WARPS<SAMPLES>;
  while (warps > 1 && warps * bytes > SHARED_BYTES) --warps;
  const int64_t blocks = int64_t(w.strips + STRIPS - 1) / STRIPS * ((batch + SAMPLES - 1) / SAMPLES);
  allow_shared(bitmap<SAMPLES, STRIPS>, warps * bytes);
  LAUNCH((bitmap<SAMPLES, STRIPS>), dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * warps)),
         static_cast<size_t>(warps * bytes), stream, w, x, whole_chunks(x, w.columns), batch, bias, y);
}

}  // namespace
}  // namespace hpcprune

// W [rows, columns] is what hpcprune_bitmap_tiles_fill wrote, `groups` at a multiple of 16 bytes, and `largest` what
// the plan said; X [batch, columns] and Y [batch, rows] are bfloat16, bias is float, or null.
EXPORT int hpcprune_cuda_bitmap(int64_t rows, int64_t columns, const int32_t* start, const void* groups,
                                int32_t largest, const uint16_t* x, int64_t batch, const float* bias, uint16_t* y,
                                void* stream) {
  using namespace hpcprune;
  if (rows == 0 || batch == 0) return 0;
  const Weights w{rows,
                  columns,
                  start,
                  static_cast<const uint4*>(groups),
                  static_cast<int>((rows + STRIP_ROWS - 1) / STRIP_ROWS),
                  static_cast<int>((columns + TILE_COLUMNS - 1) / TILE_COLUMNS),
                  largest};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (batch <= 8)
    launch<8, 1>(w, x, batch, bias, y, on);
  else if (batch <= 16)
    launch<16, 1>(w, x, batch, bias, y, on);
  else if (batch <= 32)
    launch<32, 2>(w, x, batch, bias, y, on);
  else
    launch<64, 2>(w, x, batch, bias, y, on);
  return static_cast<int>(cudaGetLastError());
}
