// Causal attention with grouped heads, packed documents and windows: what its two passes share.
//
// FlashAttention (Dao 2022, arXiv 2205.14135): blocks of keys one after another, with an online softmax. The rows of a
// work item are queries of the heads that read one key-value head: row r is of token r / group, head r % group of the
// group. Register tiles of kTileRows rows skip the keys that none of their rows may see.
#pragma once

#include <cmath>

#include "exp2.h"
#include "gemm.h"

namespace efflm {
namespace {

struct Array {  // of float32 or bfloat16
  const void* data;
  bool is_bfloat16;
};

// q [B, T, N, H], k and v [B, S, K, H]. A query sees the keys up to its slot, of these the last `window` (0: all), and
// of these the ones in its own segment. slots [B, T]; null: the queries are the last T of the S keys. segments [B, T]
// and key_segments [B, S], or both null. The outputs are written by the forward pass: out [B, T, N, H], 0 where a query
// sees no key; normalizers [B, N, T], the logarithms to base 2 of the sums of exp(score).
struct Attention {
  int64_t B, T, S, N, K, H, window;
  Array q, k, v;
  const int32_t *slots, *segments, *key_segments;
  float *out, *normalizers;

  int64_t group() const { return N / K; }
  int64_t rows() const { return T * group(); }
  int64_t token(int64_t b, int64_t row) const { return b * T + row / group(); }
  int64_t head(int64_t kv, int64_t row) const { return kv * group() + row % group(); }
  int64_t at(int64_t b, int64_t kv, int64_t row) const { return (token(b, row) * N + head(kv, row)) * H; }
  int64_t key_at(int64_t b, int64_t kv, int64_t s) const { return ((b * S + s) * K + kv) * H; }
  int64_t normalizer_at(int64_t b, int64_t kv, int64_t row) const {
    return (b * N + head(kv, row)) * T + row / group();
  }
  int64_t filled() const { return ceiling(H, kWidth) * kWidth; }
  float scale() const { return 1 / std::sqrt(float(H)); }
  float scale2() const { return float(1.4426950408889634 / std::sqrt(double(H))); }  // of scores as exponents of 2
};

// --- memory of a work item -------------------------------------------------------------------------------------------

// Rows of so many floats, at a distance that spreads them over all sets of a cache.
EFFLM_INLINE int64_t stride_of(int64_t floats) { return (ceiling(floats, 16) | 1) * 16; }

// Cuts arrays out of one block, each at the start of a cache line. Made twice: first to sum up, then to cut.
class Cutter {
 public:
  explicit Cutter(float* start = nullptr) : start_(start) {}
  float* floats(int64_t count) {
    float* here = start_ ? start_ + used_ : nullptr;
    used_ += ceiling(count, 16) * 16;
    return here;
  }
  int32_t* ints(int64_t count) { return reinterpret_cast<int32_t*>(floats(count)); }
  int64_t used() const { return used_; }

 private:
  float* start_;
  int64_t used_ = 0;
};

// A work item's arrays, in a thread's own memory.
template <For Use, typename Arrays, typename... Sizes>
Arrays arrays(Sizes... sizes) {
  Cutter sum;
  Arrays(sum, sizes...);
  Cutter cut(scratch<float, Use>(sum.used()));
  return Arrays(cut, sizes...);
}

// --- copies ----------------------------------------------------------------------------------------------------------

// `count` numbers as floats, followed by zeros up to a multiple of kWidth.
template <typename T>
EFFLM_INLINE void read_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load_floats(from + i));
  if (i == count) return;
  store(to + i, Floats{});
  for (; i < count; ++i) to[i] = load_float(from + i);
}

EFFLM_INLINE void read_row(const Array& array, int64_t at, int64_t count, float* to) {
  if (array.is_bfloat16) {
    read_row(static_cast<const uint16_t*>(array.data) + at, count, to);
  } else {
    read_row(static_cast<const float*>(array.data) + at, count, to);
  }
}

// Asks for a row that is read soon: rows lie apart, where the processor does not foresee them.
EFFLM_INLINE void prefetch(const Array& array, int64_t at, int64_t count) {
  const int64_t size = array.is_bfloat16 ? 2 : 4;
  const char* from = static_cast<const char*>(array.data) + at * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i);
}

// scale * row, in the array's dtype.
EFFLM_INLINE void write_row(const Array& array, int64_t at, int64_t count, const float* row, float scale) {
  if (array.is_bfloat16) {
    uint16_t* to = static_cast<uint16_t*>(const_cast<void*>(array.data)) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(scale * row[i]);
  } else {
    float* to = static_cast<float*>(const_cast<void*>(array.data)) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = scale * row[i];
  }
}

#if defined(__clang__)
#define EFFLM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define EFFLM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

