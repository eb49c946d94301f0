// x times a weight of any format.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"
#include "team.h"

namespace efflm {
namespace {

constexpr int kPanel = 32;  // outputs that lie side by side in a quantized weight
constexpr int kUnit = 8;    // the contracted axis of a quantized weight is filled up to a multiple of this

enum class Format : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

// out [rows, outputs] = x [rows, inputs] times a weight.
//
// Dense weights (kFloat32, kBfloat16) are [inputs, outputs], or [outputs, inputs] where `transposed`. Quantized ones are
// panels of 32 outputs, padded with zero codes: for every 4 (8 bits) or 8 (4 bits) inputs 32 words of 4 bytes, one word
// an output. The bytes of a word are codes + 128 of inputs 0 to 3; or code + 8 of input i in the low half of byte i, of
// input i + 4 in the high half. scale and zeros (or null) are [groups, outputs filled up to panels].
struct Dot {
  Format format;
  bool transposed = false;
  bool x_is_bfloat16 = false;
  bool round_x = false;                // to int8 with one scale a row, or with *x_scale
  const float* x_scale = nullptr;
  int64_t rows, inputs, outputs, group;  // group: inputs that share a scale; 0: all
  const void* x;
  const void* values;
  const float* scale = nullptr;
  const int8_t* zeros = nullptr;
  float* out;
};

constexpr int kVectors = kPanel / kWidth;  // of one panel

// --- int8 activations ------------------------------------------------------------------------------------------------

// A rounded x, as products with the bytes of a word read it: 4 inputs take one step.
#if defined(__AVX512VNNI__)
typedef int8_t Rounded;
#else
typedef int16_t Rounded;  // inputs 0, 2, 1, 3 of every 4: pairs for a product of 16-bit integers
#endif

EFFLM_INLINE int position(int input) {
#if defined(__AVX512VNNI__)
  return input;
#else
  return (input & ~3) | (input & 1) << 1 | (input & 2) >> 1;
#endif
}

// total + the products of 4 unsigned bytes of each word with 4 inputs.
EFFLM_INLINE Ints multiply_bytes(Ints total, Ints bytes, const Rounded* x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)bytes, _mm512_set1_epi32(load<int32_t>(x)));
#elif defined(__AVX2__)
  const __m256i even = _mm256_and_si256((__m256i)bytes, _mm256_set1_epi16(255));
  const __m256i odd = _mm256_srli_epi16((__m256i)bytes, 8);
  const __m256i first = _mm256_madd_epi16(even, _mm256_set1_epi32(load<int32_t>(x)));
  const __m256i second = _mm256_madd_epi16(odd, _mm256_set1_epi32(load<int32_t>(x + 2)));
  return total + (Ints)_mm256_add_epi32(first, second);
#else
  const Ints low = bytes & 255, next = bytes >> 8 & 255, third = bytes >> 16 & 255;
  const Ints high = (Ints)((Words)bytes >> 24);
  return total + low * splat(int32_t(x[0])) + third * splat(int32_t(x[1])) + next * splat(int32_t(x[2])) +
         high * splat(int32_t(x[3]));
#endif
}

