// The native kernels as XLA calls them (jax.ffi). Compiled once for each form that a machine runs: see build.py.
#include "attention_backward.h"
#include "attention_forward.h"
#include "boundary.h"
#include "decode.h"
#include "dot.h"
#include "feedforward.h"

namespace efflm {
namespace {

constexpr size_t kMostWeights = 8;

ffi::Error dots_handler(ffi::ThreadPool threads, float epsilon, bool to_bfloat16, ffi::Span<const int64_t> weights,
                        ffi::AnyBuffer x, ffi::AnyBuffer norm_scale, ffi::AnyBuffer norm_bias, ffi::AnyBuffer residual,
                        ffi::RemainingArgs arrays, ffi::RemainingRets outs) {
  return guarded([&] {
    require(outs.size() <= kMostWeights, "more than 8 weights");
    const Rows rows = rows_of(x, norm_scale, norm_bias, epsilon, to_bfloat16);
    const Attributes* attributes = attributes_of(weights, arrays, outs.size(), 0);
    Product all[kMostWeights];
    for (size_t i = 0; i < outs.size(); ++i) {
      auto out = *outs.get<ffi::AnyBuffer>(i);
      all[i].weight = weight_of(attributes, arrays, int(i), rows.inputs, outputs_of(rows, *out, residual));
      all[i].out = static_cast<float*>(out->untyped_data());
      all[i].residual = some<float>(residual);
    }
    products(rows, all, int(outs.size()), pool_of(threads));
  });
}

ffi::Error feedforward_handler(ffi::ThreadPool threads, float epsilon, bool to_bfloat16,
                               ffi::Span<const int64_t> weights, ffi::AnyBuffer x, ffi::AnyBuffer norm_scale,
                               ffi::AnyBuffer norm_bias, ffi::AnyBuffer residual, ffi::RemainingArgs arrays,
                               ffi::Result<ffi::AnyBuffer> out) {
  return guarded([&] {
    const Attributes* attributes = attributes_of(weights, arrays, 3, 2);
    const int64_t hidden = weights[3 * kAttributes], activation = weights[3 * kAttributes + 1];
    require(activation == 0 || activation == 1, "an unknown activation");
    FeedForward f;
    f.x = rows_of(x, norm_scale, norm_bias, epsilon, to_bfloat16);
    f.gate = weight_of(attributes, arrays, 0, f.x.inputs, hidden);
    f.up = weight_of(attributes, arrays, 1, f.x.inputs, hidden);
    f.down = weight_of(attributes, arrays, 2, hidden, outputs_of(f.x, *out, residual));
    f.out = static_cast<float*>(out->untyped_data());
    f.residual = some<float>(residual);
    f.activation = Activation(activation);
    f.to_bfloat16 = to_bfloat16;
    feedforward(f, pool_of(threads));
  });
}

template <typename Cell>
void decode_in(Decode<Cell> d, ffi::ThreadPool& threads, ffi::AnyBuffer old_keys, ffi::AnyBuffer old_values,
               ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values) {
  d.keys = static_cast<Cell*>(keys->untyped_data());
  d.values = static_cast<Cell*>(values->untyped_data());
  // XLA promises to alias them; a copy is right in any case.
  if (d.keys != old_keys.untyped_data()) std::memcpy(d.keys, old_keys.untyped_data(), old_keys.size_bytes());
  if (d.values != old_values.untyped_data()) std::memcpy(d.values, old_values.untyped_data(), old_values.size_bytes());
  decode(d, pool_of(threads));
}

ffi::Error decode_handler(ffi::ThreadPool threads, int64_t window, bool to_bfloat16, ffi::AnyBuffer queries,
                          ffi::AnyBuffer new_keys, ffi::AnyBuffer new_values, ffi::AnyBuffer positions,
                          ffi::AnyBuffer cosines, ffi::AnyBuffer sines, ffi::AnyBuffer old_keys,
                          ffi::AnyBuffer old_values, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> keys,
                          ffi::Result<ffi::AnyBuffer> values) {
  auto fill = [&](auto cell) {
    require(queries.dimensions().size() == 4, "queries", queries);
    require(old_keys.dimensions().size() == 4 && is_float(old_keys), "a cache", old_keys);
    require(cosines.dimensions().size() == 3, "cosines", cosines);
    const int64_t B = queries.dimensions()[0];
    Decode<decltype(cell)> d;
    d.tokens = queries.dimensions()[1];
    d.rows = B * d.tokens;
    d.slots = old_keys.dimensions()[1];
    d.kv_heads = old_keys.dimensions()[2];
    d.size = old_keys.dimensions()[3];
    d.heads = queries.dimensions()[2];
    d.rotated = 2 * cosines.dimensions()[2];
    d.window = window;
    const DataType type = old_keys.element_type();
    require(has_shape(queries, {B, d.tokens, d.heads, d.size}, DataType::F32), "queries", queries);
    for (const ffi::AnyBuffer& each : {new_keys, new_values})
      require(has_shape(each, {B, d.tokens, d.kv_heads, d.size}, DataType::F32), "new keys or values", each);
    require(has_shape(positions, {B, d.tokens}, DataType::S32), "positions", positions);
    for (const ffi::AnyBuffer& each : {cosines, sines})
      require(has_shape(each, {B, d.tokens, d.rotated / 2}, DataType::F32) && d.rotated <= d.size, "cosines", each);
    for (const ffi::AnyBuffer& each : {old_keys, old_values, *keys, *values})
      require(has_shape(each, {B, d.slots, d.kv_heads, d.size}, type) && d.tokens <= d.slots, "a cache", each);
    require(has_shape(*out, {B, d.tokens, d.heads, d.size}, DataType::F32), "an output", *out);
    require(d.kv_heads > 0 && d.heads % d.kv_heads == 0, "query heads that its key-value heads do not divide");
    require(window >= 0, "a negative window");
    d.queries = some<float>(queries);
    d.new_keys = some<float>(new_keys);
    d.new_values = some<float>(new_values);
    d.cosines = some<float>(cosines);
    d.sines = some<float>(sines);
    d.positions = some<int32_t>(positions);
    d.out = static_cast<float*>(out->untyped_data());
    d.to_bfloat16 = to_bfloat16;
    decode_in(d, threads, old_keys, old_values, keys, values);
  };
  return guarded([&] { old_keys.element_type() == DataType::BF16 ? fill(uint16_t{}) : fill(float{}); });
}

// --- attention -------------------------------------------------------------------------------------------------------

Array array_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == DataType::BF16};
}

