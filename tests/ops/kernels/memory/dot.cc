// efflm::products in every format, of one weight and of several, and efflm::feedforward. See checks.h.
#include "dot.h"
#include "feedforward.h"

#include "checks.h"

namespace {

const float kInfinity = std::numeric_limits<float>::infinity();

// Rows as the kernels get them, and as they are multiplied: normalized, and [rows, inputs].
struct DrawnRows {
  Rows rows;
  Block<float> floats{0}, norm_scale{0}, norm_bias{0};
  Block<uint16_t> halves{0};
  std::vector<float> read;
  int64_t bad = -1;  // a row with NaN or infinity
};

DrawnRows draw_rows(Random& random, int64_t M, int64_t K) {
  DrawnRows d;
  d.rows.rows = M;
  d.rows.inputs = K;
  d.rows.is_bfloat16 = random.coin();
  d.floats = Block<float>(d.rows.is_bfloat16 ? 0 : M * K);
  d.halves = Block<uint16_t>(d.rows.is_bfloat16 ? M * K : 0);
  if (random.from(0, 2) == 0) d.norm_scale = Block<float>(K);
  if (d.norm_scale.size && random.coin()) d.norm_bias = Block<float>(K);
  for (int64_t k = 0; k < d.norm_scale.size; ++k) d.norm_scale[k] = random.normal();
  for (int64_t k = 0; k < d.norm_bias.size; ++k) d.norm_bias[k] = random.normal();
  if (random.from(0, 3) == 0) d.bad = random.from(0, M - 1);
  std::vector<float> x(M * K);
  for (int64_t m = 0; m < M; ++m) {
    const float size = d.norm_scale.size ? 1 : random.of({1.0f, 1.0f, 0.0f, 1e-44f, 1e-30f, 1e30f});
    for (int64_t k = 0; k < K; ++k) {
      float value = size * random.normal();
      if (m == d.bad && k == K / 2) value = random.of({std::nanf(""), kInfinity, -kInfinity});
      if (d.rows.is_bfloat16) {
        d.halves[m * K + k] = to_bfloat16(value);
        value = from_bfloat16(d.halves[m * K + k]);
      } else {
        d.floats[m * K + k] = value;
      }
      x[m * K + k] = value;
    }
  }
  d.rows.x = d.rows.is_bfloat16 ? static_cast<const void*>(d.halves.get()) : d.floats.get();
  d.read = x;
  if (!d.norm_scale.size) return d;
  d.rows.norm_scale = d.norm_scale.get();
  d.rows.norm_bias = d.norm_bias.size ? d.norm_bias.get() : nullptr;
  d.rows.epsilon = 1e-5f;
  d.rows.to_bfloat16 = random.coin();
  for (int64_t m = 0; m < M; ++m) {
    Block<float> row(K);
    read_row(d.rows, m, K, row.get());
    double mean = 0, variance = 0;
    for (int64_t k = 0; k < K && d.norm_bias.size; ++k) mean += x[m * K + k] / double(K);
    for (int64_t k = 0; k < K; ++k) variance += (x[m * K + k] - mean) * (x[m * K + k] - mean) / K;
    for (int64_t k = 0; k < K; ++k) {
      const double factor = d.norm_scale[k] / std::sqrt(variance + 1e-5);
      const double wanted = (x[m * K + k] - mean) * factor + (d.norm_bias.size ? d.norm_bias[k] : 0);
      const double allowed = (d.rows.to_bfloat16 ? 0.004 : 2e-6) * std::fabs(wanted) + 1e-5 * std::fabs(factor) + 1e-6;
      require(m == d.bad || std::fabs(row[k] - wanted) <= allowed, "a normalized row is wrong");
      d.read[m * K + k] = row[k];
    }
  }
  return d;
}

// A weight as the kernels get it, and what it stands for.
struct DrawnWeight {
  Weight weight;
  std::vector<double> codes, scales, zeros;  // [outputs, inputs]; the others by group: [groups, outputs]
  Block<uint8_t> bytes{0}, scale{0};
  Block<float> x_scale{0};
  Block<int8_t> zero{0}, scale_codes{0};
};

// A scale of either sign, of float16 any up to 4, most of them small; what it stands for.
double draw_scale(Random& random, ScaleType type, uint8_t* to) {
  const int sign = random.coin() ? -1 : 1;
  const float value = sign * (0.01f + std::fabs(random.normal()));
  uint16_t bits = to_bfloat16(value);
  double found = type == ScaleType::kFloat32 ? value : from_bfloat16(bits);
  if (type == ScaleType::kFloat16) {
    const int exponent = random.from(0, 16), mantissa = random.from(0, 1023);
    bits = (sign < 0) << 15 | exponent << 10 | mantissa;
    found = sign * std::ldexp(exponent ? 1024 + mantissa : 2 * mantissa, exponent - 25);
  }
  type == ScaleType::kFloat32 ? std::memcpy(to, &value, 4) : std::memcpy(to, &bits, 2);
  return found;
}

DrawnWeight draw_weight(Random& random, Weight like) {
  DrawnWeight d;
  d.weight = like;
  const int64_t K = like.inputs, N = like.outputs, groups = like.groups();
  d.codes.resize(N * K);
  if (!like.quantized()) {
    const bool half = like.format == Format::kBfloat16;
    d.bytes = Block<uint8_t>(N * K * (half ? 2 : 4));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t at = like.transposed ? n * K + k : k * N + n;
        const uint16_t low = to_bfloat16(random.normal());
        const float value = half ? from_bfloat16(low) : random.normal();
        d.codes[n * K + k] = value;
        std::memcpy(d.bytes.get() + (half ? 2 : 4) * at, half ? static_cast<const void*>(&low) : &value, half ? 2 : 4);
      }
    d.weight.values = d.bytes.get();
    return d;
  }
  const int bits = like.bits(), half = 1 << (bits - 1), step = bits == 8 ? 4 : bits == 4 ? 8 : 16;
  const int64_t padded = like.panels() * kPanel, steps = like.filled() / step;
  const int scale_size = like.scale_type == ScaleType::kFloat32 ? 4 : 2;
  d.bytes = Block<uint8_t>(padded * steps * step * bits / 8);
  const int64_t rows = like.super_blocks(groups);  // of scales
  d.scale = Block<uint8_t>(scale_size * rows * padded);
  if (like.scale_codes) d.scale_codes = Block<int8_t>(groups * padded);
  if (like.zeros) d.zero = Block<int8_t>(groups * padded);
  auto at = [](int64_t rows, int64_t g, int64_t n) { return (n / kPanel * rows + g) * kPanel + n % kPanel; };
  std::vector<double> stored(rows * N);
  for (int64_t i = 0; i < rows * N; ++i)
    stored[i] = draw_scale(random, like.scale_type, d.scale.get() + scale_size * at(rows, i / N, i % N));
  d.scales.resize(groups * N);
  d.zeros.resize(groups * N);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t n = 0; n < N; ++n) {
      d.scales[g * N + n] = stored[(g >> like.super_shift) * N + n];
      if (like.scale_codes) d.scales[g * N + n] *= d.scale_codes[at(groups, g, n)] = random.from(-128, 127);
      if (like.zeros) d.zeros[g * N + n] = d.zero[at(groups, g, n)] = random.from(-half, half - 1);
    }
  const bool extreme = random.from(0, 3) == 0;
  for (int64_t n = 0; n < padded; ++n)
    for (int64_t k = 0; k < steps * step; ++k) {
      const bool inside = n < N && k < K;
      const int code = !inside ? 0 : extreme ? random.of({-half, half - 1}) : random.from(-half, half - 1);
      if (inside) d.codes[n * K + k] = code;
      uint8_t* panel = d.bytes.get() + (n / kPanel * steps + k / step) * (step * kPanel * bits / 8);
      const int byte = k % 4, four = k % step / 4, value = code + half;
      uint8_t& in_word = panel[n % kPanel * 4 + byte];
      if (bits != 3) {
        in_word |= value << bits * four;
      } else {
        const int v = four / 2, f = four % 2, second = n % kPanel / 16;
        in_word |= (value & 3) << (2 * v + 4 * f);
        panel[4 * kPanel + n % 16 * 4 + byte] |= value >> 2 << (2 * second + v + 4 * f);
      }
    }
  d.x_scale = Block<float>(like.x_scale ? 1 : 0);
  if (like.x_scale) d.x_scale[0] = 0.02f;
  d.weight.values = d.bytes.get();
  d.weight.scale = d.scale.get();
  d.weight.zeros = like.zeros ? d.zero.get() : nullptr;
  d.weight.scale_codes = like.scale_codes ? d.scale_codes.get() : nullptr;
  d.weight.x_scale = like.x_scale ? d.x_scale.get() : nullptr;
  return d;
}