// One row to int8: see round_to_int8 in qarray.py. A row that is not finite gets the scale NaN. sums: of each group.
void round_row(const Dot& d, int64_t row, int64_t filled, Rounded* out, float* row_scale, int32_t* sums) {
  const int64_t K = d.inputs, group = d.group ? d.group : K;
  float* x = scratch<float, 0>(filled);
  Ints top = {}, finite = splat(0x7f800000), bad = {};
  for (int64_t k = K; k < filled; ++k) x[k] = 0;
  int64_t k = 0;
  auto look = [&](Floats v) {
    const Ints magnitude = (Ints)v & 0x7fffffff;  // of floats, magnitudes compare as integers do
    top = magnitude > top ? magnitude : top;
    bad |= (Ints)(magnitude >= finite);
  };
  for (int64_t i = 0; i < K; i += kWidth) {
    const int64_t from = K < kWidth ? 0 : least(i, K - kWidth);
    if (K < kWidth) {
      for (k = 0; k < K; ++k)
        x[k] = d.x_is_bfloat16 ? from_bfloat16(static_cast<const uint16_t*>(d.x)[row * K + k])
                               : static_cast<const float*>(d.x)[row * K + k];
      Floats v = {};
      std::memcpy(&v, x, 4 * K);
      look(v);
    } else {
      const Floats v = d.x_is_bfloat16 ? load_floats(static_cast<const uint16_t*>(d.x) + row * K + from)
                                       : load_floats(static_cast<const float*>(d.x) + row * K + from);
      store(x + from, v);
      look(v);
    }
  }
  int32_t most = 0, broken = 0;
  for (int i = 0; i < kWidth; ++i) {
    most = top[i] > most ? top[i] : most;
    broken |= bad[i];
  }
  float absmax;
  std::memcpy(&absmax, &most, 4);
  float scale = d.x_scale ? *d.x_scale : absmax > 0 ? absmax / 127 : 1;
  if (broken) scale = 1;
  for (int64_t i = 0; i < filled; i += kUnit)
    for (int j = 0; j < kUnit; ++j) {
      float value = std::nearbyint(x[i + j] / scale);
      value = value > 127 ? 127 : value < -127 ? -127 : value;
      out[i + position(j)] = broken ? 0 : Rounded(value);
    }
  *row_scale = broken ? std::numeric_limits<float>::quiet_NaN() : scale;
  for (int64_t g = 0, start = 0; start < K; ++g, start += group) {
    int32_t total = 0;
    const int64_t end = least(start + group, filled);  // entries beyond K are 0
    for (int64_t i = start; i < (start + group >= K ? filled : end); ++i) total += out[i];
    sums[g] = total;
  }
}

