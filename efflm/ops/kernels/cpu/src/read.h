// Rows of x as the products with a weight read them.
#pragma once

#include "floats.h"
#include "rounded.h"

namespace efflm {
namespace {

#if defined(__AVX512F__)
constexpr int kRoundedRows = 12, kGroupedRows = 6;
#elif defined(__AVX2__)
constexpr int kRoundedRows = 3, kGroupedRows = 2;
#else
constexpr int kRoundedRows = 1, kGroupedRows = 1;
#endif
#if defined(__AVX512F__)
constexpr int kFloatRows = 4;
#elif defined(__AVX2__)
constexpr int kFloatRows = 2;
#else
constexpr int kFloatRows = 1;
#endif

// Rows of a tile. With groups a tile has two sums of each output; and few weights have 2 or 3 bits without groups.
constexpr int most_rounded_rows(int bits, bool grouped) { return grouped || bits < 4 ? kGroupedRows : kRoundedRows; }

// x as the products with a weight read it.
struct Read {
  const float* floats = nullptr;  // [rows, filled]
  const Rounded* rounded = nullptr;  // in Tiles
  const float* row_scales = nullptr;
  const int32_t* sums = nullptr;  // [rows, groups], of rounded entries
  const float* float_sums = nullptr;
};

Read read(const Rows& x, const Weight& w, const Pool& pool) {
  const int64_t filled = w.quantized() ? w.filled() : w.inputs, groups = w.groups(), M = x.rows;
  const bool as_it_is = !x.is_bfloat16 && !x.norm_scale && filled == x.inputs;
  const bool sums = !w.round_x && w.zeros;
  Read out;
  if (as_it_is && !w.round_x && !sums) {
    out.floats = static_cast<const float*>(x.x);
    return out;
  }
  float* floats = w.round_x ? nullptr : scratch<float, For::kX>(M * filled);
  Rounded* rounded = w.round_x ? scratch<Rounded, For::kX>(M * filled) : nullptr;
  float* row_scales = w.round_x ? scratch<float, For::kScales>(M) : nullptr;
  int32_t* integer_sums = w.round_x ? scratch<int32_t, For::kSums>(M * groups) : nullptr;
  float* float_sums = sums ? scratch<float, For::kSums>(M * groups) : nullptr;
  const Tiles tiles = {M, most_rounded_rows(w.bits(), groups > 1), filled};
  const int64_t part = ceiling(M, M > 16 ? 4 * pool.threads : 1);
  Team::run(pool, ceiling(M, part), [&](int64_t i) {
    for (int64_t m = i * part; m < least((i + 1) * part, M); ++m) {
      float* row = w.round_x ? scratch<float, For::kRow>(filled) : floats + m * filled;
      read_row(x, m, filled, row);
      if (w.round_x) round_row(w, row, tiles, m, rounded, row_scales + m, integer_sums + m * groups);
      for (int64_t g = 0; sums && g < groups; ++g) {
        const int64_t end = g + 1 < groups ? (g + 1) * w.group : filled;
        float total = 0;
        for (int64_t k = g * w.group; k < end; ++k) total += row[k];
        float_sums[m * groups + g] = total;
      }
    }
  });
  return {floats, rounded, row_scales, integer_sums, float_sums};
}

}  // namespace
}  // namespace efflm
