// Attention of many queries and its gradients, in blocks that stay in the cache (FlashAttention, Dao 2022, arXiv
// 2205.14135). Scores are held as [keys, queries]: so every product reads keys and values as they lie, and the softmax
// runs over rows without a sum inside a vector. All sums are float32.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"
#include "team.h"

namespace efflm {
namespace {

// q and out [batch, queries, heads, size]; k and v [batch, keys, kv_heads, size]; normalizer [batch, heads, queries],
// the logarithm of each query's sum of exp(score). Query t sees the keys up to slots[b, t] (null: the queries are the
// last of the keys), of these the last `window` (0: all) and those whose segment is its own (null: all).
template <typename Cell>
struct Attention {
  int64_t batch, queries, keys, heads, kv_heads, size, window;
  const Cell *q, *k, *v;
  const int32_t *slots = nullptr, *segments = nullptr, *key_segments = nullptr;
  float *out, *normalizer;
  // Of the backward pass, which reads `out` and `normalizer`.
  const float* gradient = nullptr;
  Cell *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

constexpr int64_t kKeys = 96;  // in a block: a multiple of every tile's rows
constexpr float kMasked = -1e30f;
constexpr int64_t kMostTasks = 16;  // into which gradients of few sequences and heads are split by keys

// A block of queries of one sequence that read one key-value head, filled up to a multiple of a vector: column c is of
// query first + c / group, head kv_head * group + c % group. Columns beyond see no key.
template <typename Cell>
struct Block {
  const Attention<Cell>& a;
  int64_t b, kv_head, first, count, columns, group;
  int32_t* slots;     // [columns]
  int32_t* segments;  // [columns]
  int32_t lowest, highest;  // slot of all real columns

  Block(const Attention<Cell>& a, int64_t b, int64_t kv_head, int64_t first, int64_t end, int32_t* room)
      : a(a), b(b), kv_head(kv_head), first(first), group(a.heads / a.kv_heads) {
    count = (end - first) * group;
    columns = ceiling(count, kWidth) * kWidth;
    slots = room;
    segments = room + columns;
    lowest = std::numeric_limits<int32_t>::max();
    highest = -1;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t t = first + c / group;
      const int32_t slot = c < count ? (a.slots ? a.slots[b * a.queries + t] : int32_t(a.keys - a.queries + t)) : -1;
      slots[c] = slot;
      segments[c] = c < count && a.segments ? a.segments[b * a.queries + t] : 0;
      if (c < count) {
        lowest = slot < lowest ? slot : lowest;
        highest = slot > highest ? slot : highest;
      }
    }
  }

  int64_t query(int64_t c) const { return first + c / group; }
  int64_t head(int64_t c) const { return kv_head * group + c % group; }
  int64_t at(int64_t c) const { return ((b * a.queries + query(c)) * a.heads + head(c)) * a.size; }
  int64_t normalizer_at(int64_t c) const { return (b * a.heads + head(c)) * a.queries + query(c); }

  // The keys that some query may see.
  int64_t first_key() const {
    const int64_t key = a.window ? int64_t(lowest) - a.window + 1 : 0;
    return key > 0 ? key : 0;
  }
  int64_t end_key() const { return least(int64_t(highest) + 1, a.keys); }