// out [R, a panel] of rounded rows. Rows of x are `filled` apart, sums `groups`.
template <int Bits, int R>
void rounded_tile(const Dot& d, const uint8_t* panel, int64_t first, const Rounded* x, int64_t filled,
                  const float* row_scales, const int32_t* sums, int64_t groups, float* out) {
  constexpr int kStep = Bits == 8 ? 4 : 8, kBias = Bits == 8 ? 128 : 8;
  const int64_t padded = ceiling(d.outputs, kPanel) * kPanel, group = groups > 1 ? d.group : filled;
  Floats total[R][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Ints part[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kVectors; ++c) part[r][c] = Ints{};
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    const uint8_t* bytes = panel + g * group / kStep * (4 * kPanel);
    for (int64_t k = g * group; k < end; k += kStep, bytes += 4 * kPanel) {
      for (int c = 0; c < kVectors; ++c) {
        const Ints words = load<Ints>(bytes + c * 4 * kWidth);
        if constexpr (Bits == 8) {
          for (int r = 0; r < R; ++r) part[r][c] = multiply_bytes(part[r][c], words, x + r * filled + k);
        } else {
          const Ints low = words & 0x0f0f0f0f, high = words >> 4 & 0x0f0f0f0f;
          for (int r = 0; r < R; ++r) {
            part[r][c] = multiply_bytes(part[r][c], low, x + r * filled + k);
            part[r][c] = multiply_bytes(part[r][c], high, x + r * filled + k + 4);
          }
        }
      }
    }
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = g * padded + first + c * kWidth;
      const Floats scale = load_floats(d.scale + at);
      Ints zero = splat(kBias);
      if (d.zeros)
        for (int i = 0; i < kWidth; ++i) zero[i] += d.zeros[at + i];
      for (int r = 0; r < R; ++r) {
        const Floats exact = to_floats(part[r][c] - zero * splat(sums[r * groups + g]));
        // In the order of the portable form, so that the two agree to the last bit or nearly.
        if (groups == 1) {
          total[r][c] = exact * splat(row_scales[r]) * scale;
        } else {
          total[r][c] += exact * scale;
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kVectors; ++c)
      store(out + r * kPanel + c * kWidth, groups == 1 ? total[r][c] : total[r][c] * splat(row_scales[r]));
}

// --- floating-point activations --------------------------------------------------------------------------------------

// The codes of input j of every word, as floats; flipped: the words with the upper bit of each code inverted, which
// makes them two's complement.
template <int Bits>
EFFLM_INLINE Floats code(Ints flipped, int j) {
  if constexpr (Bits == 8) return to_floats(flipped << (24 - 8 * j) >> 24);
  const int field = j < 4 ? 2 * j : 2 * (j - 4) + 1;
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return (Floats)_mm512_permutexvar_ps((__m512i)((Words)flipped >> (4 * field)), table);
#else
  return to_floats(flipped << (28 - 4 * field) >> 28);
#endif
}

template <int Bits>
EFFLM_INLINE Ints flip(Ints words) {
  return words ^ splat(int32_t(Bits == 8 ? 0x80808080u : 0x88888888u));
}

// out [R, a panel] of rows of floats; sums [R, groups]: of the entries of x.
template <int Bits, int R>
void float_tile(const Dot& d, const uint8_t* panel, int64_t first, const float* x, int64_t filled, const float* sums,
                int64_t groups, float* out) {
  constexpr int kStep = Bits == 8 ? 4 : 8;
  const int64_t padded = ceiling(d.outputs, kPanel) * kPanel, group = groups > 1 ? d.group : filled;
  Floats total[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kVectors; ++c) total[r][c] = Floats{};
  for (int64_t g = 0; g < groups; ++g) {
    Floats part[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kVectors; ++c) part[r][c] = Floats{};
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    const uint8_t* bytes = panel + g * group / kStep * (4 * kPanel);
    for (int64_t k = g * group; k < end; k += kStep, bytes += 4 * kPanel) {
      for (int c = 0; c < kVectors; ++c) {
        const Ints flipped = flip<Bits>(load<Ints>(bytes + c * 4 * kWidth));
        for (int j = 0; j < kStep; ++j) {
          const Floats codes = code<Bits>(flipped, j);
          for (int r = 0; r < R; ++r) part[r][c] += codes * splat(x[r * filled + k + j]);
        }
      }
    }
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = g * padded + first + c * kWidth;
      const Floats scale = load_floats(d.scale + at);
      Ints zero = {};
      if (d.zeros)
        for (int i = 0; i < kWidth; ++i) zero[i] = d.zeros[at + i];
      for (int r = 0; r < R; ++r) {
        const Floats centered =
            d.zeros ? part[r][c] - to_floats(zero) * splat(sums[r * groups + g]) : part[r][c];
        total[r][c] += centered * scale;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kVectors; ++c) store(out + r * kPanel + c * kWidth, total[r][c]);
}

// A panel as floats [filled, 32].
template <int Bits>
void unpack(const Dot& d, const uint8_t* panel, int64_t first, int64_t filled, int64_t groups, float* out) {
  constexpr int kStep = Bits == 8 ? 4 : 8;
  const int64_t padded = ceiling(d.outputs, kPanel) * kPanel, group = groups > 1 ? d.group : filled;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = g * padded + first + c * kWidth;
      const Floats scale = load_floats(d.scale + at);
      Ints zero = {};
      if (d.zeros)
        for (int i = 0; i < kWidth; ++i) zero[i] = d.zeros[at + i];
      const Floats offset = to_floats(zero);
      for (int64_t k = g * group; k < end; k += kStep) {
        const Ints flipped = flip<Bits>(load<Ints>(panel + k / kStep * (4 * kPanel) + c * 4 * kWidth));
        for (int j = 0; j < kStep; ++j)
          store(out + (k + j) * kPanel + c * kWidth, (code<Bits>(flipped, j) - offset) * scale);
      }
    }
  }
}

// --- quantized weights -----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kRoundedRows = 12, kGroupedRows = 6;
#elif defined(__AVX2__)
constexpr int kRoundedRows = 2, kGroupedRows = 1;
#else
constexpr int kRoundedRows = 1, kGroupedRows = 1;
#endif
#if defined(__AVX512F__)
constexpr int kFloatRows = 4;
#else
constexpr int kFloatRows = 1;
#endif
constexpr int64_t kUnpacked = 6;    // from so many rows on, a panel is turned into floats once for all of them
constexpr int64_t kRowBlock = 96;   // rows that read a panel while it is in the cache

void copy_out(const Dot& d, int64_t row, int64_t rows, int64_t first, const float* tile) {
  const int64_t columns = least(kPanel, d.outputs - first);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(d.out + (row + r) * d.outputs + first, tile + r * kPanel, 4 * columns);
}

template <int Bits, int R>
void rounded_rows(int64_t rows, const Dot& d, const uint8_t* panel, int64_t first, const Rounded* x, int64_t filled,
                  const float* row_scales, const int32_t* sums, int64_t groups, float* out) {
  if constexpr (R > 0) {
    if (rows == R) {
      rounded_tile<Bits, R>(d, panel, first, x, filled, row_scales, sums, groups, out);
    } else {
      rounded_rows<Bits, R - 1>(rows, d, panel, first, x, filled, row_scales, sums, groups, out);
    }
  }
}

template <int Bits, int R>
void float_rows(int64_t rows, const Dot& d, const uint8_t* panel, int64_t first, const float* x, int64_t filled,
                const float* sums, int64_t groups, float* out) {
  if constexpr (R > 0) {
    if (rows == R) {
      float_tile<Bits, R>(d, panel, first, x, filled, sums, groups, out);
    } else {
      float_rows<Bits, R - 1>(rows, d, panel, first, x, filled, sums, groups, out);
    }
  }
}

// Splits rows and panels into tasks: many enough to be shared evenly, large enough to be worth it.
template <typename Task>
void over_panels(const Dot& d, const Pool& pool, const Task& task) {
  const int64_t panels = ceiling(d.outputs, kPanel), blocks = ceiling(d.rows, kRowBlock);
  const int64_t wanted = ceiling(8 * pool.threads, blocks);
  const int64_t each = ceiling(panels, wanted < panels ? wanted : panels), parts = ceiling(panels, each);
  Team::run(pool, blocks * parts, [&](int64_t i) {
    const int64_t row = i / parts * kRowBlock, from = i % parts * each;
    for (int64_t p = from; p < least(from + each, panels); ++p) task(p, row, least(row + kRowBlock, d.rows));
  });
}

template <int Bits>
void dot_rounded(const Dot& d, const Pool& pool) {
  const int64_t groups = d.group ? ceiling(d.inputs, d.group) : 1, filled = ceiling(d.inputs, kUnit) * kUnit;
  Rounded* x = scratch<Rounded, 1>(d.rows * filled);
  float* row_scales = scratch<float, 1>(d.rows);
  int32_t* sums = scratch<int32_t, 1>(d.rows * groups);
  const int64_t part = ceiling(d.rows, d.rows > 16 ? 4 * pool.threads : 1);
  Team::run(pool, ceiling(d.rows, part), [&](int64_t i) {
    for (int64_t m = i * part; m < least((i + 1) * part, d.rows); ++m)
      round_row(d, m, filled, x + m * filled, row_scales + m, sums + m * groups);
  });
  const int64_t panel_bytes = filled * kPanel * Bits / 8, most = groups > 1 ? kGroupedRows : kRoundedRows;
  over_panels(d, pool, [&](int64_t p, int64_t row, int64_t end) {
    const uint8_t* panel = static_cast<const uint8_t*>(d.values) + p * panel_bytes;
    alignas(64) float tile[kRoundedRows * kPanel];
    for (; row < end; row += most) {
      const int64_t rows = least(most, end - row);
      rounded_rows<Bits, kRoundedRows>(rows, d, panel, p * kPanel, x + row * filled, filled, row_scales + row,
                                       sums + row * groups, groups, tile);
      copy_out(d, row, rows, p * kPanel, tile);
    }
  });
}

// x as floats [rows, filled], the last entries 0.
const float* as_floats(const Dot& d, int64_t filled, const Pool& pool) {
  if (!d.x_is_bfloat16 && filled == d.inputs) return static_cast<const float*>(d.x);
  float* out = scratch<float, 2>(d.rows * filled);
  const int64_t part = ceiling(d.rows, d.rows > 16 ? 4 * pool.threads : 1);
  Team::run(pool, ceiling(d.rows, part), [&](int64_t i) {
    for (int64_t m = i * part; m < least((i + 1) * part, d.rows); ++m) {
      float* to = out + m * filled;
      if (d.x_is_bfloat16) {
        const uint16_t* from = static_cast<const uint16_t*>(d.x) + m * d.inputs;
        for (int64_t k = 0; k < d.inputs; ++k) to[k] = from_bfloat16(from[k]);
      } else {
        std::memcpy(to, static_cast<const float*>(d.x) + m * d.inputs, 4 * d.inputs);
      }
      for (int64_t k = d.inputs; k < filled; ++k) to[k] = 0;
    }
  });
  return out;
}

template <int Bits>
void dot_unrounded(const Dot& d, const Pool& pool) {
  const int64_t groups = d.group ? ceiling(d.inputs, d.group) : 1, filled = ceiling(d.inputs, kUnit) * kUnit;
  const float* x = as_floats(d, filled, pool);
  float* sums = scratch<float, 3>(d.rows * groups);
  if (d.zeros)
    for (int64_t m = 0; m < d.rows; ++m)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t end = g + 1 < groups ? (g + 1) * d.group : filled;
        float total = 0;
        for (int64_t k = g * d.group; k < end; ++k) total += x[m * filled + k];
        sums[m * groups + g] = total;
      }
  const int64_t panel_bytes = filled * kPanel * Bits / 8;
  over_panels(d, pool, [&](int64_t p, int64_t row, int64_t end) {
    const uint8_t* panel = static_cast<const uint8_t*>(d.values) + p * panel_bytes;
    alignas(64) float tile[(kFloatRows > kTileRows ? kFloatRows : kTileRows) * kPanel];
    if (end - row >= kUnpacked) {
      float* floats = scratch<float, 4>(filled * kPanel);
      unpack<Bits>(d, panel, p * kPanel, filled, groups, floats);
      for (; row < end; row += kTileRows) {
        const int64_t rows = least(kTileRows, end - row);
        multiply<false>(rows, kPanel, filled, x + row * filled, filled, floats, kPanel, tile, kPanel);
        copy_out(d, row, rows, p * kPanel, tile);
      }
      return;
    }
    for (; row < end; row += kFloatRows) {
      const int64_t rows = least(kFloatRows, end - row);
      float_rows<Bits, kFloatRows>(rows, d, panel, p * kPanel, x + row * filled, filled, sums + row * groups, groups,
                                   tile);
      copy_out(d, row, rows, p * kPanel, tile);
    }
  });
}

