// What X and Y are for the products of spmm.cpp: rows of samples, or images under a convolution.

#pragma once

#include <cstdint>

namespace hpcprune {

// X is [batch, columns] and Y [batch, rows].
template <class Element>
struct Rows {
  const Element* x;
  Element* y;
  int64_t columns, rows;
};

// X is [images, channels, height, width] and Y [images, rows, height, width of the output]; pairs are height and width.
// A sample is a place of the output, line by line; a column is a channel and a place in the kernel, as in a
// convolution's weight. X is never unfolded in memory: a panel of it is read from where its elements lie.
template <class Element>
struct Images {
  const Element* x;
  Element* y;
  int64_t rows, channels, size[2], kernel[2], stride[2], padding[2], dilation[2], out[2];
};

}  // namespace hpcprune
