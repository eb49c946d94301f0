// Products of int8 activations with quantized weights.
#pragma once

#include <limits>

#include "weight.h"

namespace efflm {
namespace {


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
// The first `count` floats, then zeros.
EFFLM_INLINE Floats partial(const float* x, int64_t count) {
  float some[kWidth] = {};
  for (int64_t i = 0; i < count && i < kWidth; ++i) some[i] = x[i];
  return load_floats(some);
}

// Rounded rows lie in tiles of `tile` rows, side by side: of every 4 inputs those of the first row, of the second, ...
// so that products with a tile read its rows at fixed distances.
struct Tiles {
  int64_t rows, tile, filled;

  int64_t tile_of(int64_t row) const { return least(tile, rows - row / tile * tile); }
  int64_t start(int64_t row) const { return row / tile * tile * filled + row % tile * 4; }
};

// Row `row`, filled up with zeros, to int8: see rounded_rows in qarray.py. A row that is not finite gets the scale
// NaN. sums: of the entries of each group.
void round_row(const Weight& w, const float* x, const Tiles& tiles, int64_t row, Rounded* out, float* row_scale,
               int32_t* sums) {
  const int64_t filled = w.filled(), group = w.group ? w.group : filled;
  float absmax;
  int32_t most = 0;
  for (int64_t k = 0; k < filled; ++k) {
    const int32_t magnitude = load<int32_t>(x + k) & 0x7fffffff;  // magnitudes compare as integers do; NaN is largest
    most = magnitude > most ? magnitude : most;
  }
  std::memcpy(&absmax, &most, 4);
  const bool broken = most >= 0x7f800000;
  const float scale = w.x_scale ? *w.x_scale : absmax > 0 ? absmax / 127 : 1;
  *row_scale = broken ? std::numeric_limits<float>::quiet_NaN() : scale;
  const Floats top = splat(127.0f), divisor = splat(scale);
  const Ints none = splat(broken ? 0 : -1);
  int32_t* whole = scratch<int32_t, For::kRounded>(filled + kWidth);
  for (int64_t i = 0; i < filled; i += kWidth) {
    Floats value = i + kWidth <= filled ? load_floats(x + i) : partial(x + i, filled - i);
    value = value / divisor;
    value = value < top ? value : top;  // of 0 / 0 too: a scale so small that it is 0
    value = value > -top ? value : -top;
    value = (value + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 rounds to the nearest, ties to even
    store(whole + i, __builtin_convertvector(value, Ints) & none);
  }
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t end = g + 1 < w.groups() ? (g + 1) * group : filled;
    int32_t total = 0;
    for (int64_t i = g * group; i < end; ++i) total += whole[i];
    sums[g] = total;
  }
  Rounded* to = out + tiles.start(row);
  const int64_t step = 4 * tiles.tile_of(row);
  for (int64_t i = 0; i < filled; i += 4, to += step)
    for (int j = 0; j < 4; ++j) to[position(j)] = Rounded(whole[i + j]);
}

// out [R, a panel] of a tile of R rounded rows.
template <int Bits, int R>
void rounded_tile(const Weight& w, int64_t p, const Rounded* x, const float* row_scales, const int32_t* sums, float* out) {
  using Step = Codes<Bits>;
  constexpr int kChains = chains(R * kVectors), kSteps = kChains > Step::kFours ? kChains / Step::kFours : 1;
  const int64_t groups = w.groups(), filled = w.filled();
  const int64_t group = groups > 1 ? w.group : filled;
  const uint8_t* panel = w.panel(p);
  Floats total[R][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Ints part[kChains][R][kVectors];
    for (int chain = 0; chain < kChains; ++chain)
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kVectors; ++c)
          part[chain][r][c] = chain ? Ints{} : splat(-Step::kHalf * sums[r * groups + g]);
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    int64_t k = g * group;
    const uint8_t* bytes = panel + k / Step::kInputs * Step::kBytes;
    auto step = [&](int chain) {
      for (int line = 0; line < Step::kBytes; line += 64) ask_for(bytes + kReadAhead + line);
      for (int c = 0; c < kVectors; ++c) {
        const Step codes(bytes, c);
        for (int i = 0; i < Step::kFours; ++i)
          for (int r = 0; r < R; ++r) {
            Ints& sum = part[(chain + i) % kChains][r][c];
            sum = multiply_bytes(sum, codes.four(i), x + (k + 4 * i) * R + 4 * r);
          }
      }
      k += Step::kInputs;
      bytes += Step::kBytes;
    };
    if constexpr (kSteps > 1)
      while (k + kSteps * Step::kInputs <= end)
        for (int i = 0; i < kSteps; ++i) step(i * Step::kFours);
    while (k < end) step(0);
    for (int c = 0; c < kVectors; ++c) {
      const Floats scale = w.scales(groups, p, g, c);
      const Ints zero = w.zero_points(groups, p, g, c);
      for (int r = 0; r < R; ++r) {
        Ints sum = part[0][r][c];
        for (int chain = 1; chain < kChains; ++chain) sum += part[chain][r][c];
        if (w.zeros) sum -= zero * splat(sums[r * groups + g]);
        const Floats exact = to_floats(sum);
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

}  // namespace
}  // namespace efflm