// --- dense weights ---------------------------------------------------------------------------------------------------

// Rows of the weight are outputs: products of whole rows, four outputs at a time.
template <typename W>
void dot_transposed(const Dot& d, const Pool& pool) {
  const int64_t K = d.inputs, N = d.outputs, blocks = ceiling(N, 4);
  const float* x = as_floats(d, K, pool);
  const W* w = static_cast<const W*>(d.values);
  const int64_t each = ceiling(blocks, 8 * pool.threads);
  Team::run(pool, ceiling(blocks, each), [&](int64_t task) {
    for (int64_t n = task * each * 4; n < least((task + 1) * each * 4, N); n += 4) {
      const W* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = w + least(n + i, N - 1) * K;
      for (int64_t m = 0; m < d.rows; ++m) {
        const float* from = x + m * K;
        Floats total[4][2] = {};
        int64_t k = 0;
        for (; k + 2 * kWidth <= K; k += 2 * kWidth)
          for (int h = 0; h < 2; ++h) {
            const Floats part = load_floats(from + k + h * kWidth);
            for (int i = 0; i < 4; ++i) total[i][h] += part * load_floats(rows[i] + k + h * kWidth);
          }
        for (int i = 0; i < 4 && n + i < N; ++i) {
          float rest = 0;
          for (int64_t j = k; j < K; ++j) rest += from[j] * load_float(rows[i] + j);
          d.out[m * N + n + i] = sum(total[i][0] + total[i][1]) + rest;
        }
      }
    }
  });
}