EFFLM_INLINE Floats first_halves(Floats a, Floats b) {  // a0 b0 a1 b1 ...
#if defined(__AVX512F__)
  return EFFLM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return EFFLM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return EFFLM_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}

EFFLM_INLINE Floats second_halves(Floats a, Floats b) {
#if defined(__AVX512F__)
  return EFFLM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return EFFLM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return EFFLM_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// to [columns, rows] = from [rows, columns] transposed; both numbers are multiples of kWidth.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t m = 0; m < rows; m += kWidth)
    for (int64_t n = 0; n < columns; n += kWidth) {
      Floats a[kWidth], b[kWidth];
      for (int i = 0; i < kWidth; ++i) a[i] = load_floats(from + (m + i) * from_stride + n);
      for (int step = 1; step < kWidth; step *= 2) {  // each interleaves rows i and i + kWidth / 2
        for (int i = 0; i < kWidth / 2; ++i) {
          b[2 * i] = first_halves(a[i], a[i + kWidth / 2]);
          b[2 * i + 1] = second_halves(a[i], a[i + kWidth / 2]);
        }
        for (int i = 0; i < kWidth; ++i) a[i] = b[i];
      }
      for (int i = 0; i < kWidth; ++i) store(to + (n + i) * to_stride + m, a[i]);
    }
}

constexpr int64_t kAhead = 8;  // rows

// Keys (or values) [s, s + count) of a head, filled with zero rows up to a multiple of kWidth.
void read_keys(const Attention& a, const Array& array, int64_t b, int64_t kv, int64_t s, int64_t count, float* to,
               int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch(array, a.key_at(b, kv, s + i + kAhead), a.H);
    read_row(array, a.key_at(b, kv, s + i), a.H, to + i * stride);
  }
  for (int64_t i = count; i < ceiling(count, kWidth) * kWidth; ++i) std::memset(to + i * stride, 0, 4 * a.filled());
}

// --- what a query may see --------------------------------------------------------------------------------------------

// Of each row: the first and the last key that it may see, and its segment.
struct Places {
  int32_t *first, *last, *segment;

  Places(Cutter& cut, int64_t rows) : first(cut.ints(rows)), last(cut.ints(rows)), segment(cut.ints(rows)) {}

  void fill(const Attention& a, int64_t b, int64_t row, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = a.token(b, row + r);
      const int64_t slot = a.slots ? a.slots[t] : a.S - a.T + (row + r) / a.group();
      const int64_t start = a.window && slot >= a.window ? slot - a.window + 1 : 0;
      last[r] = int32_t(least(slot, a.S - 1));
      first[r] = int32_t(least(start, a.S));
      segment[r] = a.segments ? a.segments[t] : 0;
    }
  }
};

// The least and the greatest of some numbers.
struct Range {
  int32_t low = INT32_MAX, high = INT32_MIN;

  Range() = default;
  Range(const int32_t* numbers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      low = numbers[i] < low ? numbers[i] : low;
      high = numbers[i] > high ? numbers[i] : high;
    }
  }
};

// The rows of a register tile: which keys some of them see, and which all.
struct TileRows {
  Range first, last, segment;

  TileRows(const Places& places, int64_t row, int64_t count)
      : first(places.first + row, count), last(places.last + row, count), segment(places.segment + row, count) {}
};

// The columns [from, to) of a block of keys that a tile computes, in multiples of kWidth; masked: not all rows see all.
struct Columns {
  int64_t from = 0, to = 0;
  bool masked = false;

  Columns() = default;
  Columns(const TileRows& tile, int64_t s, int64_t count, const Range& segments, bool has_segments) {
    const int64_t low = tile.first.low > s ? tile.first.low - s : 0;
    const int64_t high = least(int64_t(tile.last.high) + 1 - s, count);
    if (low >= high) return;
    if (has_segments && (tile.segment.low > segments.high || tile.segment.high < segments.low)) return;
    from = low / kWidth * kWidth;
    to = ceiling(high, kWidth) * kWidth;
    masked = s + to - 1 > tile.last.low || s + from < tile.first.high;
    if (has_segments)
      masked |= segments.low != segments.high || tile.segment.low != tile.segment.high;
  }
};

// True where a row may not see the kWidth keys from s on; segments: of these keys.
struct Hidden {
  Ints first, last, segment, order;

  Hidden(const Places& places, int64_t row)
      : first(splat(places.first[row])), last(splat(places.last[row])), segment(splat(places.segment[row])) {
    for (int i = 0; i < kWidth; ++i) order[i] = i;
  }
  EFFLM_INLINE Ints operator()(int64_t s, const int32_t* segments) const {
    const Ints key = splat(int32_t(s)) + order;
    return (Ints)(key < first) | (Ints)(key > last) | (Ints)(load<Ints>(segments) != segment);
  }
};

}  // namespace
}  // namespace efflm
