// Lays a pruned W out in panels (panels.h), or W^T, from the mask's bits; and refills a layout when the weights change.
//
// The survivors' own order, in which they are packed everywhere else, is that of the mask: row by row.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: once a round, and a refill is bound by memory

#include "../panels.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../paths.h"
#include "../vectors.h"

namespace hpcprune {
namespace {

// The survivors of W, or of W^T, line by line: `where` is a column (of W^T: a row), `which` the survivor.
struct Lines {
  std::vector<int64_t> first;
  std::vector<int32_t> where, which;
};

template <class Visit>
void each_survivor(const uint8_t* bits, int64_t rows, int64_t columns, const Visit& visit) {
  int64_t row = 0, end = columns;  // of the row, among all weights
  for (int64_t at = 0; at < rows * columns; at += 64) {
    uint64_t word = 0;
    std::memcpy(&word, bits + at / 8, std::min<int64_t>(8, (rows * columns - at + 7) / 8));
    for (; word; word &= word - 1) {
      const int64_t weight = at + __builtin_ctzll(word);
      if (weight >= rows * columns) return;
      while (weight >= end) ++row, end += columns;
      visit(row, weight - (end - columns));
    }
  }
}

Lines lines_of(const uint8_t* bits, int64_t rows, int64_t columns, bool transposed) {
  Lines lines;
  lines.first.assign((transposed ? columns : rows) + 1, 0);
  each_survivor(bits, rows, columns,
                [&](int64_t row, int64_t column) { ++lines.first[(transposed ? column : row) + 1]; });
  std::partial_sum(lines.first.begin(), lines.first.end(), lines.first.begin());
  lines.where.resize(lines.first.back());
  lines.which.resize(lines.first.back());
  std::vector<int64_t> next(lines.first.begin(), lines.first.end() - 1);
  int32_t survivor = 0;
  each_survivor(bits, rows, columns, [&](int64_t row, int64_t column) {
    const int64_t at = next[transposed ? column : row]++;
    lines.where[at] = static_cast<int32_t>(transposed ? row : column);
    lines.which[at] = survivor++;
  });
  return lines;
}

// Sorts the rows of every chunk and writes `start`, `length` and `row`.
void plan(const uint8_t* bits, bool transposed, Layout& w) {
  const int64_t padded = w.groups * GROUP;
  std::vector<uint16_t> count(w.panels * padded, 0);
  each_survivor(bits, transposed ? w.columns : w.rows, transposed ? w.rows : w.columns, [&](int64_t r, int64_t c) {
    const int64_t line = transposed ? c : r, place = transposed ? r : c;
    ++count[place / w.panel * padded + line];
  });
  w.start[0] = 0;
  for (int64_t p = 0; p < w.panels; ++p)
    for (int64_t c = 0; c < w.chunks; ++c) {
      const int64_t size = std::min(CHUNK, padded - c * CHUNK), first = p * padded + c * CHUNK;
      uint8_t* row = w.row + first;
      std::iota(row, row + size, uint8_t(0));
      std::stable_sort(row, row + size, [&](uint8_t a, uint8_t b) { return count[first + a] > count[first + b]; });
      int64_t entries = 0;
      for (int64_t g = 0; g < size; g += GROUP) entries += w.length[(first + g) / GROUP] = count[first + row[g]];
      w.start[p * w.chunks + c + 1] = w.start[p * w.chunks + c] + entries;
    }
}

// Writes the columns, and which survivor each entry is.
template <class Column>
void fill(const uint8_t* bits, bool transposed, Layout& w, int32_t* order) {
  const Lines lines = lines_of(bits, transposed ? w.columns : w.rows, transposed ? w.rows : w.columns, transposed);
  std::vector<int64_t> next(lines.first.begin(), lines.first.end());
  for (int64_t p = 0; p < w.panels; ++p)
    for (int64_t c = 0; c < w.chunks; ++c) {
      int64_t at = w.start[p * w.chunks + c] * GROUP;
      const int64_t stop = w.last_group(p, c);
      for (int64_t g = w.first_group(p, c); g < stop; at += w.length[g++] * GROUP)
        for (int i = 0; i < GROUP; ++i) {
          const int64_t line = c * CHUNK + w.row[g * GROUP + i];
          int64_t from = line < w.rows ? next[line] : 0;
          const int64_t last = line < w.rows ? lines.first[line + 1] : 0;
          for (int64_t j = 0; j < w.length[g]; ++j) {
            const bool here = from < last && lines.where[from] / w.panel == p;
            w.column<Column>()[at + j * GROUP + i] = here ? static_cast<Column>(lines.where[from] % w.panel) : 0;
            order[at + j * GROUP + i] = here ? lines.which[from] : -1;
            from += here;
          }
          if (line < w.rows) next[line] = from;
        }
    }
}

// Below a thirtieth a row has fewer than 9 of 256 columns, and what a panel costs a row outweighs them.
int64_t panel_of(const uint8_t* bits, int64_t rows, int64_t columns) {
  int64_t survivors = 0;
  each_survivor(bits, rows, columns, [&](int64_t, int64_t) { ++survivors; });
  return 30 * survivors < rows * columns ? WIDE : NARROW;
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// How many bytes the layout of W, or of W^T, takes, and how many entries of four it has.
int64_t hpcprune_panels_bytes(const uint8_t* bits, int64_t rows, int64_t columns, int transposed, int64_t* entries) {
  using namespace hpcprune;
  const int64_t lines = transposed ? columns : rows, across = transposed ? rows : columns;
  const int64_t panel = panel_of(bits, rows, columns);
  std::vector<int64_t> memory(Layout(lines, across, panel, 0, nullptr).bytes() / 8 + 1);
  Layout w(lines, across, panel, 0, memory.data());
  plan(bits, transposed, w);
  *entries = w.start[w.panels * w.chunks];
  return Layout(lines, across, panel, *entries, nullptr).bytes();
}

// Writes the layout, and `order`: which survivor each entry is, -1 for what only fills a group up.
void hpcprune_panels_fill(const uint8_t* bits, int64_t rows, int64_t columns, int transposed, int64_t entries,
                          void* layout, int32_t* order) {
  using namespace hpcprune;
  const int64_t panel = panel_of(bits, rows, columns);
  Layout w(transposed ? columns : rows, transposed ? rows : columns, panel, entries, layout);
  int64_t* head = static_cast<int64_t*>(layout);
  head[0] = w.rows, head[1] = w.columns, head[2] = panel, head[3] = entries;
  plan(bits, transposed, w);
  if (panel > NARROW)
    fill<uint16_t>(bits, transposed, w, order);
  else
    fill<uint8_t>(bits, transposed, w, order);
}

// value[i] = packed[order[i]], or 0 where that is none of the `survivors`; elements are of 2 bytes where `half`,
// else 4.
void hpcprune_panels_refill(const int32_t* order, int64_t length, int half, const void* packed, int64_t survivors,
                            void* value, int threads, const hpcprune::Pool* pool) {
  using namespace hpcprune;
  const int64_t runs = std::max<int64_t>(1, std::min<int64_t>(threads, length / LEAST_PER_THREAD));
  const uint32_t limit = static_cast<uint32_t>(survivors);
  const auto refill = [=](auto* to, const auto* from) {
    in_pool(pool, runs, [&](int64_t run) {
      const int64_t stop = length * (run + 1) / runs;
      for (int64_t i = length * run / runs; i < stop; ++i) {
        const int32_t which = order[i];
        to[i] = uint32_t(which) < limit ? from[which] : 0;
      }
    });
  };
  if (half)
    refill(static_cast<uint16_t*>(value), static_cast<const uint16_t*>(packed));
  else
    refill(static_cast<uint32_t*>(value), static_cast<const uint32_t*>(packed));
}
}