// Rows of the weight are inputs: each task adds up some inputs for all outputs, reading the weight from end to end; the
// sums of the tasks are added in a fixed order, so that the result does not depend on the number of threads.
template <typename W>
void dot_straight(const Dot& d, const Pool& pool) {
  const int64_t K = d.inputs, N = d.outputs, M = d.rows;
  const float* x = as_floats(d, K, pool);
  const W* w = static_cast<const W*>(d.values);
  constexpr int64_t kInputs = 8;
  const int64_t wide = ceiling(N, kWidth) * kWidth;
  const int64_t tasks = least(16, ceiling(K, 2 * kInputs)), each = ceiling(ceiling(K, tasks), kInputs) * kInputs;
  float* parts = scratch<float, 5>(tasks * M * wide);
  Team::run(pool, tasks, [&](int64_t task) {
    float* total = parts + task * M * wide;
    std::memset(total, 0, 4 * M * wide);
    const int64_t end = least((task + 1) * each, K);
    for (int64_t k = task * each; k < end; k += kInputs) {
      const W* rows[kInputs];
      for (int64_t i = 0; i < kInputs; ++i) rows[i] = w + least(k + i, K - 1) * N;
      for (int64_t m = 0; m < M; ++m) {
        Floats one[kInputs];
        for (int64_t i = 0; i < kInputs; ++i) one[i] = splat(k + i < end ? x[m * K + k + i] : 0.0f);
        const int64_t left = end - k < kInputs ? end - k : kInputs;
        float* to = total + m * wide;
        int64_t n = 0;
        if (left == kInputs) {
          for (; n + kWidth <= N; n += kWidth) {
            Floats add = load_floats(to + n), other = {};
            for (int i = 0; i < kInputs; i += 2) {
              add += one[i] * load_floats(rows[i] + n);
              other += one[i + 1] * load_floats(rows[i + 1] + n);
            }
            store(to + n, add + other);
          }
        }
        for (; n < N; ++n)
          for (int64_t i = 0; i < left; ++i) to[n] += one[i][0] * load_float(rows[i] + n);
      }
    }
  });
  const int64_t columns = ceiling(ceiling(N, 4 * pool.threads), 256) * 256;
  Team::run(pool, ceiling(N, columns), [&](int64_t i) {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = i * columns; n < least((i + 1) * columns, N); ++n) {
        float total = parts[m * wide + n];
        for (int64_t task = 1; task < tasks; ++task) total += parts[(task * M + m) * wide + n];
        d.out[m * N + n] = total;
      }
  });
}

void dot(const Dot& d, const Pool& pool) {
  if (d.rows == 0 || d.outputs == 0) return;
  switch (d.format) {
    case Format::kFloat32:
      return d.transposed ? dot_transposed<float>(d, pool) : dot_straight<float>(d, pool);
    case Format::kBfloat16:
      return d.transposed ? dot_transposed<uint16_t>(d, pool) : dot_straight<uint16_t>(d, pool);
    case Format::kInt8:
      return d.round_x ? dot_rounded<8>(d, pool) : dot_unrounded<8>(d, pool);
    case Format::kInt4:
      return d.round_x ? dot_rounded<4>(d, pool) : dot_unrounded<4>(d, pool);
  }
}

}  // namespace
}  // namespace efflm
