// Attention, forward, backward and over a cache, against plain loops in double.
#include <errno.h>
#include <stdlib.h>

#include "checks.h"

std::atomic<bool> memory_is_full{false};
int allocate(void** memory, size_t alignment, size_t size) {
  return memory_is_full ? ENOMEM : posix_memalign(memory, alignment, size);
}
#define posix_memalign allocate

#include "attention_backward.h"
#include "attention_forward.h"
#include "decode.h"

namespace {

Block<float> draw(Random& random, int64_t size) {
  Block<float> out(size);
  for (int64_t i = 0; i < size; ++i) out[i] = random.normal();
  return out;
}

void near(double found, double wanted, const char* what) {
  require(std::fabs(found - wanted) <= 1e-4 * (1 + std::fabs(wanted)),
          std::string(what) + " is " + std::to_string(found) + ", not " + std::to_string(wanted));
}

struct Drawn {
  int64_t B, T, S, N, K, H, window;
  Block<float> q, k, v;
  Block<int32_t> slots, segments, key_segments;

  bool sees(int64_t b, int64_t t, int64_t s) const {
    const int64_t slot = slots.size ? slots.data[b * T + t] : S - T + t;
    return s <= slot && (!window || s > slot - window) &&
           (!segments.size || segments.data[b * T + t] == key_segments.data[b * S + s]);
  }

