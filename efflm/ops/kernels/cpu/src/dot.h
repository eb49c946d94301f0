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
// panels of 32 outputs, padded with zero codes: for every 4 (8 bits) or 8 (4 bits) inputs 32 words of 4 bytes, one word
// an output. The bytes of a word are codes + 128 of inputs 0 to 3; or code + 8 of input i in the low half of byte i, of
// input i + 4 in the high half. scale and zeros (or null) are [groups, outputs filled up to panels].
struct Weight {
  Format format;
  bool transposed = false;
  bool round_x = false;            // to int8 with one scale a row, or with *x_scale
  const float* x_scale = nullptr;
  int64_t inputs, outputs, group;  // group: inputs that share a scale; 0: all
  const void* values;
  const float* scale = nullptr;
  const int8_t* zeros = nullptr;

  int64_t groups() const { return group ? ceiling(inputs, group) : 1; }
  int64_t filled() const { return ceiling(inputs, kUnit) * kUnit; }
  int64_t panels() const { return ceiling(outputs, kPanel); }
  int bits() const { return format == Format::kInt8 ? 8 : 4; }
  bool quantized() const { return format == Format::kInt8 || format == Format::kInt4; }
  const uint8_t* panel(int64_t p) const {
    return static_cast<const uint8_t*>(values) + p * filled() * kPanel * bits() / 8;
  }
};