// Axes in front of the named ones are a part of the batch.
Attention attention_of(int64_t window, ffi::AnyBuffer& q, ffi::AnyBuffer& k, ffi::AnyBuffer& v, ffi::AnyBuffer& slots,
                       ffi::AnyBuffer& segments, ffi::AnyBuffer& key_segments) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_v = v.dimensions();
  const size_t last = of_q.size();
  require(last >= 3 && is_float(q), "queries", q);
  require(of_k.size() == last && is_float(k) && of_k[last - 1] == of_q[last - 1], "keys", k);
  require(std::equal(of_q.begin(), of_q.end() - 3, of_k.begin()), "keys", k);
  require(of_v.size() == last && is_float(v) && std::equal(of_k.begin(), of_k.end(), of_v.begin()), "values", v);
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
  require(a.K > 0 && a.N % a.K == 0, "query heads that its key-value heads do not divide");
  require(window >= 0, "a negative window");
  require(may_have(slots, a.B * a.T, DataType::S32), "slots", slots);
  require(a.slots || a.T <= a.S, "more queries than keys, and no slots", q);
  require(may_have(segments, a.B * a.T, DataType::S32), "segments", segments);
  require(may_have(key_segments, a.B * a.S, DataType::S32), "segments of keys", key_segments);
  require(a.B * a.T * a.S == 0 || !a.segments == !a.key_segments, "segments of keys", key_segments);
  return a;
}

ffi::Error attention_handler(ffi::ThreadPool threads, int64_t window, ffi::AnyBuffer q, ffi::AnyBuffer k,
                             ffi::AnyBuffer v, ffi::AnyBuffer slots, ffi::AnyBuffer segments,
                             ffi::AnyBuffer key_segments, ffi::Result<ffi::AnyBuffer> out,
                             ffi::Result<ffi::AnyBuffer> normalizers) {
  return guarded([&] {
    Attention a = attention_of(window, q, k, v, slots, segments, key_segments);
    require(has(*out, q.element_count(), DataType::F32), "an output", *out);
    require(has(*normalizers, a.B * a.N * a.T, DataType::F32), "normalizers", *normalizers);
    a.out = static_cast<float*>(out->untyped_data());
    a.normalizers = static_cast<float*>(normalizers->untyped_data());
    attend(a, pool_of(threads));
  });
}

ffi::Error attention_backward_handler(ffi::ThreadPool threads, int64_t window, int64_t chunks, ffi::AnyBuffer q,
                                      ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer slots, ffi::AnyBuffer segments,
                                      ffi::AnyBuffer key_segments, ffi::AnyBuffer out, ffi::AnyBuffer normalizers,
                                      ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                                      ffi::Result<ffi::AnyBuffer> dv) {
  return guarded([&] {
    Gradients d;
    d.attention = attention_of(window, q, k, v, slots, segments, key_segments);
    const Attention& a = d.attention;
    const int64_t queries = q.element_count(), keys = k.element_count();
    for (const ffi::AnyBuffer& each : {out, g})
      require(has(each, queries, DataType::F32), "an output or its gradient", each);
    require(has(normalizers, a.B * a.N * a.T, DataType::F32), "normalizers", normalizers);
    require(chunks > 0 && (chunks == 1 || dq->element_type() == DataType::F32), "a number of chunks");
    require(is_float(*dq) && has(*dq, queries, dq->element_type()), "a gradient of queries", *dq);
    for (const ffi::AnyBuffer& each : {*dk, *dv})
      require(is_float(each) && has(each, keys, each.element_type()), "a gradient of keys or values", each);
    d.attention.out = static_cast<float*>(out.untyped_data());
    d.attention.normalizers = static_cast<float*>(normalizers.untyped_data());
    d.g = static_cast<const float*>(g.untyped_data());
    d.chunks = chunks;
    d.dq = array_of(*dq), d.dk = array_of(*dk), d.dv = array_of(*dv);
    attend_back(d, pool_of(threads));
  });
}

}  // namespace
}  // namespace efflm

namespace ffi = xla::ffi;

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
