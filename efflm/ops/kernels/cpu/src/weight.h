// What is multiplied: rows of x, and weights of any format.
#pragma once

#include <cmath>
#include <type_traits>

#include "codes.h"
#include "gemm.h"
#include "team.h"

namespace efflm {
namespace {

enum class ScaleType : int { kFloat32, kFloat16, kBfloat16 };
enum class Format : int { kInt2 = 2, kInt3 = 3, kInt4 = 4, kInt8 = 8, kBfloat16 = 16, kFloat32 = 32 };  // bits

// Rows [rows, inputs] that a weight is multiplied with: float32 or bfloat16, perhaps to be normalized first (RMSNorm;
// LayerNorm with a bias) and then rounded to bfloat16.
struct Rows {
  const void* x;
  int64_t rows, inputs;
  bool is_bfloat16 = false;
  const float* norm_scale = nullptr;
  const float* norm_bias = nullptr;
  float epsilon = 0;
  bool to_bfloat16 = false;
};

// A weight of `outputs` outputs.
//
// Dense weights (kFloat32, kBfloat16) are [inputs, outputs], or [outputs, inputs] where `transposed`. Quantized ones are
// panels of 32 outputs (see codes.h), padded with zero codes. scale and zeros (or null) are [panels, groups, 32]. With
// scale_codes, which are so too, scale is [panels, super-blocks, 32], and a group has the product of the two.
struct Weight {
  Format format;
  bool transposed = false;
  bool round_x = false;            // to int8 with one scale a row, or with *x_scale
  const float* x_scale = nullptr;
  int64_t inputs, outputs, group;  // group: inputs that share a scale; 0: all
  int super_shift = 0;             // a super-block has 2^super_shift groups
  const void* values;
  const void* scale = nullptr;
  ScaleType scale_type = ScaleType::kFloat32;
  const int8_t *zeros = nullptr, *scale_codes = nullptr;

  int bits() const { return int(format); }
  bool quantized() const { return bits() <= 8; }
  int64_t unit() const { return bits() < 4 ? 16 : 8; }  // groups are of a multiple of this many inputs
  int64_t groups() const { return group ? ceiling(inputs, group) : 1; }
  int64_t filled() const { return ceiling(inputs, unit()) * unit(); }
  int64_t panels() const { return ceiling(outputs, kPanel); }
  const uint8_t* panel(int64_t p) const {
    return static_cast<const uint8_t*>(values) + p * filled() * kPanel * bits() / 8;
  }
  // Of group g of a vector of outputs of a panel. groups: groups(), which takes a division.
  EFFLM_INLINE Floats scales(int64_t groups, int64_t p, int64_t g, int c) const {
    const int64_t at = (p * groups + g) * kPanel + c * kWidth;
    if (!scale_codes) return stored_scales(at);
    const int64_t row = p * super_blocks(groups) + (g >> super_shift);
    return to_floats(load_ints(scale_codes + at)) * stored_scales(row * kPanel + c * kWidth);
  }
  EFFLM_INLINE Ints zero_points(int64_t groups, int64_t p, int64_t g, int c) const {
    return zeros ? load_ints(zeros + (p * groups + g) * kPanel + c * kWidth) : Ints{};
  }
  int64_t super_blocks(int64_t groups) const { return (groups + (1 << super_shift) - 1) >> super_shift; }
  EFFLM_INLINE Floats stored_scales(int64_t at) const {
    if (scale_type == ScaleType::kFloat32) return load_floats(static_cast<const float*>(scale) + at);
    const uint16_t* halves = static_cast<const uint16_t*>(scale) + at;
    return scale_type == ScaleType::kFloat16 ? load_float16(halves) : load_floats(halves);
  }
};

// run(an integral constant) with the bits of a quantized weight.
template <typename Run>
void with_bits(const Weight& w, const Run& run) {
  switch (w.format) {
    case Format::kInt2:
      return run(std::integral_constant<int, 2>());
    case Format::kInt3:
      return run(std::integral_constant<int, 3>());
    case Format::kInt4:
      return run(std::integral_constant<int, 4>());
    default:
      return run(std::integral_constant<int, 8>());
  }
}

// out [rows, outputs] = x times a weight, plus `residual` of the same shape unless that is null.
struct Product {
  Weight weight;
  float* out;
  const float* residual = nullptr;
};

// How many sums of its own an output gets, so that a processor need not wait for one to be added to the next.
constexpr int chains(int tile_vectors) { return tile_vectors >= 8 ? 1 : 8 / tile_vectors; }

// One row of x as float32, normalized where that is asked for; entries up to `filled` are 0.
void read_row(const Rows& x, int64_t row, int64_t filled, float* out) {
  const int64_t K = x.inputs;
  if (x.is_bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(x.x) + row * K;
    for (int64_t k = 0; k < K; ++k) out[k] = from_bfloat16(from[k]);
  } else {
    std::memcpy(out, static_cast<const float*>(x.x) + row * K, 4 * K);
  }
  for (int64_t k = K; k < filled; ++k) out[k] = 0;
  if (!x.norm_scale) return;
  auto total_of = [&](auto of) {
    Floats many = {};
    int64_t k = 0;
    for (; k + kWidth <= K; k += kWidth) many += of(load_floats(out + k));
    float total = sum(many);
    for (; k < K; ++k) total += of(splat(out[k]))[0];
    return total;
  };
  if (x.norm_bias) {
    const float mean = total_of([](Floats v) { return v; }) / K;
    for (int64_t k = 0; k < K; ++k) out[k] -= mean;
  }
  const float variance = total_of([](Floats v) { return v * v; }) / K;
  const float factor = 1 / std::sqrt(variance + x.epsilon);
  for (int64_t k = 0; k < K; ++k) out[k] = out[k] * factor * x.norm_scale[k] + (x.norm_bias ? x.norm_bias[k] : 0.0f);
  if (x.to_bfloat16)
    for (int64_t k = 0; k < K; ++k) out[k] = from_bfloat16(to_bfloat16(out[k]));
}

}  // namespace
}  // namespace efflm