// out [rows, outputs] = x times a weight, plus `residual` of the same shape unless that is null.
struct Product {
  Weight weight;
  float* out;
  const float* residual = nullptr;
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
  int32_t* whole = scratch<int32_t, 0>(filled + kWidth);
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

// How many sums of its own an output gets, so that a processor need not wait for one to be added to the next.
constexpr int chains(int tile_vectors) { return tile_vectors >= 8 ? 1 : 8 / tile_vectors; }

// out [R, a panel] of a tile of R rounded rows.
template <int Bits, int R>
void rounded_tile(const Weight& w, int64_t p, const Rounded* x, const float* row_scales, const int32_t* sums, float* out) {
  constexpr int kStep = Bits == 8 ? 4 : 8, kBias = Bits == 8 ? 128 : 8, kChains = chains(R * kVectors);
  const int64_t groups = w.groups(), filled = w.filled(), padded = w.panels() * kPanel;
  const int64_t group = groups > 1 ? w.group : filled;
  const uint8_t* panel = w.panel(p);
  Floats total[R][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Ints part[kChains][R][kVectors] = {};
    const int64_t end = g + 1 < groups ? (g + 1) * group : filled;
    int64_t k = g * group;
    const uint8_t* bytes = panel + k / kStep * (4 * kPanel);
    auto step = [&](int chain) {
      for (int c = 0; c < kVectors; ++c) {
        const Ints words = load<Ints>(bytes + c * 4 * kWidth);
        for (int r = 0; r < R; ++r) {
          Ints& sum = part[chain][r][c];
          if constexpr (Bits == 8) {
            sum = multiply_bytes(sum, words, x + k * R + 4 * r);
          } else {
            sum = multiply_bytes(sum, words & 0x0f0f0f0f, x + k * R + 4 * r);
            sum = multiply_bytes(sum, words >> 4 & 0x0f0f0f0f, x + (k + 4) * R + 4 * r);
          }
        }
      }
      k += kStep;
      bytes += 4 * kPanel;
    };
    while (k + kChains * kStep <= end)
      for (int chain = 0; chain < kChains; ++chain) step(chain);
    while (k < end) step(0);
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = g * padded + p * kPanel + c * kWidth;
      const Floats scale = load_floats(w.scale + at);
      Ints zero = splat(kBias);
      if (w.zeros)
        for (int i = 0; i < kWidth; ++i) zero[i] += w.zeros[at + i];
      for (int r = 0; r < R; ++r) {
        Ints sum = part[0][r][c];
        for (int chain = 1; chain < kChains; ++chain) sum += part[chain][r][c];
        const Floats exact = to_floats(sum - zero * splat(sums[r * groups + g]));
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

// --- quantized weights -----------------------------------------------------------------------------------------------

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
constexpr int64_t kUnpacked = 6;    // from so many rows on, a panel is turned into floats once for all of them
constexpr int64_t kRowBlock = 96;   // rows that read a panel while it is in the cache

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

// x as the products with a weight read it.
struct Read {
  const float* floats = nullptr;  // [rows, filled]
  const Rounded* rounded = nullptr;  // in Tiles
  const float* row_scales = nullptr;
  const int32_t* sums = nullptr;  // [rows, groups], of rounded entries
  const float* float_sums = nullptr;
};

// Use: of scratch memory, so that what was read for one weight outlives what is read for another.
template <int Use>
Read read(const Rows& x, const Weight& w, const Pool& pool) {
  const int64_t filled = w.quantized() ? w.filled() : w.inputs, groups = w.groups(), M = x.rows;
  const bool as_it_is = !x.is_bfloat16 && !x.norm_scale && filled == x.inputs;
  const bool sums = !w.round_x && w.zeros;
  Read out;
  if (as_it_is && !w.round_x && !sums) {
    out.floats = static_cast<const float*>(x.x);
    return out;
  }
  float* floats = w.round_x ? nullptr : scratch<float, Use>(M * filled);
  Rounded* rounded = w.round_x ? scratch<Rounded, Use>(M * filled) : nullptr;
  float* row_scales = w.round_x ? scratch<float, Use + 1>(M) : nullptr;
  int32_t* integer_sums = w.round_x ? scratch<int32_t, Use>(M * groups) : nullptr;
  float* float_sums = sums ? scratch<float, Use + 2>(M * groups) : nullptr;
  const Tiles tiles = {M, groups > 1 ? kGroupedRows : kRoundedRows, filled};
  const int64_t part = ceiling(M, M > 16 ? 4 * pool.threads : 1);
  Team::run(pool, ceiling(M, part), [&](int64_t i) {
    for (int64_t m = i * part; m < least((i + 1) * part, M); ++m) {
      float* row = w.round_x ? scratch<float, 0>(filled) : floats + m * filled;
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

constexpr int kTileMost = kRoundedRows > kTileRows ? kRoundedRows : kTileRows;  // rows of a tile, of any kind

// Rows [row, end) times panel p: calls done(row, rows, tile) for each tile [rows, 32].
template <int Bits, typename Done>
void times_panel(const Weight& w, const Read& x, int64_t p, int64_t row, int64_t end, const Done& done) {
  alignas(64) float tile[kTileMost * kPanel];
  const int64_t filled = w.filled(), groups = w.groups();
  if (w.round_x) {
    const int64_t most = groups > 1 ? kGroupedRows : kRoundedRows;
    for (; row < end; row += most) {
      const int64_t rows = least(most, end - row);
      rounded_rows<Bits, kRoundedRows>(rows, w, p, x.rounded + row * filled, x.row_scales + row, x.sums + row * groups,
                                       tile);
      done(row, rows, tile);
    }
  } else if (end - row >= kUnpacked) {
    float* floats = scratch<float, 1>(filled * kPanel);
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
  const int64_t blocks = ceiling(rows, kRowBlock), wanted = ceiling(8 * pool.threads, blocks);
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
  const Read read_x = read<2>(x, all[0].weight, pool);
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

// --- dense weights ---------------------------------------------------------------------------------------------------

// Rows of the weight are outputs: products of whole rows, four outputs at a time.
template <typename W>
void transposed_product(const Rows& rows_of_x, const Product& d, const Pool& pool) {
  const int64_t M = rows_of_x.rows, K = d.weight.inputs, N = d.weight.outputs, blocks = ceiling(N, 4);
  const float* x = read<2>(rows_of_x, d.weight, pool).floats;
  const W* w = static_cast<const W*>(d.weight.values);
  const int64_t each = ceiling(blocks, 8 * pool.threads);
  Team::run(pool, ceiling(blocks, each), [&](int64_t task) {
    for (int64_t n = task * each * 4; n < least((task + 1) * each * 4, N); n += 4) {
      const W* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = w + least(n + i, N - 1) * K;
      for (int64_t m = 0; m < M; ++m) {
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
          const int64_t at = m * N + n + i;
          d.out[at] = sum(total[i][0] + total[i][1]) + rest + (d.residual ? d.residual[at] : 0.0f);
        }
      }
    }
  });
}

// A block of a weight as floats: itself, or converted into `out` [inputs, columns].
EFFLM_INLINE const float* as_floats(const float* w, int64_t, int64_t, int64_t stride, float*, int64_t* out_stride) {
  *out_stride = stride;
  return w;
}

const float* as_floats(const uint16_t* w, int64_t inputs, int64_t columns, int64_t stride, float* out,
                       int64_t* out_stride) {
  for (int64_t k = 0; k < inputs; ++k)
    for (int64_t n = 0; n < columns; n += kWidth) store(out + k * columns + n, load_floats(w + k * stride + n));
  *out_stride = columns;
  return out;
}

constexpr int64_t kInputs = 8;        // that one row is multiplied with at a time
constexpr int64_t kBlockInputs = 32;  // and several rows
constexpr int64_t kBlockColumns = 256;

// total [N] += x [count <= 8] times as many rows of the weight, N columns each.
template <typename W>
EFFLM_INLINE void add_inputs(const float* x, const W* w, int64_t count, int64_t N, float* total) {
  int64_t n = 0;
  if (count == kInputs) {
    Floats one[kInputs];
    for (int64_t i = 0; i < kInputs; ++i) one[i] = splat(x[i]);
    for (; n + kWidth <= N; n += kWidth) {
      Floats add = load_floats(total + n), other = {};
      for (int64_t i = 0; i < kInputs; i += 2) {
        add += one[i] * load_floats(w + i * N + n);
        other += one[i + 1] * load_floats(w + (i + 1) * N + n);
      }
      store(total + n, add + other);
    }
  }
  for (; n < N; ++n)
    for (int64_t i = 0; i < count; ++i) total[n] += x[i] * load_float(w + i * N + n);
}

// Rows of the weight are inputs: each task adds up some inputs for all outputs, reading the weight from end to end; the
// sums of the tasks are added in a fixed order, so that the result does not depend on the number of threads.
template <typename W>
void straight_product(const Rows& rows_of_x, const Product& d, const Pool& pool) {
  const int64_t M = rows_of_x.rows, K = d.weight.inputs, N = d.weight.outputs;
  const float* x = read<2>(rows_of_x, d.weight, pool).floats;
  const W* w = static_cast<const W*>(d.weight.values);
  const int64_t whole = N / kWidth * kWidth;
  const int64_t tasks = least(16, ceiling(K, kBlockInputs)), each = ceiling(ceiling(K, tasks), kInputs) * kInputs;
  float* parts = scratch<float, 5>(tasks * M * N);
  Team::run(pool, tasks, [&](int64_t task) {
    float* total = parts + task * M * N;
    std::memset(total, 0, 4 * M * N);
    const int64_t end = least((task + 1) * each, K);
    if (M == 1) {
      for (int64_t k = task * each; k < end; k += kInputs) add_inputs(x + k, w + k * N, least(kInputs, end - k), N, total);
      return;
    }
    float* block = scratch<float, 11>(kBlockInputs * kBlockColumns);
    for (int64_t k = task * each; k < end; k += kBlockInputs) {
      const int64_t count = least(kBlockInputs, end - k);
      for (int64_t n = 0; n < whole; n += kBlockColumns) {
        const int64_t columns = least(kBlockColumns, whole - n);
        int64_t stride;
        const float* floats = as_floats(w + k * N + n, count, columns, N, block, &stride);
        multiply<true>(M, columns, count, x + k, K, floats, stride, total + n, N);
      }
      for (int64_t m = 0; m < M; ++m)
        for (int64_t n = whole; n < N; ++n)
          for (int64_t i = k; i < k + count; ++i) total[m * N + n] += x[m * K + i] * load_float(w + i * N + n);
    }
  });
  const int64_t size = M * N, part = ceiling(ceiling(size, 4 * pool.threads), 256) * 256;
  Team::run(pool, ceiling(size, part), [&](int64_t i) {
    const int64_t begin = i * part, end = least(begin + part, size);
    if (d.residual) {
      for (int64_t n = begin; n < end; ++n) d.out[n] = parts[n] + d.residual[n];
    } else {
      std::memcpy(d.out + begin, parts + begin, 4 * (end - begin));
    }
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t n = begin; n < end; ++n) d.out[n] += parts[task * size + n];
  });
}

void product(const Rows& x, const Product& d, const Pool& pool) {
  const bool across = d.weight.transposed;
  switch (d.weight.format) {
    case Format::kFloat32:
      return across ? transposed_product<float>(x, d, pool) : straight_product<float>(x, d, pool);
    case Format::kBfloat16:
      return across ? transposed_product<uint16_t>(x, d, pool) : straight_product<uint16_t>(x, d, pool);
    case Format::kInt8:
      return quantized_products<8>(x, &d, 1, pool);
    case Format::kInt4:
      return quantized_products<4>(x, &d, 1, pool);
  }
}

// The products of one x with several weights.
void products(const Rows& x, const Product* all, int count, const Pool& pool) {
  if (x.rows == 0) return;
  bool together = true;
  for (int i = 1; i < count; ++i) together = together && alike(all[0].weight, all[i].weight);
  if (together && all[0].weight.quantized()) {
    if (all[0].weight.format == Format::kInt8) return quantized_products<8>(x, all, count, pool);
    return quantized_products<4>(x, all, count, pool);
  }
  for (int i = 0; i < count; ++i) product(x, all[i], pool);
}

}  // namespace
}  // namespace efflm
