// attention.h's attention: outputs and normalizers.
#pragma once

#include "attention.h"
#include "team.h"

namespace efflm {
namespace {

// exp2(kHidden - x) is 0 for every running maximum x >= kLowest.
constexpr float kHidden = -1e30f, kLowest = -1e29f;
constexpr int64_t kForwardRows = 264, kForwardKeys = 192;  // of a work item; of a block
constexpr int64_t kTasks = 16;  // among which the cores share the work
constexpr int64_t kStrip = 24;  // rows whose scores with a block of keys are held
static_assert(kStrip % kTileRows == 0 && kForwardRows % kStrip == 0 && kForwardKeys % kTileColumns == 0);

struct ForwardArrays {
  int64_t stride, key_stride;
  Places places;
  float *q, *out, *top, *total, *scores, *keys, *turned, *values;
  int32_t* segments;

  ForwardArrays(Cutter& cut, int64_t rows, int64_t filled)
      : stride(stride_of(filled)),
        key_stride(stride_of(kForwardKeys)),
        places(cut, rows),
        q(cut.floats(rows * stride)),
        out(cut.floats(rows * stride)),
        top(cut.floats(rows)),
        total(cut.floats(rows)),
        scores(cut.floats(kStrip * key_stride)),
        keys(cut.floats(kForwardKeys * stride)),
        turned(cut.floats(filled * key_stride)),
        values(cut.floats(kForwardKeys * stride)),
        segments(cut.ints(kForwardKeys)) {}
};

// Turns a row's products with keys into weights relative to its maximum so far, and scales what it has summed so far.
template <bool Masked>
EFFLM_INLINE void soften(float* scores, const Columns& columns, float scale, const Hidden& hidden, int64_t s,
                         const int32_t* segments, float* top, float* total, float* out, int64_t filled) {
  Floats most = splat(kLowest);
  for (int64_t c = columns.from; c < columns.to; c += kWidth) {
    Floats x = load_floats(scores + c) * splat(scale);
    if (Masked) {
      x = hidden(s + c, segments + c) ? splat(kHidden) : x;
      store(scores + c, x);
    }
    most = x > most ? x : most;
  }
  float highest = *top;
  for (int i = 0; i < kWidth; ++i) highest = most[i] > highest ? most[i] : highest;
  Floats added = {};
  for (int64_t c = columns.from; c < columns.to; c += kWidth) {
    const Floats x = load_floats(scores + c);
    const Floats weights = Masked ? exp2(x - splat(highest)) : exp2(x * splat(scale) - splat(highest));
    added += weights;
    store(scores + c, weights);
  }
  if (highest != *top) {
    const float old = exp2(splat(*top - highest))[0];
    *top = highest;
    *total *= old;
    for (int64_t i = 0; i < filled; i += kWidth) store(out + i, load_floats(out + i) * splat(old));
  }
  *total += sum(added);
}

// Rows [row, row + count) of a key-value head.
void attend_rows(const Attention& a, int64_t b, int64_t kv, int64_t row, int64_t count) {
  const int64_t filled = a.filled();
  const float scale = a.scale2();
  auto m = arrays<For::kForward, ForwardArrays>(count, filled);
  m.places.fill(a, b, row, count);
  int64_t start = a.S, end = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (r + kAhead < count) prefetch(a.q, a.at(b, kv, row + r + kAhead), a.H);
    read_row(a.q, a.at(b, kv, row + r), a.H, m.q + r * m.stride);
    std::memset(m.out + r * m.stride, 0, 4 * filled);
    m.top[r] = kLowest;
    m.total[r] = 0;
    start = least(start, m.places.first[r]);
    end = m.places.last[r] + 1 > end ? m.places.last[r] + 1 : end;
  }
  for (int64_t s = start / kForwardKeys * kForwardKeys; s < end; s += kForwardKeys) {
    const int64_t keys = least(kForwardKeys, end - s);
    std::memset(m.segments, 0, 4 * kForwardKeys);
    if (a.segments) std::memcpy(m.segments, a.key_segments + b * a.S + s, 4 * keys);
    const Range segments(m.segments, keys);
    bool read = false;
    for (int64_t strip = 0; strip < count; strip += kStrip) {
      const int64_t rows = least(kStrip, count - strip), parts = ceiling(rows, kTileRows);
      Columns columns[kStrip / kTileRows];
      int64_t from = keys, to = 0;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t r = strip + i * kTileRows, some = least(kTileRows, count - r);
        columns[i] = Columns(TileRows(m.places, r, some), s, keys, segments, a.segments);
        if (columns[i].from == columns[i].to) continue;
        from = least(from, columns[i].from);
        to = columns[i].to > to ? columns[i].to : to;
      }
      if (from >= to) continue;
      if (!read) {
        read_keys(a, a.k, b, kv, s, keys, m.keys, m.stride);
        transpose(m.keys, m.stride, ceiling(keys, kWidth) * kWidth, filled, m.turned, m.key_stride);
        read_keys(a, a.v, b, kv, s, keys, m.values, m.stride);
        read = true;
      }
      // A column of tiles at a time, so that its keys stay in the first cache; likewise the values below.
      for (int64_t c = from; c < to; c += kTileColumns)
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t low = c > columns[i].from ? c : columns[i].from;
          const int64_t high = least(c + kTileColumns, columns[i].to), r = i * kTileRows;
          if (low >= high) continue;
          multiply_tile<false>(least(kTileRows, rows - r), high - low, a.H, m.q + (strip + r) * m.stride, m.stride,
                               m.turned + low, m.key_stride, m.scores + r * m.key_stride + low, m.key_stride);
        }
      for (int64_t r = 0; r < rows; ++r) {
        const Columns& of_row = columns[r / kTileRows];
        if (of_row.from == of_row.to) continue;
        const int64_t i = strip + r;
        (of_row.masked ? soften<true> : soften<false>)(m.scores + r * m.key_stride, of_row, scale,
                                                       Hidden(m.places, i), s, m.segments, m.top + i, m.total + i,
                                                       m.out + i * m.stride, filled);
      }
      for (int64_t h = 0; h < filled; h += kTileColumns)
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t r = i * kTileRows, low = columns[i].from;
          if (low == columns[i].to) continue;
          multiply_tile<true>(least(kTileRows, rows - r), least(kTileColumns, filled - h), columns[i].to - low,
                              m.scores + r * m.key_stride + low, m.key_stride, m.values + low * m.stride + h, m.stride,
                              m.out + (strip + r) * m.stride + h, m.stride);
        }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const bool sees = m.total[r] != 0;  // or is NaN
    write_row({a.out, false}, a.at(b, kv, row + r), a.H, m.out + r * m.stride, sees ? 1 / m.total[r] : 0);
    a.normalizers[a.normalizer_at(b, kv, row + r)] = sees ? m.top[r] + std::log2(m.total[r]) : 0;
  }
}

void attend(const Attention& a, const Pool& pool) {
  if (a.B * a.T * a.N * a.H == 0) return;
  // Tasks are the same for any number of threads, and so are the results.
  const int64_t heads = a.B * a.K, most = ceiling(a.rows(), 2 * kStrip);
  const int64_t wanted = ceiling(kTasks, heads) > ceiling(a.rows(), kForwardRows) ? ceiling(kTasks, heads)
                                                                                  : ceiling(a.rows(), kForwardRows);
  const int64_t each = ceiling(ceiling(a.rows(), least(wanted, most)), kStrip) * kStrip;
  const int64_t parts = ceiling(a.rows(), each);
  Team::run(pool, a.B * a.K * parts, [&](int64_t i) {
    const int64_t head = i / parts, row = (parts - 1 - i % parts) * each;  // the last rows see the most keys
    attend_rows(a, head / a.K, head % a.K, row, least(each, a.rows() - row));
  });
}

}  // namespace
}  // namespace efflm