  // The share of each key [S] in the output of one query head.
  std::vector<double> shares(int64_t b, int64_t t, int64_t n) const {
    std::vector<double> out(S);
    double top = -1e300, total = 0;
    for (int64_t s = 0; s < S; ++s) {
      if (!sees(b, t, s)) continue;
      double score = 0;
      for (int64_t h = 0; h < H; ++h) score += double(q.data[q_at(b, t, n) + h]) * k.data[k_at(b, s, n) + h];
      out[s] = score / std::sqrt(double(H));
      top = std::max(top, out[s]);
    }
    for (int64_t s = 0; s < S; ++s) total += out[s] = sees(b, t, s) ? std::exp(out[s] - top) : 0;
    for (double& share : out) share /= total;
    return out;
  }
  int64_t q_at(int64_t b, int64_t t, int64_t n) const { return ((b * T + t) * N + n) * H; }
  int64_t k_at(int64_t b, int64_t s, int64_t n) const { return ((b * S + s) * K + n / (N / K)) * H; }
};

Drawn draw_attention(Random& random) {
  const int64_t B = random.from(1, 2), T = random.of<int64_t>({1, 2, 7, 65, 130}), K = random.from(1, 2);
  const int64_t S = T + random.of<int64_t>({0, 0, 3, 100}), N = K * random.from(1, 3);
  const int64_t H = random.of<int64_t>({1, 4, 16, 24, 33}), window = random.of<int64_t>({0, 0, 1, 40});
  Drawn d{B, T, S, N, K, H, window, draw(random, B * T * N * H), draw(random, B * S * K * H),
          draw(random, B * S * K * H), Block<int32_t>(random.coin() ? B * T : 0), Block<int32_t>(0), Block<int32_t>(0)};
  for (int64_t i = 0; i < d.slots.size; ++i) d.slots[i] = int32_t(random.from(i % T, S - 1));
  if (!d.slots.size && random.coin()) {  // each query sees its own key at least
    d.segments = Block<int32_t>(B * T);
    d.key_segments = Block<int32_t>(B * S);
    for (int64_t i = 0; i < B * S; ++i) d.key_segments[i] = int32_t(i % S / 9);
    for (int64_t i = 0; i < B * T; ++i) d.segments[i] = d.key_segments[i / T * S + S - T + i % T];
  }
  return d;
}

void check_attention(Random& random, const Pool& pool) {
  Drawn d = draw_attention(random);
  const int64_t queries = d.B * d.T * d.N * d.H, keys = d.B * d.S * d.K * d.H;
  Block<float> out(queries), normalizers(d.B * d.N * d.T), g = draw(random, queries);
  Block<float> dq(queries), dk(keys), dv(keys);
  const auto some = [](Block<int32_t>& block) { return block.size ? block.get() : nullptr; };
  Attention a{d.B, d.T, d.S, d.N, d.K, d.H, d.window, {d.q.get(), false}, {d.k.get(), false}, {d.v.get(), false},
              some(d.slots), some(d.segments), some(d.key_segments), out.get(), normalizers.get()};
  attend(a, pool);
  attend_back({a, g.get(), random.from(1, 2), {dq.get(), false}, {dk.get(), false}, {dv.get(), false}}, pool);
  std::vector<double> wanted_q(queries), wanted_k(keys), wanted_v(keys);
  for (int64_t b = 0; b < d.B; ++b)
    for (int64_t t = 0; t < d.T; ++t)
      for (int64_t n = 0; n < d.N; ++n) {
        const std::vector<double> shares = d.shares(b, t, n);
        const int64_t at = d.q_at(b, t, n);
        double inner = 0;
        for (int64_t h = 0; h < d.H; ++h) {
          double mixed = 0;
          for (int64_t s = 0; s < d.S; ++s) mixed += shares[s] * d.v[d.k_at(b, s, n) + h];
          near(out[at + h], mixed, "attention");
          inner += mixed * g[at + h];
        }
        for (int64_t s = 0; s < d.S; ++s) {
          const int64_t key = d.k_at(b, s, n);
          double slope = 0;
          for (int64_t h = 0; h < d.H; ++h) slope += double(g[at + h]) * d.v[key + h];
          slope = shares[s] * (slope - inner) / std::sqrt(double(d.H));
          for (int64_t h = 0; h < d.H; ++h) {
            wanted_v[key + h] += shares[s] * g[at + h];
            wanted_k[key + h] += slope * d.q[at + h];
            wanted_q[at + h] += slope * d.k[key + h];
          }
        }
      }
  for (int64_t i = 0; i < queries; ++i) near(dq[i], wanted_q[i], "dq");
  for (int64_t i = 0; i < keys; ++i) near(dk[i], wanted_k[i], "dk"), near(dv[i], wanted_v[i], "dv");
}

// A few new tokens a sequence, one after another at their slots of a cache, without rotation.
void check_decode(Random& random, const Pool& pool) {
  Drawn d = draw_attention(random);
  const int64_t S = d.S * random.of<int64_t>({1, 3}), T = random.from(1, least(S, 5)), rows = d.B * T, size = d.K * d.H;
  Block<float> keys = draw(random, d.B * S * size), values = draw(random, d.B * S * size);
  Drawn all{d.B, T, S, d.N, d.K, d.H, d.window, draw(random, rows * d.N * d.H), draw(random, d.B * S * size),
            draw(random, d.B * S * size), Block<int32_t>(rows), Block<int32_t>(0), Block<int32_t>(0)};
  Block<float> new_keys = draw(random, rows * size), new_values = draw(random, rows * size);
  Block<float> none(0), out(rows * d.N * d.H);
  for (int64_t b = 0; b < d.B; ++b) {
    const int64_t first = random.of<int64_t>({random.from(0, S - T), random.from(0, S - T), S - T + 1, S + 1, -2});
    for (int64_t t = 0; t < T; ++t) all.slots[b * T + t] = int32_t(first + t);
  }
  std::copy(all.k.get(), all.k.get() + keys.size, keys.get());
  std::copy(all.v.get(), all.v.get() + keys.size, values.get());
  decode(Decode<float>{rows, T, S, d.N, d.K, d.H, 0, d.window, all.q.get(), new_keys.get(), new_values.get(),
                       none.get(), none.get(), all.slots.get(), keys.get(), values.get(), out.get()},
         pool);
  for (int64_t b = 0; b < d.B; ++b) {  // positions beyond the cache are moved into it
    const int64_t first = least(std::max(0, all.slots[b * T]), S - T);
    for (int64_t t = 0; t < T; ++t) all.slots[b * T + t] = int32_t(first + t);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = (row / T * S + all.slots[row]) * size + i;
      all.k[at] = new_keys[row * size + i];
      all.v[at] = new_values[row * size + i];
    }
  for (int64_t i = 0; i < keys.size; ++i) require(keys[i] == all.k[i] && values[i] == all.v[i], "the cache differs");
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < d.N; ++n) {
      const int64_t b = row / T, t = row % T;
      const std::vector<double> shares = all.shares(b, t, n);
      for (int64_t h = 0; h < d.H; ++h) {
        double mixed = 0;
        for (int64_t s = 0; s < S; ++s) mixed += shares[s] * all.v[all.k_at(b, s, n) + h];
        near(out[all.q_at(b, t, n) + h], mixed, "decode");
      }
    }
}

// Without memory nothing waits for a chunk that was not computed.
void check_no_memory(const Pool& pool) {
  Block<float> q(200), k(400), out(200), normalizers(100), g(200), dq(200), dk(400), dv(400);
  Attention a{1, 100, 200, 1, 1, 2, 0, {q.get(), false}, {k.get(), false}, {k.get(), false},
              nullptr, nullptr, nullptr, out.get(), normalizers.get()};
  bool thrown = false;
  memory_is_full = true;
  try {
    attend_back({a, g.get(), 2, {dq.get(), false}, {dk.get(), false}, {dv.get(), false}}, pool);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  memory_is_full = false;
  require(thrown, "attention: computes without memory");
}

}  // namespace

int main() {
  Random random;
  Threads threads(2);
  std::thread([] { check_no_memory(Pool{}); }).join();
  std::thread([&] { check_no_memory(threads.pool(3)); }).join();
  for (int64_t i = 0; i < 120; ++i)
    std::thread([&] {
      const Pool pool = i % 4 ? Pool{} : threads.pool(3);
      i % 2 ? check_attention(random, pool) : check_decode(random, pool);
    }).join();
}
