// The gradients of attention.h's attention: the weights are computed again from the normalizers.
#pragma once

#include <initializer_list>
#include <memory>
#include <thread>

#include "attention.h"
#include "team.h"

namespace efflm {
namespace {

// From g [B, T, N, H], the gradient of `out`, both read here, and the normalizers: dq, dk, dv like q, k, v. The keys are
// cut into chunks, so that there are tasks for all cores; dq is float32 where there is more than one, since they add to
// it, one after another.
struct Gradients {
  Attention attention;
  const float* g;
  int64_t chunks;
  Array dq, dk, dv;
};

constexpr int64_t kBackwardRows = 96, kBackwardKeys = 96;  // of a block
static_assert(kBackwardRows % kTileRows == 0 && kBackwardKeys % kTileColumns == 0);

struct BackwardArrays {
  int64_t stride, key_stride;
  Places places;
  float *dq, *inner, *normalizers;             // of all rows
  float *q, *g, *weights, *ds;                 // of a block of rows
  float *keys, *turned, *turned_values, *dk, *dv;  // of a block of keys
  int32_t* segments;

  BackwardArrays(Cutter& cut, int64_t rows, int64_t filled)
      : stride(stride_of(filled)),
        key_stride(stride_of(kBackwardKeys)),
        places(cut, rows),
        dq(cut.floats(rows * stride)),
        inner(cut.floats(rows)),
        normalizers(cut.floats(rows)),
        q(cut.floats(kBackwardRows * stride)),
        g(cut.floats(kBackwardRows * stride)),
        weights(cut.floats(kBackwardRows * key_stride)),
        ds(cut.floats(kBackwardRows * key_stride)),
        keys(cut.floats(kBackwardKeys * stride)),
        turned(cut.floats(filled * key_stride)),
        turned_values(cut.floats(filled * key_stride)),
        dk(cut.floats(kBackwardKeys * stride)),
        dv(cut.floats(kBackwardKeys * stride)),
        segments(cut.ints(kBackwardKeys)) {}
};

// A row's products q k and g v with keys become its weights, and ds = weights * (g v - inner).
template <bool Masked>
EFFLM_INLINE void weigh(float* weights, float* ds, const Columns& columns, float scale, const Hidden& hidden, int64_t s,
                        const int32_t* segments, float normalizer, float inner) {
  for (int64_t c = columns.from; c < columns.to; c += kWidth) {
    Floats p = exp2(load_floats(weights + c) * splat(scale) - splat(normalizer));
    Floats d = p * (load_floats(ds + c) - splat(inner));
    if (Masked) {
      const Ints no = hidden(s + c, segments + c);
      p = no ? Floats{} : p;
      d = no ? Floats{} : d;
    }
    store(weights + c, p);
    store(ds + c, d);
  }
}

// The rows [row, row + rows) with the keys [s, s + keys): adds to dq of the rows, dk and dv.
void attend_back_block(const Gradients& d, const BackwardArrays& m, int64_t b, int64_t kv, int64_t s, int64_t keys,
                       const Range& segments, int64_t row, int64_t rows) {
  const Attention& a = d.attention;
  const float scale = a.scale2();
  const int64_t filled = a.filled(), tiles = ceiling(rows, kTileRows), wide = ceiling(keys, kWidth) * kWidth;
  Columns columns[kBackwardRows / kTileRows];
  int64_t from = wide, to = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t r = row + i * kTileRows, some = least(kTileRows, row + rows - r);
    columns[i] = Columns(TileRows(m.places, r, some), s, keys, segments, a.segments);
    if (columns[i].from == columns[i].to) continue;
    from = least(from, columns[i].from);
    to = columns[i].to > to ? columns[i].to : to;
  }
  if (from >= to) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = a.at(b, kv, row + r);
    if (r + kAhead < rows) {
      prefetch(a.q, a.at(b, kv, row + r + kAhead), a.H);
      prefetch({d.g, false}, a.at(b, kv, row + r + kAhead), a.H);
    }
    read_row(a.q, at, a.H, m.q + r * m.stride);
    read_row(d.g + at, a.H, m.g + r * m.stride);
  }
  for (int64_t c = from; c < to; c += kTileColumns)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t low = c > columns[i].from ? c : columns[i].from, r = i * kTileRows;
      const int64_t high = least(c + kTileColumns, columns[i].to), some = least(kTileRows, rows - r);
      if (low >= high) continue;
      const int64_t block = r * m.key_stride + low;
      multiply_tile<false>(some, high - low, a.H, m.q + r * m.stride, m.stride, m.turned + low, m.key_stride,
                           m.weights + block, m.key_stride);
      multiply_tile<false>(some, high - low, a.H, m.g + r * m.stride, m.stride, m.turned_values + low, m.key_stride,
                           m.ds + block, m.key_stride);
    }
  for (int64_t r = 0; r < rows; ++r) {
    const Columns& of_row = columns[r / kTileRows];
    float *weights = m.weights + r * m.key_stride, *ds = m.ds + r * m.key_stride;
    std::memset(weights, 0, 4 * of_row.from);
    std::memset(weights + of_row.to, 0, 4 * (wide - of_row.to));
    std::memset(ds, 0, 4 * of_row.from);
    std::memset(ds + of_row.to, 0, 4 * (wide - of_row.to));
    (of_row.masked ? weigh<true> : weigh<false>)(weights, ds, of_row, scale, Hidden(m.places, row + r), s,
                                                 m.segments, m.normalizers[row + r], m.inner[row + r]);
  }
  for (int64_t h = 0; h < filled; h += kTileColumns) {
    const int64_t some = least(kTileColumns, filled - h);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t r = i * kTileRows, low = columns[i].from;
      if (low == columns[i].to) continue;
      multiply_tile<true>(least(kTileRows, rows - r), some, columns[i].to - low, m.ds + r * m.key_stride + low,
                          m.key_stride, m.keys + low * m.stride + h, m.stride, m.dq + (row + r) * m.stride + h,
                          m.stride);
    }
    for (int64_t c = 0; c < keys; c += kTileRows) {  // here the keys are the rows of register tiles
      const int64_t count = least(kTileRows, keys - c);
      int64_t low = rows, high = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        if (columns[i].from >= c + count || columns[i].to <= c) continue;
        low = least(low, i * kTileRows);
        high = least(rows, (i + 1) * kTileRows);
      }
      if (low >= high) continue;
      const int64_t block = low * m.key_stride + c, at = low * m.stride + h, to = c * m.stride + h;
      multiply_tile<true, true>(count, some, high - low, m.weights + block, m.key_stride, m.g + at, m.stride,
                                m.dv + to, m.stride);
      multiply_tile<true, true>(count, some, high - low, m.ds + block, m.key_stride, m.q + at, m.stride, m.dk + to,
                                m.stride);
    }
  }
}

