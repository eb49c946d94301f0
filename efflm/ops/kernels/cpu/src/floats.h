// Products of floating-point activations with quantized weights.
#pragma once

#include "weight.h"

namespace efflm {
namespace {

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
void float_tile(const Weight& w, int64_t p, const float* x, const float* sums, float* out) {
  constexpr int kStep = Bits == 8 ? 4 : 8, kMost = chains(R * kVectors), kChains = kMost < 4 ? kMost : 4;
  const int64_t groups = w.groups(), filled = w.filled(), padded = w.panels() * kPanel;
  const int64_t group = groups > 1 ? w.group : filled;
  const uint8_t* panel = w.panel(p);
  Floats total[R][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Floats part[kChains][R][kVectors] = {};
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    const uint8_t* bytes = panel + g * group / kStep * (4 * kPanel);
    for (int64_t k = g * group; k < end; k += kStep, bytes += 4 * kPanel) {
      for (int line = 0; line < 4 * kPanel; line += 64) ask_for(bytes + kReadAhead + line);
      for (int c = 0; c < kVectors; ++c) {
        const Ints flipped = flip<Bits>(load<Ints>(bytes + c * 4 * kWidth));
        for (int j = 0; j < kStep; ++j) {
          const Floats codes = code<Bits>(flipped, j);
          for (int r = 0; r < R; ++r) part[j % kChains][r][c] += codes * splat(x[r * filled + k + j]);
        }
      }
    }
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = g * padded + p * kPanel + c * kWidth;
      const Floats scale = load_floats(w.scale + at);
      Ints zero = {};
      if (w.zeros)
        for (int i = 0; i < kWidth; ++i) zero[i] = w.zeros[at + i];
      for (int r = 0; r < R; ++r) {
        Floats sum = part[0][r][c];
        for (int chain = 1; chain < kChains; ++chain) sum += part[chain][r][c];
        if (w.zeros) sum -= to_floats(zero) * splat(sums[r * groups + g]);
        total[r][c] += sum * scale;
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kVectors; ++c) store(out + r * kPanel + c * kWidth, total[r][c]);
}

// A panel as floats [filled, 32].
template <int Bits>
void unpack(const Weight& w, int64_t p, float* out) {
  constexpr int kStep = Bits == 8 ? 4 : 8;
  const int64_t groups = w.groups(), filled = w.filled(), padded = w.panels() * kPanel;
  const int64_t group = groups > 1 ? w.group : filled;
  const uint8_t* panel = w.panel(p);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = g * padded + p * kPanel + c * kWidth;
      const Floats scale = load_floats(w.scale + at);
      Ints zero = {};
      if (w.zeros)
        for (int i = 0; i < kWidth; ++i) zero[i] = w.zeros[at + i];
      const Floats offset = to_floats(zero);
      for (int64_t k = g * group; k < end; k += kStep) {
        const Ints flipped = flip<Bits>(load<Ints>(panel + k / kStep * (4 * kPanel) + c * 4 * kWidth));
        for (int j = 0; j < kStep; ++j)
          store(out + (k + j) * kPanel + c * kWidth, (code<Bits>(flipped, j) - offset) * scale);
      }
    }
  }
}

}  // namespace
}  // namespace efflm
