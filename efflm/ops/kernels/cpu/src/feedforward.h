// The gated feed-forward part of a layer: out = residual + (activation(x gate) * (x up)) down.
#pragma once

#include "dot.h"

namespace efflm {
namespace {

enum class Activation { kSilu, kGeluTanh };  // both are g / (1 + exp(-t)): see `gated`

struct FeedForward {
  Rows x;
  Weight gate, up, down;
  float* out;
  const float* residual = nullptr;
  Activation activation = Activation::kSilu;
  bool to_bfloat16 = false;  // rounds what `down` is multiplied with
};

// gate = activation(gate) * up, `size` of each. (1 + tanh(t / 2)) / 2 = 1 / (1 + exp(-t)).
template <Activation kind>
void gated(float* gate, const float* up, int64_t size, bool to_bfloat16) {
  auto one = [](Floats g, Floats u) {
    const Floats t = kind == Activation::kSilu ? g : 1.5957691216f * (g + 0.044715f * g * g * g);  // 2 sqrt(2 / pi)
    return g / (1.0f + exponential(-t)) * u;
  };
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(gate + i, one(load_floats(gate + i), load_floats(up + i)));
  for (; i < size; ++i) gate[i] = one(splat(gate[i]), splat(up[i]))[0];
  for (i = 0; to_bfloat16 && i < size; ++i) gate[i] = from_bfloat16(efflm::to_bfloat16(gate[i]));
}

void gated(const FeedForward& f, float* gate, const float* up, int64_t size) {
  f.activation == Activation::kSilu ? gated<Activation::kSilu>(gate, up, size, f.to_bfloat16)
                                    : gated<Activation::kGeluTanh>(gate, up, size, f.to_bfloat16);
}

template <int Bits>
void gated_panels(const FeedForward& f, float* h, const Pool& pool) {
  const Read x = read(f.x, f.gate, pool);
  const int64_t F = f.gate.outputs;
  const Product to_h = {f.gate, h, nullptr};
  over_panels(f.gate.panels(), f.x.rows, pool, [&](int64_t p, int64_t row, int64_t end) {
    times_panel<Bits>(f.gate, x, p, row, end,
                      [&](int64_t m, int64_t rows, const float* tile) { copy_out(to_h, m, rows, p, tile); });
    times_panel<Bits>(f.up, x, p, row, end, [&](int64_t m, int64_t rows, const float* tile) {
      for (int64_t r = 0; r < rows; ++r)
        gated(f, h + (m + r) * F + p * kPanel, tile + r * kPanel, least(kPanel, F - p * kPanel));
    });
  });
}

void feedforward(const FeedForward& f, const Pool& pool) {
  const int64_t M = f.x.rows, F = f.gate.outputs;
  if (M == 0) return;
  float* h = scratch<float, For::kHidden>(M * F);
  if (alike(f.gate, f.up)) {
    with_bits(f.gate, [&](auto bits) { gated_panels<bits>(f, h, pool); });
  } else {
    float* up = scratch<float, For::kUp>(M * F);
    product(f.x, {f.gate, h, nullptr}, pool);
    product(f.x, {f.up, up, nullptr}, pool);
    const int64_t size = M * F, part = ceiling(ceiling(size, 4 * pool.threads), 4096) * 4096;
    Team::run(pool, ceiling(size, part), [&](int64_t i) {
      gated(f, h + i * part, up + i * part, least(part, size - i * part));
    });
  }
  Rows rows;
  rows.x = h;
  rows.rows = M;
  rows.inputs = F;
  product(rows, {f.down, f.out, f.residual}, pool);
}

}  // namespace
}  // namespace efflm
