// What X and Y are for the products of spmm.cpp: rows of samples, or images under a convolution.

#pragma once

#include <algorithm>
#include <cstdint>

namespace hpcprune {

// X is [batch, columns] and Y [batch, rows].
template <class Element>
struct Rows {
  const Element* x;
  Element* y;
  int64_t columns, rows;

  Rows(const Element* x, Element* y, int64_t columns, int64_t rows) : x(x), y(y), columns(columns), rows(rows) {}
};

// X is [images, channels, height, width] and Y [images, rows, height, width of the output]; pairs are height and width.
// A sample is a place of the output, line by line; a column is a channel and a place in the kernel, as in a
// convolution's weight. X is never unfolded in memory: a panel of it is read from where its elements lie.
template <class Element>
struct Images {
  const Element* x;
  Element* y;
  int64_t rows, channels, size[2], kernel[2], stride[2], padding[2], dilation[2], out[2];

  // `shape` is the numbers from channels on.
  Images(const Element* x, Element* y, int64_t rows, const int64_t* shape)
      : x(x),
        y(y),
        rows(rows),
        channels(shape[0]),
        size{shape[1], shape[2]},
        kernel{shape[3], shape[4]},
        stride{shape[5], shape[6]},
        padding{shape[7], shape[8]},
        dilation{shape[9], shape[10]},
        out{shape[11], shape[12]} {}

  int64_t columns() const { return channels * kernel[0] * kernel[1]; }
  bool possible() const { return std::min({kernel[0], kernel[1], stride[0], stride[1], dilation[0], dilation[1]}) > 0; }
};

}  // namespace hpcprune
