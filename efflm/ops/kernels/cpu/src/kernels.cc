// The native kernels as XLA calls them (jax.ffi). Compiled once for each form that a machine runs: see build.py.
#include <sched.h>

#include "attention_backward.h"
#include "attention_forward.h"
#include "decode.h"
#include "dot.h"
#include "feedforward.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace efflm {
namespace {

int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

Pool pool_of(ffi::ThreadPool& threads) {
  static const int most = processors();
  auto schedule = [](void* context, void (*function)()) {
    static_cast<ffi::ThreadPool*>(context)->Schedule([function] { function(); });
  };
  return {int(least(threads.num_threads(), most)), schedule, &threads};
}

template <typename T>
const T* some(const ffi::AnyBuffer& buffer) {  // null: an array without elements
  return buffer.element_count() ? static_cast<const T*>(buffer.untyped_data()) : nullptr;
}

struct Attributes {  // of one weight, as Python gives them
  int64_t format, transposed, round_x, group;
};

// A weight from its four arrays: values, scale, zeros, scale of the activations.
Weight weight_of(const Attributes& given, ffi::RemainingArgs& arrays, int first, int64_t inputs, int64_t outputs) {
  auto array = [&](int i) { return *arrays.get<ffi::AnyBuffer>(first + i); };
  Weight w;
  w.format = Format(given.format);
  w.transposed = given.transposed;
  w.round_x = given.round_x;
  w.group = given.group;
  w.inputs = inputs;
  w.outputs = outputs;
  w.values = array(0).untyped_data();
  w.scale = some<float>(array(1));
  w.zeros = some<int8_t>(array(2));
  w.x_scale = some<float>(array(3));
  return w;
}

Rows rows_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& scale, const ffi::AnyBuffer& bias, float epsilon,
             bool to_bfloat16) {
  Rows rows;
  rows.x = x.untyped_data();
  rows.inputs = x.dimensions().back();
  rows.rows = rows.inputs ? x.element_count() / rows.inputs : 0;
  rows.is_bfloat16 = x.element_type() == ffi::DataType::BF16;
  rows.norm_scale = some<float>(scale);
  rows.norm_bias = some<float>(bias);
  rows.epsilon = epsilon;
  rows.to_bfloat16 = to_bfloat16;
  return rows;
}

constexpr int kMostWeights = 8;

ffi::Error dots_handler(ffi::ThreadPool threads, float epsilon, bool to_bfloat16, ffi::Span<const int64_t> weights,
                        ffi::AnyBuffer x, ffi::AnyBuffer norm_scale, ffi::AnyBuffer norm_bias, ffi::AnyBuffer residual,
                        ffi::RemainingArgs arrays, ffi::RemainingRets outs) {
  const Rows rows = rows_of(x, norm_scale, norm_bias, epsilon, to_bfloat16);
  const auto* attributes = reinterpret_cast<const Attributes*>(weights.begin());
  Product all[kMostWeights];
  for (size_t i = 0; i < outs.size(); ++i) {
    auto out = *outs.get<ffi::AnyBuffer>(i);
    all[i].weight = weight_of(attributes[i], arrays, 4 * int(i), rows.inputs, out->dimensions().back());
    all[i].out = static_cast<float*>(out->untyped_data());
    all[i].residual = some<float>(residual);
  }
  products(rows, all, int(outs.size()), pool_of(threads));
  return ffi::Error::Success();
}

ffi::Error feedforward_handler(ffi::ThreadPool threads, float epsilon, bool to_bfloat16,
                               ffi::Span<const int64_t> weights, ffi::AnyBuffer x, ffi::AnyBuffer norm_scale,
                               ffi::AnyBuffer norm_bias, ffi::AnyBuffer residual, ffi::RemainingArgs arrays,
                               ffi::Result<ffi::AnyBuffer> out) {
  const auto* attributes = reinterpret_cast<const Attributes*>(weights.begin());
  const int64_t outputs = out->dimensions().back(), hidden = weights[12];
  FeedForward f;
  f.x = rows_of(x, norm_scale, norm_bias, epsilon, to_bfloat16);
  f.gate = weight_of(attributes[0], arrays, 0, f.x.inputs, hidden);
  f.up = weight_of(attributes[1], arrays, 4, f.x.inputs, hidden);
  f.down = weight_of(attributes[2], arrays, 8, hidden, outputs);
  f.out = static_cast<float*>(out->untyped_data());
  f.residual = some<float>(residual);
  f.to_bfloat16 = to_bfloat16;
  feedforward(f, pool_of(threads));
  return ffi::Error::Success();
}

template <typename Cell>
ffi::Error decode_in(Decode<Cell> d, ffi::ThreadPool& threads, ffi::AnyBuffer old_keys, ffi::AnyBuffer old_values,
                     ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values) {
  d.keys = static_cast<Cell*>(keys->untyped_data());
  d.values = static_cast<Cell*>(values->untyped_data());
  // XLA promises to alias them; a copy is right in any case.
  if (d.keys != old_keys.untyped_data()) std::memcpy(d.keys, old_keys.untyped_data(), old_keys.size_bytes());
  if (d.values != old_values.untyped_data()) std::memcpy(d.values, old_values.untyped_data(), old_values.size_bytes());
  decode(d, pool_of(threads));
  return ffi::Error::Success();
}

