// x times weights of any format.
#pragma once

#include "dense.h"

namespace efflm {
namespace {

constexpr int64_t kUnpacked = 17;   // from so many rows on, a panel is turned into floats once for all of them
constexpr int64_t kRowBlock = 96;   // rows that read a panel while it is in the cache
static_assert(kRowBlock % kTileRows == 0 && kRowBlock % kFloatRows == 0 && kRowBlock % kRoundedRows == 0 &&
              kRowBlock % kGroupedRows == 0, "rows are laid out in tiles from the first row on");

void copy_out(const Product& to, int64_t row, int64_t rows, int64_t p, const float* tile) {
  const int64_t columns = least(kPanel, to.weight.outputs - p * kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * to.weight.outputs + p * kPanel;
    if (to.residual) {
      for (int64_t n = 0; n < columns; ++n) to.out[at + n] = to.residual[at + n] + tile[r * kPanel + n];
    } else {
      std::memcpy(to.out + at, tile + r * kPanel, 4 * columns);
    }
  }
}

template <int Bits, int R>
void rounded_rows(int64_t rows, const Weight& w, int64_t p, const Rounded* x, const float* row_scales,
                  const int32_t* sums, float* out) {
  if constexpr (R > 0) {
    if (rows == R) {
      rounded_tile<Bits, R>(w, p, x, row_scales, sums, out);
    } else {
      rounded_rows<Bits, R - 1>(rows, w, p, x, row_scales, sums, out);
    }
  }
}

template <int Bits, int R>
void float_rows(int64_t rows, const Weight& w, int64_t p, const float* x, const float* sums, float* out) {
  if constexpr (R > 0) {
    if (rows == R) {
      float_tile<Bits, R>(w, p, x, sums, out);
    } else {
      float_rows<Bits, R - 1>(rows, w, p, x, sums, out);
    }
  }
}

constexpr int kTileMost = kRoundedRows > kTileRows ? kRoundedRows : kTileRows;  // rows of a tile, of any kind

// Rows [row, end) times panel p: calls done(row, rows, tile) for each tile [rows, 32].
template <int Bits, typename Done>
void times_panel(const Weight& w, const Read& x, int64_t p, int64_t row, int64_t end, const Done& done) {
  alignas(64) float tile[kTileMost * kPanel];
  const int64_t filled = w.filled(), groups = w.groups();
  if (w.round_x) {
    const int64_t most = most_rounded_rows(Bits, groups > 1);
    for (; row < end; row += most) {
      const int64_t rows = least(most, end - row);
      rounded_rows<Bits, most_rounded_rows(Bits, false)>(rows, w, p, x.rounded + row * filled, x.row_scales + row,
                                                         x.sums + row * groups, tile);
      done(row, rows, tile);
    }
  } else if (end - row >= kUnpacked) {
    float* floats = scratch<float, For::kPanel>(filled * kPanel);
    unpack<Bits>(w, p, floats);
    for (; row < end; row += kTileRows) {
      const int64_t rows = least(kTileRows, end - row);
      multiply<false>(rows, kPanel, filled, x.floats + row * filled, filled, floats, kPanel, tile, kPanel);
      done(row, rows, tile);
    }
  } else {
    for (; row < end; row += kFloatRows) {
      const int64_t rows = least(kFloatRows, end - row);
      float_rows<Bits, kFloatRows>(rows, w, p, x.floats + row * filled, w.zeros ? x.float_sums + row * groups : nullptr,
                                   tile);
      done(row, rows, tile);
    }
  }
}

// task(panel, first row, end) for all panels and blocks of rows: parts many enough to be shared evenly.
template <typename Task>
void over_panels(int64_t panels, int64_t rows, const Pool& pool, const Task& task) {
  const int64_t blocks = ceiling(rows, kRowBlock), wanted = ceiling(16 * pool.threads, blocks);
  const int64_t each = ceiling(panels, least(wanted, panels)), parts = ceiling(panels, each);
  Team::run(pool, blocks * parts, [&](int64_t i) {
    const int64_t row = i / parts * kRowBlock, from = i % parts * each;
    for (int64_t p = from; p < least(from + each, panels); ++p) task(p, row, least(row + kRowBlock, rows));
  });
}

// Whether two weights read x alike, so that their products can be one piece of work.
bool alike(const Weight& a, const Weight& b) {
  return a.format == b.format && a.quantized() && a.round_x == b.round_x && !a.x_scale && !b.x_scale &&
         a.inputs == b.inputs && a.group == b.group && !a.zeros == !b.zeros;
}

template <int Bits>
void quantized_products(const Rows& x, const Product* all, int count, const Pool& pool) {
  const Read read_x = read(x, all[0].weight, pool);
  int64_t panels = 0;
  for (int i = 0; i < count; ++i) panels += all[i].weight.panels();
  over_panels(panels, x.rows, pool, [&](int64_t p, int64_t row, int64_t end) {
    int i = 0;
    for (; p >= all[i].weight.panels(); ++i) p -= all[i].weight.panels();
    times_panel<Bits>(all[i].weight, read_x, p, row, end, [&](int64_t m, int64_t rows, const float* tile) {
      copy_out(all[i], m, rows, p, tile);
    });
  });
}

void quantized_products(const Rows& x, const Product* all, int count, const Pool& pool) {
  with_bits(all[0].weight, [&](auto bits) { quantized_products<bits>(x, all, count, pool); });
}

void product(const Rows& x, const Product& d, const Pool& pool) {
  const bool across = d.weight.transposed;
  switch (d.weight.format) {
    case Format::kFloat32:
      return across ? transposed_product<float>(x, d, pool) : straight_product<float>(x, d, pool);
    case Format::kBfloat16:
      return across ? transposed_product<uint16_t>(x, d, pool) : straight_product<uint16_t>(x, d, pool);
    default:
      return quantized_products(x, &d, 1, pool);
  }
}

// The products of one x with several weights.
void products(const Rows& x, const Product* all, int count, const Pool& pool) {
  if (x.rows == 0) return;
  bool together = true;
  for (int i = 1; i < count; ++i) together = together && alike(all[0].weight, all[i].weight);
  if (together && all[0].weight.quantized()) return quantized_products(x, all, count, pool);
  for (int i = 0; i < count; ++i) product(x, all[i], pool);
}

}  // namespace
}  // namespace efflm
