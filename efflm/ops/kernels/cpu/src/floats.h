// Products of floating-point activations with quantized weights.
#pragma once

#include "weight.h"

namespace efflm {
namespace {

// out [R, a panel] of rows of floats; sums [R, groups]: of the entries of x.
template <int Bits, int R>
void float_tile(const Weight& w, int64_t p, const float* x, const float* sums, float* out) {
  using Step = Codes<Bits>;
  constexpr int kMost = chains(R * kVectors), kChains = kMost < 4 ? kMost : 4;
  const int64_t groups = w.groups(), filled = w.filled();
  const int64_t group = groups > 1 ? w.group : filled;
  const uint8_t* panel = w.panel(p);
  Floats total[R][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Floats part[kChains][R][kVectors];
    for (int chain = 0; chain < kChains; ++chain)
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < kVectors; ++c) part[chain][r][c] = Floats{};
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    const uint8_t* bytes = panel + g * group / Step::kInputs * Step::kBytes;
    for (int64_t k = g * group; k < end; k += Step::kInputs, bytes += Step::kBytes) {
      for (int line = 0; line < Step::kBytes; line += 64) ask_for(bytes + kReadAhead + line);
#pragma GCC unroll 16  // else the compiler keeps the sums in memory where a step is long
      for (int j = 0; j < Step::kInputs; ++j)
        for (int c = 0; c < kVectors; ++c) {
          const Floats code = Step(bytes, c).one(j);
          for (int r = 0; r < R; ++r) part[j % kChains][r][c] += code * splat(x[r * filled + k + j]);
        }
    }
    for (int c = 0; c < kVectors; ++c) {
      const Floats scale = w.scales(groups, p, g, c), zero = to_floats(w.zero_points(groups, p, g, c));
      for (int r = 0; r < R; ++r) {
        Floats sum = part[0][r][c];
        for (int chain = 1; chain < kChains; ++chain) sum += part[chain][r][c];
        if (w.zeros) sum -= zero * splat(sums[r * groups + g]);
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
  using Step = Codes<Bits>;
  const int64_t groups = w.groups(), filled = w.filled();
  const int64_t group = groups > 1 ? w.group : filled;
  const uint8_t* panel = w.panel(p);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    for (int c = 0; c < kVectors; ++c) {
      const Floats scale = w.scales(groups, p, g, c), zero = to_floats(w.zero_points(groups, p, g, c));
      for (int64_t k = g * group; k < end; k += Step::kInputs) {
        const Step codes(panel + k / Step::kInputs * Step::kBytes, c);
        for (int j = 0; j < Step::kInputs; ++j)
          store(out + (k + j) * kPanel + c * kWidth, (codes.one(j) - zero) * scale);
      }
    }
  }
}

}  // namespace
}  // namespace efflm