ffi::Error decode_handler(ffi::ThreadPool threads, int64_t window, bool to_bfloat16, ffi::Buffer<ffi::F32> queries,
                          ffi::Buffer<ffi::F32> new_keys, ffi::Buffer<ffi::F32> new_values,
                          ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::F32> cosines, ffi::Buffer<ffi::F32> sines,
                          ffi::AnyBuffer old_keys, ffi::AnyBuffer old_values, ffi::Result<ffi::Buffer<ffi::F32>> out,
                          ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values) {
  auto fill = [&](auto cell) {
    Decode<decltype(cell)> d;
    d.rows = queries.dimensions()[0] * queries.dimensions()[1];
    d.tokens = queries.dimensions()[1];
    d.slots = old_keys.dimensions()[1];
    d.kv_heads = old_keys.dimensions()[2];
    d.size = old_keys.dimensions()[3];
    d.heads = queries.dimensions()[2];
    d.rotated = 2 * cosines.dimensions().back();
    d.window = window;
    d.queries = queries.typed_data();
    d.new_keys = new_keys.typed_data();
    d.new_values = new_values.typed_data();
    d.cosines = cosines.typed_data();
    d.sines = sines.typed_data();
    d.positions = positions.typed_data();
    d.out = out->typed_data();
    d.to_bfloat16 = to_bfloat16;
    return decode_in(d, threads, old_keys, old_values, keys, values);
  };
  return old_keys.element_type() == ffi::DataType::BF16 ? fill(uint16_t{}) : fill(float{});
}

}  // namespace
}  // namespace efflm

XLA_FFI_DEFINE_HANDLER_SYMBOL(efflm_dots, efflm::dots_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("to_bfloat16")
                                  .Attr<ffi::Span<const int64_t>>("weights")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(efflm_feedforward, efflm::feedforward_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("to_bfloat16")
                                  .Attr<ffi::Span<const int64_t>>("weights")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(efflm_decode, efflm::decode_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("window")
                                  .Attr<bool>("to_bfloat16")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// --- attention -------------------------------------------------------------------------------------------------------

namespace efflm {
namespace {

Array array_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == ffi::DataType::BF16};
}

// Axes in front of the named ones are a part of the batch.
Attention attention_of(int64_t window, ffi::AnyBuffer& q, ffi::AnyBuffer& k, ffi::AnyBuffer& v, ffi::AnyBuffer& slots,
                       ffi::AnyBuffer& segments, ffi::AnyBuffer& key_segments) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const size_t last = of_q.size();
  Attention a;
  a.B = 1;
  for (size_t i = 0; i + 3 < last; ++i) a.B *= of_q[i];
  a.T = of_q[last - 3], a.N = of_q[last - 2], a.H = of_q[last - 1];
  a.S = of_k[last - 3], a.K = of_k[last - 2];
  a.window = window;
  a.q = array_of(q), a.k = array_of(k), a.v = array_of(v);
  a.slots = some<int32_t>(slots);
  a.segments = some<int32_t>(segments);
  a.key_segments = some<int32_t>(key_segments);
  return a;
}

ffi::Error attention_handler(ffi::ThreadPool threads, int64_t window, ffi::AnyBuffer q, ffi::AnyBuffer k,
                             ffi::AnyBuffer v, ffi::AnyBuffer slots, ffi::AnyBuffer segments,
                             ffi::AnyBuffer key_segments, ffi::Result<ffi::AnyBuffer> out,
                             ffi::Result<ffi::AnyBuffer> normalizers) {
  Attention a = attention_of(window, q, k, v, slots, segments, key_segments);
  a.out = static_cast<float*>(out->untyped_data());
  a.normalizers = static_cast<float*>(normalizers->untyped_data());
  attend(a, pool_of(threads));
  return ffi::Error::Success();
}

ffi::Error attention_backward_handler(ffi::ThreadPool threads, int64_t window, int64_t chunks, ffi::AnyBuffer q,
                                      ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer slots, ffi::AnyBuffer segments,
                                      ffi::AnyBuffer key_segments, ffi::AnyBuffer out, ffi::AnyBuffer normalizers,
                                      ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                                      ffi::Result<ffi::AnyBuffer> dv) {
  Gradients d;
  d.attention = attention_of(window, q, k, v, slots, segments, key_segments);
  d.attention.out = static_cast<float*>(out.untyped_data());
  d.attention.normalizers = static_cast<float*>(normalizers.untyped_data());
  d.g = static_cast<const float*>(g.untyped_data());
  d.chunks = chunks;
  d.dq = array_of(*dq), d.dk = array_of(*dk), d.dv = array_of(*dv);
  attend_back(d, pool_of(threads));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace efflm

XLA_FFI_DEFINE_HANDLER_SYMBOL(efflm_attention, efflm::attention_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(efflm_attention_backward, efflm::attention_backward_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunks")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