void await(const std::atomic<int>& done, int turn) {
  while (done.load(std::memory_order_acquire) != turn) std::this_thread::yield();
}

// The blocks of keys [first, last) of a key-value head. dq is written when it is this one's turn, of `done` chunks.
void attend_back_keys(const Gradients& d, int64_t b, int64_t kv, int64_t first, int64_t last, int turn,
                      std::atomic<int>& done) {
  const Attention& a = d.attention;
  const int64_t filled = a.filled(), all = a.rows();
  auto m = arrays<For::kBackward, BackwardArrays>(all, filled);
  m.places.fill(a, b, 0, all);
  for (int64_t r = 0; r < all; ++r) {
    const int64_t at = a.at(b, kv, r);
    if (r + kAhead < all) {
      prefetch({d.g, false}, a.at(b, kv, r + kAhead), a.H);
      prefetch({a.out, false}, a.at(b, kv, r + kAhead), a.H);
    }
    float total = 0;
    int64_t h = 0;
    Floats part = {};
    for (; h + kWidth <= a.H; h += kWidth) part += load_floats(d.g + at + h) * load_floats(a.out + at + h);
    for (; h < a.H; ++h) total += d.g[at + h] * a.out[at + h];
    m.inner[r] = total + sum(part);
    m.normalizers[r] = a.normalizers[a.normalizer_at(b, kv, r)];
    std::memset(m.dq + r * m.stride, 0, 4 * filled);
  }
  for (int64_t block = first; block < last; ++block) {
    const int64_t s = block * kBackwardKeys, keys = least(kBackwardKeys, a.S - s), wide = ceiling(keys, kWidth) * kWidth;
    std::memset(m.segments, 0, 4 * kBackwardKeys);
    if (a.segments) std::memcpy(m.segments, a.key_segments + b * a.S + s, 4 * keys);
    const Range segments(m.segments, keys);
    read_keys(a, a.v, b, kv, s, keys, m.keys, m.stride);
    transpose(m.keys, m.stride, wide, filled, m.turned_values, m.key_stride);
    read_keys(a, a.k, b, kv, s, keys, m.keys, m.stride);
    transpose(m.keys, m.stride, wide, filled, m.turned, m.key_stride);
    std::memset(m.dk, 0, 4 * keys * m.stride);
    std::memset(m.dv, 0, 4 * keys * m.stride);
    for (int64_t row = 0; row < all; row += kBackwardRows)
      attend_back_block(d, m, b, kv, s, keys, segments, row, least(kBackwardRows, all - row));
    for (int64_t i = 0; i < keys; ++i) {
      write_row(d.dk, a.key_at(b, kv, s + i), a.H, m.dk + i * m.stride, a.scale());
      write_row(d.dv, a.key_at(b, kv, s + i), a.H, m.dv + i * m.stride, 1);
    }
  }
  await(done, turn);
  float* sums = static_cast<float*>(const_cast<void*>(d.dq.data));
  for (int64_t r = 0; r < all; ++r) {
    const int64_t at = a.at(b, kv, r);
    if (turn == 0) {
      write_row(d.dq, at, a.H, m.dq + r * m.stride, a.scale());
    } else if (m.places.last[r] >= first * kBackwardKeys) {
      for (int64_t h = 0; h < a.H; ++h) sums[at + h] += a.scale() * m.dq[r * m.stride + h];
    }
  }
  done.store(turn + 1, std::memory_order_release);
}

