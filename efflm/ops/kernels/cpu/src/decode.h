// Attention of a few new tokens a sequence over its KV cache, which is written on the way.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"
#include "team.h"

namespace efflm {
namespace {

// Of rows, `tokens` of each sequence: queries [rows, heads, size], new keys and values [rows, kv_heads, size], float32,
// rotated here by `cosines` and `sines` [rows, rotated / 2] where rotated > 0. The caches [sequences, slots, kv_heads,
// size] hold `Cell`s; row r has a new entry at slot positions[r] of its sequence and sees the slots up to that one, the
// last `window` of them (0: all). The positions of a sequence are consecutive; all are moved into the cache where they
// are not, as lax.dynamic_update_slice does. tokens <= slots.
template <typename Cell>
struct Decode {
  int64_t rows, tokens, slots, heads, kv_heads, size, rotated, window;
  const float *queries, *new_keys, *new_values, *cosines, *sines;
  const int32_t* positions;
  Cell *keys, *values;
  float* out;
  bool to_bfloat16 = false;  // rounds queries, keys and values, as products in bfloat16 do

  int64_t position(int64_t row) const {
    const int64_t token = row % tokens, first = positions[row - token];
    return (first < 0 ? 0 : least(first, slots - tokens)) + token;
  }
  // The first number of a key or value in a cache.
  int64_t at(int64_t row, int64_t slot, int64_t k) const {
    return ((row / tokens * slots + slot) * kv_heads + k) * size;
  }
};

constexpr int64_t kChunk = 256;           // keys of one task
constexpr int64_t kWorthSharing = 60000;  // products of numbers, below which one thread is as fast

EFFLM_INLINE void put(float* to, float x) { *to = x; }
EFFLM_INLINE void put(uint16_t* to, float x) { *to = to_bfloat16(x); }

// One head, rotated (see ops/rotary.py), into `out`.
void rotate(const float* x, const float* cosines, const float* sines, int64_t rotated, int64_t size, bool rounded,
            float* out) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
    out[i + half] = x[i + half] * cosines[i] + x[i] * sines[i];
  }
  for (int64_t i = rotated; i < size; ++i) out[i] = x[i];
  for (int64_t i = 0; rounded && i < size; ++i) out[i] = from_bfloat16(to_bfloat16(out[i]));
}

template <typename Cell>
EFFLM_INLINE float inner(const float* q, const Cell* k, int64_t size) {
  Floats first = {}, second = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
    first += load_floats(q + i) * load_floats(k + i);
    second += load_floats(q + i + kWidth) * load_floats(k + i + kWidth);
  }
  for (; i + kWidth <= size; i += kWidth) first += load_floats(q + i) * load_floats(k + i);
  float total = sum(first + second);
  for (; i < size; ++i) total += q[i] * load_float(k + i);
  return total;
}

// out [size] = sum over `count` keys of weights[key] * values[key], values `stride` apart.
template <typename Cell>
EFFLM_INLINE void mix(const float* weights, const Cell* values, int64_t stride, int64_t count, int64_t size,
                      float* out) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
    Floats total[4] = {};
    for (int64_t s = 0; s < count; ++s) {
      const Floats weight = splat(weights[s]);
      for (int c = 0; c < 4; ++c) total[c] += weight * load_floats(values + s * stride + i + c * kWidth);
    }
    for (int c = 0; c < 4; ++c) store(out + i + c * kWidth, total[c]);
  }
  for (; i + kWidth <= size; i += kWidth) {
    Floats total = {};
    for (int64_t s = 0; s < count; ++s) total += splat(weights[s]) * load_floats(values + s * stride + i);
    store(out + i, total);
  }
  for (; i < size; ++i) {
    float total = 0;
    for (int64_t s = 0; s < count; ++s) total += weights[s] * load_float(values + s * stride + i);
    out[i] = total;
  }
}

