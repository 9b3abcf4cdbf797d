// Reading X and writing Y for one path; see each_path.h.

#include "../transpose_body.h"

// to[column * step + sample] for `samples` samples of an image (rows have but one) and `count` columns.
template <class Element>
void read(const Rows<Element>& rows, int64_t, int64_t sample, int64_t samples, int64_t column, int64_t count, float* to,
          int64_t step) {
  transpose(rows.x + sample * rows.columns + column, rows.columns, samples, count, to, step);
}

// Y of these samples and of `count` rows is sums[row * step + sample].
template <class Element>
void write(const Rows<Element>& rows, int64_t, int64_t sample, int64_t samples, int64_t row, int64_t count,
           const float* sums, int64_t step) {
  transpose(sums, step, count, samples, rows.y + sample * rows.rows + row, rows.rows);
}

// `length` places of a line of an image from `from` on, a stride apart; outside of the image there are zeros.
template <class Element>
INLINE void read_line(const Element* line, int64_t width, int64_t from, int64_t stride, int64_t length, float* to) {
  int64_t i = 0;
  for (; i < length && from + i * stride < 0; ++i) to[i] = 0.0f;
  const int64_t stop = std::min(length, from < width ? (width - from + stride - 1) / stride : 0);
  if constexpr (std::is_same<Element, float>::value)
    if (stride == 1 && i < stop) {
      std::memcpy(to + i, line + from + i, (stop - i) * sizeof(float));
      i = stop;
    }
  for (; i < stop; ++i) to[i] = widen(line[from + i * stride]);
  for (; i < length; ++i) to[i] = 0.0f;
}

template <class Element>
void read(const Images<Element>& images, int64_t image, int64_t sample, int64_t samples, int64_t column, int64_t count,
          float* to, int64_t step) {
  const auto& [x, y, rows, channels, size, kernel, stride, padding, dilation, out] = images;
  const int64_t in_kernel = kernel[0] * kernel[1], plane = size[0] * size[1];
  for (int64_t s = 0; s < samples;) {  // those of one line of the output at a time
    const int64_t line = (sample + s) / out[1], first = (sample + s) % out[1];
    const int64_t length = std::min(samples - s, out[1] - first);
    int64_t channel = column / in_kernel, down = column % in_kernel / kernel[1], across = column % kernel[1];
    float* own = to + s;
    for (int64_t k = 0; k < count; ++k, own += step) {
      const int64_t from_line = line * stride[0] - padding[0] + down * dilation[0];
      const int64_t from = first * stride[1] - padding[1] + across * dilation[1];
      if (from_line < 0 || from_line >= size[0])
        std::fill_n(own, length, 0.0f);
      else
        read_line(x + (image * channels + channel) * plane + from_line * size[1], size[1], from, stride[1], length,
                  own);
      if (++across == kernel[1]) across = 0, ++down;
      if (down == kernel[0]) down = 0, ++channel;
    }
    s += length;
  }
}

template <class Element>
void write(const Images<Element>& images, int64_t image, int64_t sample, int64_t samples, int64_t row, int64_t count,
           const float* sums, int64_t step) {
  const int64_t places = images.out[0] * images.out[1];
  for (int64_t r = 0; r < count; ++r) {
    Element* to = images.y + (image * images.rows + row + r) * places + sample;
    for (int64_t s = 0; s < samples; ++s) narrow(sums[r * step + s], to + s);
  }
}

// `read` of an operand whose type is not known, so that what works on floats is compiled once for all operands.
typedef void (*Read)(const void* operand, int64_t image, int64_t sample, int64_t samples, int64_t column, int64_t count,
                     float* to, int64_t step);

template <class Operand>
void read_any(const void* operand, int64_t image, int64_t sample, int64_t samples, int64_t column, int64_t count,
              float* to, int64_t step) {
  read(*static_cast<const Operand*>(operand), image, sample, samples, column, count, to, step);
}
