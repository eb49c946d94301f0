// Products of small blocks of float32 matrices: what is left when a weight has been turned into floats.
#pragma once

#include "simd.h"

namespace efflm {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileColumns = 2 * kWidth;  // of one register tile

// out [R, C vectors] (+)= x [R, depth] @ b [depth, C vectors], rows `x_stride`, `b_stride` and `out_stride` apart.
// Turned: x lies as [depth, R].
template <int R, int C, bool Add, bool Turned>
EFFLM_INLINE void tile(const float* x, int64_t x_stride, const float* b, int64_t b_stride, int64_t depth, float* out,
                       int64_t out_stride) {
  Floats total[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) total[r][c] = Add ? load_floats(out + r * out_stride + c * kWidth) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats column[C];
    for (int c = 0; c < C; ++c) column[c] = load_floats(b + k * b_stride + c * kWidth);
    for (int r = 0; r < R; ++r) {
      const Floats each = splat(Turned ? x[k * x_stride + r] : x[r * x_stride + k]);
      for (int c = 0; c < C; ++c) total[r][c] += each * column[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + r * out_stride + c * kWidth, total[r][c]);
}

template <int C, bool Add, bool Turned, int R = kTileRows>
EFFLM_INLINE void tile_rows(int64_t rows, const float* x, int64_t x_stride, const float* b, int64_t b_stride,
                            int64_t depth, float* out, int64_t out_stride) {
  if constexpr (R > 0) {
    if (rows == R) {
      tile<R, C, Add, Turned>(x, x_stride, b, b_stride, depth, out, out_stride);
    } else {
      tile_rows<C, Add, Turned, R - 1>(rows, x, x_stride, b, b_stride, depth, out, out_stride);
    }
  }
}

// `multiply` of at most kTileRows rows and kTileColumns columns.
template <bool Add, bool Turned = false>
__attribute__((noinline)) void multiply_tile(int64_t rows, int64_t columns, int64_t depth, const float* x,
                                             int64_t x_stride, const float* b, int64_t b_stride, float* out,
                                             int64_t out_stride) {
  if (columns > kWidth) {
    tile_rows<2, Add, Turned>(rows, x, x_stride, b, b_stride, depth, out, out_stride);
  } else {
    tile_rows<1, Add, Turned>(rows, x, x_stride, b, b_stride, depth, out, out_stride);
  }
}

// out [rows, columns] (+)= x [rows, depth] @ b [depth, columns]; columns: a multiple of kWidth.
template <bool Add>
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* x, int64_t x_stride, const float* b,
              int64_t b_stride, float* out, int64_t out_stride) {
  for (int64_t n = 0; n < columns; n += kTileColumns)
    for (int64_t m = 0; m < rows; m += kTileRows)
      multiply_tile<Add>(least(rows - m, kTileRows), least(columns - n, kTileColumns), depth, x + m * x_stride,
                         x_stride, b + n, b_stride, out + m * out_stride + n, out_stride);
}

}  // namespace
}  // namespace efflm