template <typename Cell>
void decode(const Decode<Cell>& d, const Pool& pool) {
  const int64_t N = d.heads, K = d.kv_heads, H = d.size, group = N / K;
  const float factor = 1 / std::sqrt(float(H));
  float* queries = scratch<float, For::kQueries>(d.rows * N * H);
  float* turned = scratch<float, For::kTurned>(H);
  int64_t most = 0, work = 0;
  for (int64_t r = 0; r < d.rows; ++r) {
    const float* cosines = d.cosines + r * (d.rotated / 2);
    const float* sines = d.sines + r * (d.rotated / 2);
    for (int64_t n = 0; n < N; ++n) {
      float* q = queries + (r * N + n) * H;
      rotate(d.queries + (r * N + n) * H, cosines, sines, d.rotated, H, d.to_bfloat16, q);
    }
    const int64_t position = d.position(r);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = d.at(r, position, k);
      rotate(d.new_keys + (r * K + k) * H, cosines, sines, d.rotated, H, d.to_bfloat16, turned);
      for (int64_t i = 0; i < H; ++i) put(d.keys + at + i, turned[i]);
      rotate(d.new_values + (r * K + k) * H, cosines, sines, 0, H, d.to_bfloat16, turned);
      for (int64_t i = 0; i < H; ++i) put(d.values + at + i, turned[i]);
    }
    const int64_t seen = d.window && d.window < position + 1 ? d.window : position + 1;
    most = seen > most ? seen : most;
    work += seen * N * H;
  }
  // Each task: of some keys the sums of exp(score - top) v and of exp(score - top), and top.
  const int64_t chunks = ceiling(most, kChunk), cells = H + 2;
  float* parts = scratch<float, For::kDecoded>(d.rows * K * chunks * group * cells);
  const Pool alone;
  Team::run(work < kWorthSharing ? alone : pool, d.rows * K * chunks, [&](int64_t task) {
    const int64_t r = task / (K * chunks), k = task / chunks % K, chunk = task % chunks;
    const int64_t end = d.position(r) + 1;
    const int64_t begin = d.window && d.window < end ? end - d.window : 0;
    const int64_t from = begin + chunk * kChunk, to = least(from + kChunk, end);
    alignas(64) float scores[kChunk];
    for (int64_t g = 0; g < group; ++g) {
      float* part = parts + (task * group + g) * cells;
      part[H] = 0;
      part[H + 1] = -std::numeric_limits<float>::infinity();
      if (from >= to) continue;
      const int64_t first = d.at(r, from, k), count = to - from;
      const float* q = queries + (r * N + k * group + g) * H;
      float top = -std::numeric_limits<float>::infinity();
      for (int64_t s = 0; s < count; ++s) {
        scores[s] = inner(q, d.keys + first + s * K * H, H) * factor;
        top = scores[s] > top ? scores[s] : top;
      }
      if (top == -std::numeric_limits<float>::infinity()) top = 0;  // every score is NaN or -infinity
      float total = 0;
      for (int64_t s = 0; s < count; s += kWidth) {
        Floats each = s + kWidth <= count ? load_floats(scores + s) : splat(-std::numeric_limits<float>::infinity());
        for (int64_t i = 0; s + kWidth > count && s + i < count; ++i) each[i] = scores[s + i];
        const Floats weights = exponential(each - top);
        total += sum(weights);
        store(scores + s, weights);
      }
      mix(scores, d.values + first, K * H, count, H, part);
      part[H] = total;
      part[H + 1] = top;
    }
  });
  for (int64_t row = 0; row < d.rows * N; ++row) {
    const int64_t r = row / N, k = row % N / group, g = row % group;
    auto part = [&](int64_t chunk) { return parts + (((r * K + k) * chunks + chunk) * group + g) * cells; };
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) top = part(chunk)[H + 1] > top ? part(chunk)[H + 1] : top;
    float* out = d.out + row * H;
    for (int64_t i = 0; i < H; ++i) out[i] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* some = part(chunk);
      if (some[H + 1] == -std::numeric_limits<float>::infinity()) continue;  // no keys
      const float weight = std::exp(some[H + 1] - top);
      total += some[H] * weight;
      for (int64_t i = 0; i < H; ++i) out[i] += some[i] * weight;
    }
    for (int64_t i = 0; i < H; ++i) out[i] /= total;
  }
}

}  // namespace
}  // namespace efflm
