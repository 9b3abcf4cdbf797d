// How a pruned W lies in memory for products with it: panels.
//
// W's columns fall into panels of 256, so that a column is a byte and a panel of X, transposed, stays in the L1 or L2
// cache while all rows pass over it; where so few survive that a row has next to none in 256 columns, into panels of
// 1024 and a column is 2 bytes. Rows fall into chunks of 64, which are what threads share out. Within a panel and a
// chunk rows are sorted by how many of their weights are left and taken in groups of four of nearly equal length: the
// inner loop does four rows at once, so their sums hide each other's latency, and its length is known before it begins.
// Entry j of the four rows lies together; where a row is shorter than the longest of its group it is filled up with
// zeros. With the weight itself this costs 5 bytes a survivor (3 in bfloat16), and 1 to 7 % of zeros.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace hpcprune {

constexpr int64_t NARROW = 256, WIDE = 1024;  // columns of a panel
constexpr int64_t CHUNK = 64;                 // rows
constexpr int64_t GROUP = 4;                  // rows

// What all the entries are but their weights, in one stretch of memory that begins with the first four numbers.
struct Layout {
  int64_t rows, columns, panel, entries;  // columns of a panel; entries of four
  int64_t panels, chunks, groups;
  int64_t* start;       // [panels * chunks + 1]: where the entries of a panel's chunk begin
  uint16_t* length;     // [panels * groups]: entries of a group
  uint8_t* row;         // [panels * groups * 4]: the rows of a group, counted from the chunk's first
  uint8_t* columns_of;  // [entries * 4]: counted from the panel's first, uint8_t or uint16_t

  Layout(int64_t rows, int64_t columns, int64_t panel, int64_t entries, void* memory)
      : rows(rows),
        columns(columns),
        panel(panel),
        entries(entries),
        panels((columns + panel - 1) / panel),
        chunks((rows + CHUNK - 1) / CHUNK),
        groups((rows + GROUP - 1) / GROUP),
        start(static_cast<int64_t*>(memory) + 4),
        length(reinterpret_cast<uint16_t*>(start + panels * chunks + 1)),
        row(reinterpret_cast<uint8_t*>(length + panels * groups)),
        columns_of(row + panels * groups * GROUP) {}

  explicit Layout(const void* memory) : Layout(const_cast<int64_t*>(static_cast<const int64_t*>(memory))) {}
  explicit Layout(int64_t* memory) : Layout(memory[0], memory[1], memory[2], memory[3], memory) {}

  int64_t bytes() const {
    return 8 * (5 + panels * chunks) + (2 + GROUP) * panels * groups + GROUP * entries * (panel > NARROW ? 2 : 1);
  }

  // Whether `length` bytes of memory are the layout of such a W, and `values` its entries: else products would read
  // what is not there.
  static bool fits(const void* memory, int64_t length, int64_t rows, int64_t columns, int64_t values) {
    if (length < 40) return false;
    const int64_t* head = static_cast<const int64_t*>(memory);
    return head[0] == rows && head[1] == columns && (head[2] == NARROW || head[2] == WIDE) &&
           GROUP * head[3] == values && Layout(memory).bytes() == length;
  }

  // The columns of the entries, as the type that they have.
  template <class Column>
  Column* column() const {
    return reinterpret_cast<Column*>(columns_of);
  }

  // The first group of a chunk in a panel, among all groups, and the one after its last.
  int64_t first_group(int64_t panel, int64_t chunk) const { return panel * groups + chunk * (CHUNK / GROUP); }
  int64_t last_group(int64_t panel, int64_t chunk) const {
    return panel * groups + std::min((chunk + 1) * (CHUNK / GROUP), groups);
  }
};

// Calls visit(chunk, row, at, length) for the groups of chunks [first, last) in a panel: the group's four rows, where
// its entries begin, and how many of four they are. Fastest with a visit that holds copies, [=], which no store can
// change.
template <class Visit>
INLINE void each_group(const Layout& w, int64_t panel, int64_t first, int64_t last, const Visit& visit) {
  for (int64_t c = first; c < last; ++c) {
    int64_t at = w.start[panel * w.chunks + c] * GROUP;
    const int64_t stop = w.last_group(panel, c);
    for (int64_t g = w.first_group(panel, c); g < stop; ++g) {
      const int64_t length = w.length[g];
      visit(c, w.row + g * GROUP, at, length);
      at += length * GROUP;
    }
  }
}

// Where the chunks are cut so that each of `parts` has about as many entries.
inline std::vector<int64_t> cut_chunks(const Layout& w, int64_t parts) {
  std::vector<int64_t> before(w.chunks + 1, 0), result{0};
  for (int64_t c = 0; c < w.chunks; ++c) {
    before[c + 1] = before[c] + 1;  // rows without weights cost something too
    for (int64_t p = 0; p < w.panels; ++p) before[c + 1] += w.start[p * w.chunks + c + 1] - w.start[p * w.chunks + c];
  }
  for (int64_t part = 1; part < parts; ++part)
    result.push_back(std::lower_bound(before.begin(), before.end(), before[w.chunks] * part / parts) - before.begin());
  result.push_back(w.chunks);
  return result;
}

}  // namespace hpcprune