// What kind of weight: its arrays are drawn later.
Weight draw_kind(Random& random, int64_t inputs, int64_t outputs) {
  static const float some_scale = 0;
  static const int8_t some_zero = 0;
  Weight w;
  w.format =
      random.of({Format::kFloat32, Format::kBfloat16, Format::kInt8, Format::kInt4, Format::kInt3, Format::kInt2});
  w.scale_type = random.of({ScaleType::kFloat32, ScaleType::kFloat16, ScaleType::kBfloat16});
  w.transposed = !w.quantized() && random.coin();
  w.round_x = w.quantized() && random.coin();
  w.x_scale = w.round_x && random.coin() ? &some_scale : nullptr;
  w.zeros = w.quantized() && random.coin() ? &some_zero : nullptr;
  w.inputs = inputs;
  w.outputs = outputs;
  w.group = w.quantized() && random.coin() ? w.unit() * random.from(1, 4) : 0;
  if (w.group >= inputs) w.group = 0;
  w.scale_codes = w.group && random.coin() ? &some_zero : nullptr;
  w.super_shift = w.scale_codes ? random.from(1, 2) : 0;
  return w;
}

std::string words(const Weight& w, const Rows& x) {
  return "format " + std::to_string(int(w.format)) + ", transposed " + std::to_string(w.transposed) + ", round_x " +
         std::to_string(w.round_x) + ", zeros " + std::to_string(w.zeros != nullptr) + ", scales " +
         std::to_string(int(w.scale_type)) + ", super-blocks " +
         std::to_string(w.super_shift) + ", group " +
         std::to_string(w.group) + ", bfloat16 x " + std::to_string(x.is_bfloat16) + ", norm " +
         std::to_string(x.norm_scale != nullptr) + ", rows, inputs, outputs " + std::to_string(x.rows) + " " +
         std::to_string(w.inputs) + " " + std::to_string(w.outputs);
}

