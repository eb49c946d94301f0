// Products of a few rows with dense weights.
#pragma once

#include "read.h"

namespace efflm {
namespace {

// Rows of the weight are outputs: products of whole rows, four outputs at a time.
template <typename W>
void transposed_product(const Rows& rows_of_x, const Product& d, const Pool& pool) {
  const int64_t M = rows_of_x.rows, K = d.weight.inputs, N = d.weight.outputs, blocks = ceiling(N, 4);
  const float* x = read(rows_of_x, d.weight, pool).floats;
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
            for (int i = 0; m == 0 && i < 4; ++i) ask_for(rows[i] + 4 * K + k + h * kWidth);
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

constexpr int64_t kInputs = 8;  // that all rows are multiplied with at a time

// total [M, N] += x [M, count <= 8], its rows K apart, times as many rows of the weight, N columns each.
template <typename W>
EFFLM_INLINE void add_inputs(const float* x, int64_t M, int64_t K, const W* w, int64_t count, int64_t N, float* total) {
  int64_t n = 0;
  if (count == kInputs) {
    for (; n + kWidth <= N; n += kWidth) {
      Floats weights[kInputs];
      for (int64_t i = 0; i < kInputs; ++i) {
        ask_for(w + (kInputs + i) * N + n);
        weights[i] = load_floats(w + i * N + n);
      }
      for (int64_t m = 0; m < M; ++m) {
        const float* from = x + m * K;
        Floats add = load_floats(total + m * N + n), other = {};
        for (int64_t i = 0; i < kInputs; i += 2) {
          add += splat(from[i]) * weights[i];
          other += splat(from[i + 1]) * weights[i + 1];
        }
        store(total + m * N + n, add + other);
      }
    }
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t j = n; j < N; ++j)
      for (int64_t i = 0; i < count; ++i) total[m * N + j] += x[m * K + i] * load_float(w + i * N + j);
}

// Rows of the weight are inputs: each task adds up some inputs for all outputs, reading the weight from end to end; the
// sums of the tasks are added in a fixed order, so that the result does not depend on the number of threads. With
// several rows there are fewer tasks, as the sums of all of them are read again.
template <typename W>
void straight_product(const Rows& rows_of_x, const Product& d, const Pool& pool) {
  const int64_t M = rows_of_x.rows, K = d.weight.inputs, N = d.weight.outputs;
  const float* x = read(rows_of_x, d.weight, pool).floats;
  const W* w = static_cast<const W*>(d.weight.values);
  const int64_t tasks = least(M > 1 ? 8 : 16, ceiling(K, 32)), each = ceiling(ceiling(K, tasks), kInputs) * kInputs;
  float* parts = scratch<float, For::kParts>(tasks * M * N);
  Team::run(pool, tasks, [&](int64_t task) {
    float* total = parts + task * M * N;
    std::memset(total, 0, 4 * M * N);
    const int64_t end = least((task + 1) * each, K);
    for (int64_t k = task * each; k < end; k += kInputs)
      add_inputs(x + k, M, K, w + k * N, least(kInputs, end - k), N, total);
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

}  // namespace
}  // namespace efflm
