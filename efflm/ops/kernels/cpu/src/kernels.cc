// The native kernels as XLA calls them (jax.ffi). Compiled once for each form that a machine runs: see build.py.
#include <sched.h>

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