  // kMasked in place of the scores [count, columns] of keys from `key` on that a query may not see.
  void mask(int64_t key, int64_t keys, float* scores) const {
    const bool causal = key + keys - 1 > lowest || count < columns;
    const bool windowed = a.window && key <= highest - a.window;
    if (!causal && !windowed && !a.segments) return;
    for (int64_t s = 0; s < keys; ++s) {
      const Ints here = splat(int32_t(key + s));
      const Ints segment = splat(a.key_segments ? a.key_segments[b * a.keys + key + s] : 0);
      for (int64_t c = 0; c < columns; c += kWidth) {
        const Ints slot = load<Ints>(slots + c);
        Ints hidden = here > slot;
        if (a.window) hidden |= here <= slot - splat(int32_t(a.window));
        if (a.segments) hidden |= segment != load<Ints>(segments + c);
        float* score = scores + s * columns + c;
        store(score, hidden ? splat(kMasked) : load_floats(score));
      }
    }
  }
};

// Keys or values [count, size] of one head as floats, rows `*stride` apart: where they lie, or converted into `room`.
EFFLM_INLINE const float* rows_of_head(const float* x, int64_t, int64_t, int64_t from, float*, int64_t* stride) {
  *stride = from;
  return x;
}

const float* rows_of_head(const uint16_t* x, int64_t count, int64_t size, int64_t from, float* room, int64_t* stride) {
  for (int64_t s = 0; s < count; ++s) {
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(room + s * size + i, load_floats(x + s * from + i));
    for (; i < size; ++i) room[s * size + i] = from_bfloat16(x[s * from + i]);
  }
  *stride = size;
  return room;
}

EFFLM_INLINE void put_cell(float* to, float x) { *to = x; }
EFFLM_INLINE void put_cell(uint16_t* to, float x) { *to = to_bfloat16(x); }

int64_t block_queries(int64_t group) {  // so that a block has about 96 columns
  const int64_t some = 96 / group;
  return some > 1 ? some : 1;
}

template <typename Cell>
void attend_block(const Attention<Cell>& a, int64_t b, int64_t kv_head, int64_t first, int64_t end) {
  const int64_t H = a.size, most = ceiling((end - first) * (a.heads / a.kv_heads), kWidth) * kWidth;
  const Block<Cell> block(a, b, kv_head, first, end, scratch<int32_t, 20>(2 * most));
  const int64_t C = block.columns, step = a.kv_heads * H;
  float* q = scratch<float, 20>(H * C);  // [H, C]
  float* scores = scratch<float, 21>(kKeys * C);
  float* out = scratch<float, 22>(H * C);  // [H, C]
  float* tops = scratch<float, 23>(3 * C);
  float *totals = tops + C, *factors = tops + 2 * C;
  float* room = scratch<float, 24>(kKeys * H);
  const float factor = 1 / std::sqrt(float(H));
  for (int64_t c = 0; c < C; ++c) {
    const Cell* from = a.q + block.at(c < block.count ? c : 0);
    for (int64_t h = 0; h < H; ++h) q[h * C + c] = c < block.count ? load_float(from + h) * factor : 0;
    tops[c] = kMasked;
    totals[c] = 0;
  }
  std::memset(out, 0, 4 * H * C);
  for (int64_t key = block.first_key(); key < block.end_key(); key += kKeys) {
    const int64_t count = least(kKeys, block.end_key() - key), at = (b * a.keys + key) * step + kv_head * H;
    int64_t stride;
    const float* keys = rows_of_head(a.k + at, count, H, step, room, &stride);
    multiply<false>(count, C, H, keys, stride, q, C, scores, C);
    block.mask(key, count, scores);
    for (int64_t c = 0; c < C; c += kWidth) {
      const Floats before = load_floats(tops + c);
      Floats top = before, total = {};
      for (int64_t s = 0; s < count; ++s) {
        const Floats score = load_floats(scores + s * C + c);
        top = score > top ? score : top;
      }
      for (int64_t s = 0; s < count; ++s) {
        const Floats weight = exponential(load_floats(scores + s * C + c) - top);
        store(scores + s * C + c, weight);
        total += weight;
      }
      const Floats scale = exponential(before - top);
      store(tops + c, top);
      store(totals + c, load_floats(totals + c) * scale + total);
      store(factors + c, scale);
    }
    for (int64_t h = 0; h < H; ++h)
      for (int64_t c = 0; c < C; c += kWidth)
        store(out + h * C + c, load_floats(out + h * C + c) * load_floats(factors + c));
    const float* values = rows_of_head(a.v + at, count, H, step, room, &stride);
    multiply<true, true>(H, C, count, values, stride, scores, C, out, C);
  }
  for (int64_t c = 0; c < block.count; ++c) {
    float* to = a.out + block.at(c);
    const float share = totals[c] != 0 ? 1 / totals[c] : 0;  // no key was looked at
    for (int64_t h = 0; h < H; ++h) to[h] = out[h * C + c] * share;
    a.normalizer[block.normalizer_at(c)] = tops[c] + (totals[c] != 0 ? std::log(totals[c]) : 0);
  }
}

template <typename Cell>
void attend(const Attention<Cell>& a, const Pool& pool) {
  const int64_t some = block_queries(a.heads / a.kv_heads), blocks = ceiling(a.queries, some);
  Team::run(pool, a.batch * a.kv_heads * blocks, [&](int64_t i) {
    const int64_t block = blocks - 1 - i / (a.batch * a.kv_heads);  // the longest first
    const int64_t row = i % (a.batch * a.kv_heads), first = block * some;
    attend_block(a, row / a.kv_heads, row % a.kv_heads, first, least(first + some, a.queries));
  });
}

// The gradients that the keys [from, to) of one head take part in: of their own, and of all queries, added to dq
// [queries * group, wide].
template <typename Cell>
void gradients(const Attention<Cell>& a, int64_t b, int64_t kv_head, int64_t from, int64_t to, float* dq) {
  const int64_t H = a.size, wide = ceiling(H, kWidth) * kWidth, group = a.heads / a.kv_heads;
  const int64_t some = block_queries(group), most = ceiling(some * group, kWidth) * kWidth, step = a.kv_heads * H;
  float* dk = scratch<float, 30>((to - from) * wide);
  float* dv = scratch<float, 31>((to - from) * wide);
  std::memset(dk, 0, 4 * (to - from) * wide);
  std::memset(dv, 0, 4 * (to - from) * wide);
  float *q = scratch<float, 32>(H * most), *g = scratch<float, 33>(H * most);                      // [H, C]
  float *q_rows = scratch<float, 34>(most * wide), *g_rows = scratch<float, 35>(most * wide);      // [C, wide]
  float *weights = scratch<float, 36>(kKeys * most), *scores = scratch<float, 37>(kKeys * most);   // [keys, C]
  float* dq_block = scratch<float, 38>(H * most);                                                  // [H, C]
  float *normalizers = scratch<float, 39>(2 * most), *inner = normalizers + most;
  float *key_room = scratch<float, 40>(kKeys * H), *value_room = scratch<float, 41>(kKeys * H);
  const float factor = 1 / std::sqrt(float(H));
  for (int64_t first = 0; first < a.queries; first += some) {
    const Block<Cell> block(a, b, kv_head, first, least(first + some, a.queries), scratch<int32_t, 30>(2 * most));
    const int64_t C = block.columns;
    const int64_t begin = block.first_key() > from ? from + (block.first_key() - from) / kKeys * kKeys : from;
    const int64_t end = least(block.end_key(), to);
    if (begin >= end) continue;
    for (int64_t c = 0; c < C; ++c) {
      const bool real = c < block.count;
      const int64_t at = block.at(real ? c : 0);
      float total = 0;
      for (int64_t h = 0; h < wide; ++h) {
        const float query = real && h < H ? load_float(a.q + at + h) : 0, slope = real && h < H ? a.gradient[at + h] : 0;
        q_rows[c * wide + h] = query;
        g_rows[c * wide + h] = slope;
        if (h >= H) continue;
        q[h * C + c] = query * factor;
        g[h * C + c] = slope;
        if (real) total += slope * a.out[at + h];
      }
      inner[c] = total;
      normalizers[c] = real ? a.normalizer[block.normalizer_at(c)] : 0;
    }
    std::memset(dq_block, 0, 4 * H * C);
    for (int64_t key = begin; key < end; key += kKeys) {
      const int64_t count = least(kKeys, end - key), at = (b * a.keys + key) * step + kv_head * H;
      int64_t key_stride, value_stride;
      const float* keys = rows_of_head(a.k + at, count, H, step, key_room, &key_stride);
      const float* values = rows_of_head(a.v + at, count, H, step, value_room, &value_stride);
      multiply<false>(count, C, H, keys, key_stride, q, C, weights, C);
      block.mask(key, count, weights);
      multiply<false>(count, C, H, values, value_stride, g, C, scores, C);
      for (int64_t s = 0; s < count; ++s)
        for (int64_t c = 0; c < C; c += kWidth) {
          const Floats weight = exponential(load_floats(weights + s * C + c) - load_floats(normalizers + c));
          store(weights + s * C + c, weight);
          const Floats slope = weight * (load_floats(scores + s * C + c) - load_floats(inner + c)) * factor;
          store(scores + s * C + c, slope);
        }
      multiply<true>(count, wide, C, weights, C, g_rows, wide, dv + (key - from) * wide, wide);
      multiply<true>(count, wide, C, scores, C, q_rows, wide, dk + (key - from) * wide, wide);
      multiply<true, true>(H, C, count, keys, key_stride, scores, C, dq_block, C);
    }
    for (int64_t c = 0; c < block.count; ++c)
      for (int64_t h = 0; h < H; ++h) dq[(first * group + c) * wide + h] += dq_block[h * C + c];
  }
  for (int64_t s = from; s < to; ++s)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = (b * a.keys + s) * step + kv_head * H + h;
      put_cell(a.dk + at, dk[(s - from) * wide + h]);
      put_cell(a.dv + at, dv[(s - from) * wide + h]);
    }
}

template <typename Cell>
void attend_backward(const Attention<Cell>& a, const Pool& pool) {
  const int64_t group = a.heads / a.kv_heads, wide = ceiling(a.size, kWidth) * kWidth, pairs = a.batch * a.kv_heads;
  // By shape alone, so that the order of the sums, and with it the result, does not depend on the number of threads.
  const int64_t wanted = least(ceiling(kMostTasks, pairs), ceiling(a.keys, 2 * kKeys));
  const int64_t each = ceiling(ceiling(a.keys, wanted > 0 ? wanted : 1), kKeys) * kKeys, parts = ceiling(a.keys, each);
  const int64_t size = a.queries * group * wide;
  float* dq = scratch<float, 42>(pairs * parts * size);
  Team::run(pool, pairs * parts, [&](int64_t i) {
    const int64_t pair = i / parts, from = i % parts * each;
    std::memset(dq + i * size, 0, 4 * size);
    gradients(a, pair / a.kv_heads, pair % a.kv_heads, from, least(from + each, a.keys), dq + i * size);
  });
  Team::run(pool, a.batch * a.queries, [&](int64_t i) {
    const int64_t b = i / a.queries, t = i % a.queries;
    for (int64_t n = 0; n < a.heads; ++n) {
      const float* from = dq + (b * a.kv_heads + n / group) * parts * size + (t * group + n % group) * wide;
      for (int64_t h = 0; h < a.size; ++h) {
        float total = from[h];
        for (int64_t part = 1; part < parts; ++part) total += from[part * size + h];
        put_cell(a.dq + (i * a.heads + n) * a.size + h, total);
      }
    }
  });
}

}  // namespace
}  // namespace efflm