// Holds out [rows, outputs] against x times the weight plus the residual.
void require_product(const DrawnRows& x, const DrawnWeight& w, const float* residual, const float* out) {
  const int64_t K = w.weight.inputs, N = w.weight.outputs;
  const bool rounds = w.weight.round_x;
  for (int64_t m = 0; m < x.rows.rows; ++m) {
    const float* row = x.read.data() + m * K;
    float most = 0;
    for (int64_t k = 0; k < K; ++k) most = std::max(most, std::fabs(row[k]));
    const float step = w.weight.x_scale ? *w.weight.x_scale : most / 127 > 0 ? most / 127 : 1;
    for (int64_t n = 0; n < N; ++n) {
      double total = residual ? residual[m * N + n] : 0, sizes = std::fabs(total);
      for (int64_t k = 0; k < K; ++k) {
        double left = row[k], right = w.codes[n * K + k], size = std::fabs(right);
        if (rounds) left = double(step) * std::min(127.0f, std::max(-127.0f, std::nearbyint(row[k] / step)));
        if (w.weight.quantized()) {
          const int64_t at = (w.weight.group ? k / w.weight.group : 0) * N + n;
          size = (size + std::fabs(w.zeros[at])) * std::fabs(w.scales[at]);
          right = (right - w.zeros[at]) * w.scales[at];
        }
        total += left * right;
        sizes += std::fabs(left) * size;
      }
      const double got = out[m * N + n], error = std::fabs(got - total);
      const bool good = m != x.bad ? error <= 1e-6 * (2 + K / 50.0) * sizes + 1e-37
                        : rounds   ? std::isnan(got)
                                   : !std::isfinite(got);
      require(good, words(w.weight, x.rows) + ": row " + std::to_string(m) + ", output " + std::to_string(n) + " is " +
                        std::to_string(got) + ", not " + std::to_string(total));
    }
  }
}

int64_t draw_count(Random& random) { return random.of<int64_t>({1, 2, 3, random.from(1, 33), random.from(90, 110)}); }
int64_t draw_size(Random& random) { return random.of<int64_t>({random.from(1, 20), random.from(1, 150), 32, 64}); }

Block<float> draw_residual(Random& random, int64_t size) {
  Block<float> residual(random.coin() ? size : 0);
  for (int64_t i = 0; i < residual.size; ++i) residual[i] = random.normal();
  return residual;
}

void check_products(Random& random, const Pool& pool) {
  const int64_t M = draw_count(random), K = draw_size(random), count = random.of<int64_t>({1, 1, 2, 3});
  const DrawnRows x = draw_rows(random, M, K);
  std::vector<DrawnWeight> weights;
  std::vector<Block<float>> outs;
  const Weight kind = draw_kind(random, K, draw_size(random));
  const bool alike = random.coin();
  const Block<float> residual = draw_residual(random, count == 1 ? M * kind.outputs : 0);
  std::vector<Product> all;
  for (int64_t i = 0; i < count; ++i) {
    Weight one = alike || i == 0 ? kind : draw_kind(random, K, draw_size(random));
    if (i) one.outputs = draw_size(random);
    weights.push_back(draw_weight(random, one));
    outs.emplace_back(M * one.outputs);
    all.push_back({weights.back().weight, outs.back().get(), residual.size ? residual.data.get() : nullptr});
  }
  products(x.rows, all.data(), int(count), pool);
  for (int64_t i = 0; i < count; ++i) require_product(x, weights[i], all[i].residual, outs[i].get());
}

