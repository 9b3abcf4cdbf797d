// Y = X W^T + bias for a W of which at most two of every four neighbours in a row survive (2:4).
//
// Two weights of each four are there, and for each a code of two bits says which of the four it is. Rows are taken in
// stripes of eight, columns in units of sixteen. A unit of two rows is sixteen weights and a word with their codes:
// four lanes of a vector are two weights of the one row and two of the other, for the same four columns. So a vector of
// X is loaded once for all rows of a stripe, and one instruction, which picks among four neighbouring lanes, brings its
// numbers to where their weights are. The codes of two rows are decoded once for up to four samples.
//
// A weight costs 4.25 bytes (2.25 in bfloat16), as in a bitmap at 50 %; but where the next weights lie is known without
// counting.
//
//   g++ -O3 -std=c++17 -ffp-contract=fast -shared -fPIC -pthread kernels/*/*.cpp
//
// 1. portable: lane by lane
// 2. avx2: sums for 2 samples in vectors of 8
// 3. avx512: for 4 samples in vectors of 16

#include <vector>

#include "../packed.h"
#include "../vectors.h"

namespace hpcprune {
namespace {

constexpr int PAIRS = 4;  // of rows in a stripe

// Unit u of stripe s has its codes at code[(s * units + u) * PAIRS], and PAIRS times UNIT weights.
struct TwoOfFour {
  int64_t rows, columns;
  const uint32_t* code;

  int64_t units() const { return (columns + UNIT - 1) / UNIT; }
  int64_t stripes() const { return (rows + 2 * PAIRS - 1) / (2 * PAIRS); }
};

}  // namespace
}  // namespace hpcprune

#define BODY "spmm/two_of_four_body.h"
#include "../each_path.h"

namespace hpcprune {
namespace {

template <class Value, class Element>
int multiply(const Product& of, const TwoOfFour& w, const Value* value, const Element* x, Element* y) {
  const auto cut = [&](int64_t parts) {
    std::vector<int64_t> cuts;
    for (int64_t part = 0; part <= parts; ++part) cuts.push_back(w.stripes() * part / parts);
    return cuts;
  };
  return in_parts(of, w.units() * UNIT, w.stripes(), cut, [&](const Part& part, float* packed) {
    ON_PATH(of.path, product(w, value, x, of.bias, y, part, packed));
  });
}

}  // namespace
}  // namespace hpcprune

extern "C" {

// Of W: `code` and how many words, PAIRS for each unit, for which `value` holds PAIRS times UNIT weights, 0 where there
// is none. A Status.
int hpcprune_two_of_four(const hpcprune::Product* of) {
  using namespace hpcprune;
  const TwoOfFour w{of->rows, of->columns, of->array<uint32_t>(0)};
  const int64_t codes = of->matrix[1];
  if (codes != w.stripes() * w.units() * PAIRS || of->values != codes * UNIT) return DOES_NOT_FIT;
  return with_types(of->kind, of->value, of->x, of->y, [&](const auto* weights, const auto* from, auto* to) {
    return multiply(*of, w, weights, from, to);
  });
}
}
