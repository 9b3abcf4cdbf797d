// Lays a pruned W out for the tensor cores' product with few samples (bitmap.cu), from its mask and its survivors.
//
// W's rows fall into strips of 16 and its columns into 64; a group is where they cross, four tiles of the tensor cores.
// A group is its mask, 128 bytes, followed by its survivors, filled up to 16 bytes. Groups lie strip by strip.
// Survivors lie in the order in which the tensor core's registers want them, which is:
//
//   tile 0..3, lane 0..31, quadrant 0..3, 2 columns
//
// where quadrant q of a tile is rows 8 (q % 2) on, of which lane l holds row l / 4, and of the 32 columns that belong
// to tiles 0 and 1, or 2 and 3, it holds those from 8 (l % 4) + 4 (tile % 2) + 2 (q / 2) on: see tiles.h for why so.
// The mask is a word for each lane, bit 8 tile + 2 quadrant + column.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: once for a network that is used from then on

#include <algorithm>
#include <cstring>
#include <vector>

#include "../paths.h"

namespace hpcprune {
namespace {

constexpr int64_t STRIP = 16;    // rows
constexpr int64_t COLUMNS = 64;  // of a group
constexpr int64_t MASK_BYTES = STRIP * COLUMNS / 8;
constexpr int64_t UNIT = 16;  // bytes, in which groups are counted

struct Mask {
  const uint8_t* bits;
  int64_t rows, columns;

  int64_t strips() const { return (rows + STRIP - 1) / STRIP; }
  int64_t groups() const { return (columns + COLUMNS - 1) / COLUMNS; }

  // A row's 64 bits of a group; zeros beyond the last row and column.
  uint64_t part(int64_t row, int64_t group) const {
    if (row >= rows) return 0;
    const int64_t count = std::min(COLUMNS, columns - group * COLUMNS), bit = row * columns + group * COLUMNS;
    const int shift = static_cast<int>(bit % 8);
    uint64_t low = 0;
    std::memcpy(&low, bits + bit / 8, std::min<int64_t>(8, (shift + count + 7) / 8));
    low >>= shift;
    if (shift + count > 64) low |= static_cast<uint64_t>(bits[bit / 8 + 8]) << (64 - shift);
    return count == 64 ? low : low & ((uint64_t(1) << count) - 1);
  }
};

// Writes a group, and moves `next`, where each row's survivors go on, past those it took.
void write(const uint64_t (&part)[STRIP], const uint16_t* (&next)[STRIP], uint8_t* group) {
  uint32_t mask[32] = {};
  uint16_t* value = reinterpret_cast<uint16_t*>(group + MASK_BYTES);
  for (int tile = 0; tile < 4; ++tile)
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i) {
        const int quadrant = i / 2, row = quadrant % 2 * 8 + lane / 4;
        const int column = tile / 2 * 32 + lane % 4 * 8 + tile % 2 * 4 + quadrant / 2 * 2 + i % 2;
        if (!(part[row] >> column & 1)) continue;
        mask[lane] |= uint32_t(1) << (8 * tile + i);
        *value++ = next[row][__builtin_popcountll(part[row] & ((uint64_t(1) << column) - 1))];
      }
  std::memcpy(group, mask, MASK_BYTES);
  while ((reinterpret_cast<uint8_t*>(value) - group) % UNIT) *value++ = 0;
  for (int64_t row = 0; row < STRIP; ++row) next[row] += __builtin_popcountll(part[row]);
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// Writes where groups begin, `start` [strips * groups + 1], in units of 16 bytes, and the units of the largest. Returns
// the units of all.
int64_t hpcprune_bitmap_tiles_plan(const uint8_t* bits, int64_t rows, int64_t columns, int32_t* start,
                                   int32_t* largest) {
  using namespace hpcprune;
  const Mask mask{bits, rows, columns};
  *start = *largest = 0;
  for (int64_t strip = 0; strip < mask.strips(); ++strip)
    for (int64_t group = 0; group < mask.groups(); ++group, ++start) {
      int64_t count = 0;
      for (int64_t row = 0; row < STRIP; ++row) count += __builtin_popcountll(mask.part(strip * STRIP + row, group));
      const int64_t units = (MASK_BYTES + 2 * count + UNIT - 1) / UNIT;
      start[1] = static_cast<int32_t>(*start + units);
      *largest = std::max(*largest, static_cast<int32_t>(units));
    }
  return *start;
}

// Writes the groups from the survivors, bfloat16, packed row by row. `start` is what the plan wrote.
void hpcprune_bitmap_tiles_fill(const uint8_t* bits, int64_t rows, int64_t columns, const int32_t* start,
                                const uint16_t* packed, uint8_t* groups, int threads) {
  using namespace hpcprune;
  const Mask mask{bits, rows, columns};
  const int64_t across = mask.groups(), runs = std::max<int64_t>(1, std::min<int64_t>(threads, mask.strips()));
  std::vector<const uint16_t*> first(rows + 1, packed);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t count = 0;
    for (int64_t group = 0; group < across; ++group) count += __builtin_popcountll(mask.part(row, group));
    first[row + 1] = first[row] + count;
  }
  in_threads(runs, [&](int64_t run) {
    for (int64_t strip = mask.strips() * run / runs; strip < mask.strips() * (run + 1) / runs; ++strip) {
      const uint16_t* next[STRIP];
      for (int64_t row = 0; row < STRIP; ++row) next[row] = first[std::min(strip * STRIP + row, rows)];
      for (int64_t group = 0; group < across; ++group) {
        const int64_t at = strip * across + group;
        uint64_t part[STRIP];
        for (int64_t row = 0; row < STRIP; ++row) part[row] = mask.part(strip * STRIP + row, group);
        write(part, next, groups + UNIT * start[at]);
      }
    }
  });
}
}
