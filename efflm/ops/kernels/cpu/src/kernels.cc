// The native kernels as XLA calls them (jax.ffi). Compiled once for each form that a machine runs: see build.py.
#include <sched.h>

#include "attention_backward.h"
#include "attention_forward.h"
#include "dot.h"
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

ffi::Error dot_handler(ffi::ThreadPool threads, int32_t format, bool transposed, bool round_x, int64_t group,
                       ffi::AnyBuffer x, ffi::AnyBuffer values, ffi::AnyBuffer scale, ffi::AnyBuffer zeros,
                       ffi::AnyBuffer x_scale, ffi::Result<ffi::AnyBuffer> out) {
  Dot d;
  d.format = Format(format);
  d.transposed = transposed;
  d.round_x = round_x;
  d.x_is_bfloat16 = x.element_type() == ffi::DataType::BF16;
  d.inputs = x.dimensions().back();
  d.outputs = out->dimensions().back();
  d.rows = d.outputs ? out->element_count() / d.outputs : 0;
  d.group = group;
  d.x = x.untyped_data();
  d.values = values.untyped_data();
  d.scale = some<float>(scale);
  d.zeros = some<int8_t>(zeros);
  d.x_scale = some<float>(x_scale);
  d.out = static_cast<float*>(out->untyped_data());
  dot(d, pool_of(threads));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace efflm

XLA_FFI_DEFINE_HANDLER_SYMBOL(efflm_dot, efflm::dot_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int32_t>("format")
                                  .Attr<bool>("transposed")
                                  .Attr<bool>("round_x")
                                  .Attr<int64_t>("group")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
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