// The products of `feedforward` are those of `products`, which is checked above: here what is between them.
void check_feedforward(Random& random, const Pool& pool) {
  const int64_t M = draw_count(random), K = draw_size(random), F = draw_size(random), N = draw_size(random);
  DrawnRows x = draw_rows(random, M, K);
  const Weight kind = draw_kind(random, K, F);
  const DrawnWeight gate = draw_weight(random, kind);
  const DrawnWeight up = draw_weight(random, random.coin() ? kind : draw_kind(random, K, F));
  Weight float_kind = draw_kind(random, F, N);
  float_kind.round_x = false;  // else a code may differ by one
  float_kind.x_scale = nullptr;
  const DrawnWeight down = draw_weight(random, float_kind);
  const Block<float> residual = draw_residual(random, M * N);
  Block<float> g(M * F), u(M * F), out(M * N), wanted(M * N);
  const float* rest = residual.size ? residual.data.get() : nullptr;
  product(x.rows, {gate.weight, g.get()}, pool);
  product(x.rows, {up.weight, u.get()}, pool);
  Block<float> h(M * F);
  bool finite = true;
  const bool gelu = random.coin();
  for (int64_t i = 0; i < M * F; ++i) {
    const double each = g[i], inner = std::sqrt(2 / M_PI) * (each + 0.044715 * each * each * each);
    h[i] = each / (1 + std::exp(gelu ? -2 * inner : -each)) * u[i];  // (1 + tanh(a)) / 2, which would cancel
    finite = finite && (i / F == x.bad || std::fabs(h[i]) < 1e30f);
  }
  FeedForward f{x.rows, gate.weight, up.weight, down.weight, out.get(), rest,
                gelu ? Activation::kGeluTanh : Activation::kSilu, false};
  feedforward(f, pool);
  Rows rows;
  rows.x = h.get();
  rows.rows = M;
  rows.inputs = F;
  product(rows, {down.weight, wanted.get(), rest}, pool);
  for (int64_t m = 0; m < M && finite; ++m) {
    double most = 0, least = 1;  // the kernel's exponential is at most e^88.4: what it divides is never quite 0
    for (int64_t k = 0; k < F; ++k) {
      most = std::max<double>(most, std::fabs(h[m * F + k]));
      least = std::max<double>(least, std::fabs(double(g[m * F + k]) * u[m * F + k]));
    }
    for (int64_t n = 0; n < N; ++n) {
      double size = std::fabs(wanted[m * N + n]) + (rest ? 1 : 0);
      const double each = 5 * (down.weight.quantized() ? 256 : 1) * (down.weight.scale_codes ? 128 : 1);  // at most
      const double error = std::fabs(out[m * N + n] - wanted[m * N + n]);
      const double allowed = 1e-5 * (size + most * each * F) + 1e-38 * least * each * F;
      const bool good = m == x.bad ? !std::isfinite(out[m * N + n]) : error <= allowed;
      require(good, "feedforward: " + words(gate.weight, x.rows) + ": row " + std::to_string(m) + " is " +
                        std::to_string(out[m * N + n]) + ", not " + std::to_string(wanted[m * N + n]));
    }
  }
}

// Memory that cannot be had is an error, of this call alone.
void check_scratch() {
  bool thrown = false;
  try {
    scratch<float, For::kHidden>(int64_t(1) << 60);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  require(thrown, "scratch: a block of 2^62 bytes");
  for (const int64_t size : {0, 3, 1000}) {
    float* block = scratch<float, For::kHidden>(size);
    require(block && reinterpret_cast<uintptr_t>(block) % 64 == 0, "scratch: not at the start of a cache line");
    for (int64_t i = 0; i < size; ++i) block[i] = 1;
  }
}

}  // namespace

// Each case on a thread of its own, whose scratch memory is then of the exact size too; some on several threads.
int main() {
  Random random;
  Threads threads(2);
  std::thread(check_scratch).join();
  for (int64_t i = 0; i < 400; ++i)
    std::thread([&] {
      const Pool pool = i % 4 ? Pool{} : threads.pool(3);
      i % 4 == 1 ? check_feedforward(random, pool) : check_products(random, pool);
    }).join();
}