void attend_back(const Gradients& d, const Pool& pool) {
  const Attention& a = d.attention;
  if (a.B * a.T * a.N * a.H == 0) {
    for (const Array& each : {d.dk, d.dv})
      std::memset(const_cast<void*>(each.data), 0, a.B * a.S * a.K * a.H * (each.is_bfloat16 ? 2 : 4));
    return;
  }
  const int64_t blocks = ceiling(a.S, kBackwardKeys), heads = a.B * a.K, chunks = d.chunks;
  const std::unique_ptr<std::atomic<int>[]> done(new std::atomic<int>[heads]());
  // The last keys, which the fewest rows see, come first, so that no chunk waits long for its turn. It is never for a
  // chunk that has not begun: tasks are begun in order.
  Team::run(pool, heads * chunks, [&](int64_t i) {
    const int64_t head = i % heads, turn = i / heads, chunk = chunks - 1 - turn;
    try {
      attend_back_keys(d, head / a.K, head % a.K, chunk * blocks / chunks, (chunk + 1) * blocks / chunks, int(turn),
                       done[head]);
    } catch (...) {  // the others do not wait for it for ever
      await(done[head], int(turn));
      done[head].store(int(turn) + 1, std::memory_order_release);
      throw;
    }
  });
}

}  // namespace
}  // namespace efflm
