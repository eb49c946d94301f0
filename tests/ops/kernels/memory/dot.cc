// efflm::dot in every format. See checks.h.
#include "dot.h"

#include "checks.h"

namespace {

// A weight of `format`, in double [outputs, inputs] and as the kernel reads it.
struct Weight {
  std::vector<double> codes, scales, zeros;  // the last two by group: [groups, outputs]
  Block<uint8_t> bytes{0};
  Block<float> scale{0};
  Block<int8_t> zero{0};
};

Weight draw_weight(Random& random, const Dot& d, int64_t groups, bool with_zeros) {
  const int64_t K = d.inputs, N = d.outputs;
  Weight w;
  w.codes.resize(N * K);
  if (d.format == Format::kFloat32 || d.format == Format::kBfloat16) {
    const bool half = d.format == Format::kBfloat16;
    w.bytes = Block<uint8_t>(N * K * (half ? 2 : 4));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t at = d.transposed ? n * K + k : k * N + n;
        const uint16_t low = to_bfloat16(random.normal());
        const float value = half ? from_bfloat16(low) : random.normal();
        w.codes[n * K + k] = value;
        if (half) {
          std::memcpy(w.bytes.get() + 2 * at, &low, 2);
        } else {
          std::memcpy(w.bytes.get() + 4 * at, &value, 4);
        }
      }
    return w;
  }
  const int bits = d.format == Format::kInt8 ? 8 : 4, half = 1 << (bits - 1), step = bits == 8 ? 4 : 8;
  const int64_t panels = ceiling(N, kPanel), padded = panels * kPanel, steps = ceiling(K, kUnit) * kUnit / step;
  w.bytes = Block<uint8_t>(panels * steps * kPanel * 4);
  w.scale = Block<float>(groups * padded);
  w.zero = Block<int8_t>(with_zeros ? groups * padded : 0);
  w.scales.resize(groups * N);
  w.zeros.resize(groups * N);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t n = 0; n < N; ++n) {
      w.scales[g * N + n] = w.scale[g * padded + n] = 0.01f + std::fabs(random.normal());
      if (with_zeros) w.zeros[g * N + n] = w.zero[g * padded + n] = random.from(-half, half - 1);
    }
  const bool extreme = random.from(0, 3) == 0;
  for (int64_t n = 0; n < padded; ++n)
    for (int64_t k = 0; k < steps * step; ++k) {
      const bool inside = n < N && k < K;
      const int code = !inside ? 0 : extreme ? random.of({-half, half - 1}) : random.from(-half, half - 1);
      if (inside) w.codes[n * K + k] = code;
      uint8_t* word = w.bytes.get() + ((n / kPanel * steps + k / step) * kPanel + n % kPanel) * 4;
      const int i = k % step;
      word[i % 4] |= uint8_t(code + half) << (i < 4 ? 0 : 4);
    }
  return w;
}

