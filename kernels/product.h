// What a product Y = X W^T + bias is called with, for all the ways in which W is held.
//
// It is one struct, since to hand over fourteen arguments from Python takes as long as a small product.

#pragma once

#include <cstdint>

#include "paths.h"

namespace hpcprune {

struct Product {
  int64_t path, kind;  // kind: of what types weights, X and Y are (vectors.h)
  const void* value;   // the weights, `values` of them with what fills up
  int64_t values;
  const void* x;  // [batch, columns]
  int64_t batch, columns;
  const float* bias;  // [rows], or null
  void* y;            // [batch, rows]
  int64_t rows, threads;
  const Pool* pool;
  int64_t matrix[5];  // W beside its weights: numbers and addresses, as many as a kernel wants

  template <class Element>
  const Element* array(int i) const {
    return reinterpret_cast<const Element*>(matrix[i]);
  }

  int threads_for(int64_t steps) const { return hpcprune::threads_for(steps, static_cast<int>(threads)); }
};

}  // namespace hpcprune