void check_dot(Random& random, const Pool& pool) {
  Dot d;
  d.format = random.of({Format::kFloat32, Format::kBfloat16, Format::kInt8, Format::kInt8, Format::kInt4, Format::kInt4});
  const bool quantized = d.format == Format::kInt8 || d.format == Format::kInt4;
  d.transposed = !quantized && random.coin();
  d.round_x = quantized && random.coin();
  d.x_is_bfloat16 = random.coin();
  d.rows = random.of<int64_t>({1, 2, 3, random.from(1, 33), random.from(90, 110)});
  d.inputs = random.of<int64_t>({random.from(1, 20), random.from(1, 150), 64});
  d.outputs = random.of<int64_t>({random.from(1, 40), random.from(1, 150), 32});
  d.group = quantized && random.coin() ? random.of<int64_t>({8, 24, 32}) : 0;
  const int64_t M = d.rows, K = d.inputs, N = d.outputs;
  if (d.group >= K) d.group = 0;
  const int64_t groups = d.group ? ceiling(K, d.group) : 1;
  Weight w = draw_weight(random, d, groups, quantized && random.coin());

  Block<float> floats(d.x_is_bfloat16 ? 0 : M * K), x_scale(d.round_x && random.coin() ? 1 : 0), out(M * N);
  Block<uint16_t> halves(d.x_is_bfloat16 ? M * K : 0);
  std::vector<float> x(M * K);
  const int64_t bad = random.from(0, 3) == 0 ? random.from(0, M - 1) : -1;  // a row with NaN or infinity
  for (int64_t m = 0; m < M; ++m) {
    const float size = random.of({1.0f, 1.0f, 0.0f, 1e-44f, 1e-30f, 1e30f});
    for (int64_t k = 0; k < K; ++k) {
      float value = size * random.normal();
      const float inf = std::numeric_limits<float>::infinity();
      if (m == bad && k == K / 2) value = random.of({std::nanf(""), inf, -inf});
      if (d.x_is_bfloat16) {
        halves[m * K + k] = to_bfloat16(value);
        value = from_bfloat16(halves[m * K + k]);
      } else {
        floats[m * K + k] = value;
      }
      x[m * K + k] = value;
    }
  }
  if (x_scale.size) x_scale[0] = 0.02f;
  d.x = d.x_is_bfloat16 ? static_cast<const void*>(halves.get()) : floats.get();
  d.x_scale = x_scale.size ? x_scale.get() : nullptr;
  d.values = w.bytes.get();
  d.scale = quantized ? w.scale.get() : nullptr;
  d.zeros = w.zero.size ? w.zero.get() : nullptr;
  d.out = out.get();
  dot(d, pool);

  const std::string drawn = "dot format " + std::to_string(int(d.format)) + " transposed " +
                            std::to_string(d.transposed) + " round_x " + std::to_string(d.round_x) + " bfloat16 x " +
                            std::to_string(d.x_is_bfloat16) + " zeros " + std::to_string(w.zero.size) + " group " +
                            std::to_string(d.group) + " M K N " + std::to_string(M) + " " + std::to_string(K) + " " +
                            std::to_string(N);
  for (int64_t m = 0; m < M; ++m) {
    float most = 0;
    for (int64_t k = 0; k < K; ++k) most = std::max(most, std::fabs(x[m * K + k]));
    const float step = x_scale.size ? x_scale[0] : most > 0 && most / 127 > 0 ? most / 127 : 1;
    for (int64_t n = 0; n < N; ++n) {
      double total = 0, sizes = 0;
      for (int64_t k = 0; k < K; ++k) {
        double left = x[m * K + k], right = w.codes[n * K + k];
        if (d.round_x) left = double(step) * std::min(127.0f, std::max(-127.0f, std::nearbyint(x[m * K + k] / step)));
        const int64_t at = (d.group ? k / d.group : 0) * N + n;
        double size = std::fabs(right);
        if (quantized) {
          size = (size + std::fabs(w.zeros[at])) * w.scales[at];
          right = (right - w.zeros[at]) * w.scales[at];
        }
        total += left * right;
        sizes += std::fabs(left) * size;
      }
      const double got = out[m * N + n], error = std::fabs(got - total);
      const bool good = m != bad ? error <= 1e-6 * (2 + K / 50.0) * sizes + 1e-37
                        : d.round_x ? std::isnan(got) : !std::isfinite(got);
      require(good, drawn + ": row " + std::to_string(m) + " output " + std::to_string(n) + " is " +
                        std::to_string(got) + ", not " + std::to_string(total));
    }
  }
}

}  // namespace

// Each case on a thread of its own, whose scratch memory is then of the exact size too; some on several threads.
int main() {
  Random random;
  Threads threads(2);
  for (int64_t i = 0; i < 300; ++i)
    std::thread([&] { check_dot(random, i % 4 ? Pool{} : threads.pool(3)); }).join();
}
