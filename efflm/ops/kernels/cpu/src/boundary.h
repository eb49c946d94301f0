// Between XLA and the kernels: what it hands over is checked, so that nothing outside of an array is read or written,
// and what a kernel throws becomes an error of the call.
#pragma once

#include <sched.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "team.h"
#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace efflm {
namespace {

namespace ffi = xla::ffi;
using ffi::DataType;

template <typename Run>
ffi::Error guarded(const Run& run) {
  try {
    run();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "a CPU kernel found no memory for what it computes");
  }
}

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(std::string("a CPU kernel was called with ") + what);
}

void require(bool good, const char* name, const ffi::AnyBuffer& array) {
  if (good) return;
  std::string what = std::string(name) + " of shape [";
  for (const int64_t size : array.dimensions()) what += std::to_string(size) + ", ";
  if (array.dimensions().size()) what.resize(what.size() - 2);
  what += "] and dtype number " + std::to_string(int(array.element_type())) + ", which does not fit the others";
  require(false, what.c_str());
}

bool is_float(const ffi::AnyBuffer& array) {
  return array.element_type() == DataType::F32 || array.element_type() == DataType::BF16;
}

bool has(const ffi::AnyBuffer& array, int64_t count, DataType type) {
  return int64_t(array.element_count()) == count && array.element_type() == type;
}

// Whether an array that may be left out, which is one without elements, has `count` of them where it is there.
bool may_have(const ffi::AnyBuffer& array, int64_t count, DataType type) {
  return array.element_count() == 0 || has(array, count, type);
}

bool has_shape(const ffi::AnyBuffer& array, std::initializer_list<int64_t> shape, DataType type) {
  const auto found = array.dimensions();
  return array.element_type() == type && found.size() == shape.size() &&
         std::equal(found.begin(), found.end(), shape.begin());
}

template <typename T>
const T* some(const ffi::AnyBuffer& buffer) {  // null: an array without elements
  return buffer.element_count() ? static_cast<const T*>(buffer.untyped_data()) : nullptr;
}

int64_t processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

Pool pool_of(ffi::ThreadPool& threads) {
  static const int64_t most = processors();
  auto schedule = [](void* context, void (*function)()) {
    static_cast<ffi::ThreadPool*>(context)->Schedule([function] { function(); });
  };
  return Pool(least(threads.num_threads(), most), schedule, &threads);
}

constexpr int kArrays = 5, kAttributes = 5;  // of a weight

struct Attributes {  // of one weight, as Python gives them
  int64_t format, transposed, round_x, group, super_shift;
};

// The attributes of `count` weights, behind which there may be more numbers.
const Attributes* attributes_of(ffi::Span<const int64_t> numbers, const ffi::RemainingArgs& arrays, size_t count,
                                size_t more) {
  const bool fits = numbers.size() == kAttributes * count + more && arrays.size() == kArrays * count;
  require(fits, "another number of weights than of outputs");
  return reinterpret_cast<const Attributes*>(numbers.begin());
}

// Weight `index` from its arrays: values, scale, zeros, scale of the activations, codes of the scale.
Weight weight_of(const Attributes* all, ffi::RemainingArgs& arrays, int index, int64_t inputs, int64_t outputs) {
  const Attributes& given = all[index];
  auto array = [&](int i) { return *arrays.get<ffi::AnyBuffer>(kArrays * index + i); };
  const auto known = {Format::kInt2, Format::kInt3, Format::kInt4, Format::kInt8, Format::kBfloat16, Format::kFloat32};
  require(std::count(known.begin(), known.end(), Format(given.format)) == 1, "a weight of an unknown format");
  require(inputs > 0 && outputs > 0, "a weight without inputs or outputs");
  Weight w;
  w.format = Format(given.format);
  w.transposed = given.transposed;
  w.round_x = given.round_x;
  w.group = given.group;
  w.inputs = inputs;
  w.outputs = outputs;
  w.values = array(0).untyped_data();
  w.scale = array(1).untyped_data();
  const DataType scales = array(1).element_type();
  w.scale_type = scales == DataType::F16    ? ScaleType::kFloat16
                 : scales == DataType::BF16 ? ScaleType::kBfloat16
                                            : ScaleType::kFloat32;
  w.zeros = some<int8_t>(array(2));
  w.x_scale = some<float>(array(3));
  w.scale_codes = some<int8_t>(array(4));
  w.super_shift = int(given.super_shift);
  if (w.quantized()) {
    require(given.super_shift >= 0 && given.super_shift < 16, "super-blocks of 2^16 groups or more");
    const int64_t outputs_held = w.panels() * kPanel, of_groups = w.groups() * outputs_held;
    const int64_t of_scales = w.scale_codes ? w.super_blocks(w.groups()) * outputs_held : of_groups;
    require(w.group >= 0 && w.group % w.unit() == 0, "groups that are no multiple of 8, or of 16 below 4 bits");
    require(has(array(0), outputs_held * w.filled() * w.bits() / 8, DataType::U8), "codes of a weight", array(0));
    require(is_float(array(1)) || scales == DataType::F16, "scales of a weight", array(1));
    require(has(array(1), of_scales, scales), "scales of a weight", array(1));
    require(may_have(array(2), of_groups, DataType::S8), "zeros of a weight", array(2));
    require(may_have(array(4), of_groups, DataType::S8), "codes of scales of a weight", array(4));
    require(may_have(array(3), 1, DataType::F32), "a scale of the activations", array(3));
  } else {
    const DataType type = w.format == Format::kFloat32 ? DataType::F32 : DataType::BF16;
    const int64_t first = w.transposed ? outputs : inputs, second = w.transposed ? inputs : outputs;
    require(has_shape(array(0), {first, second}, type), "a weight", array(0));
    require(!w.round_x, "a weight of floats that is to round activations");
  }
  return w;
}

Rows rows_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& scale, const ffi::AnyBuffer& bias, float epsilon,
             bool to_bfloat16) {
  require(x.dimensions().size() > 0 && is_float(x), "rows", x);
  Rows rows;
  rows.x = x.untyped_data();
  rows.inputs = x.dimensions().back();
  rows.rows = rows.inputs ? x.element_count() / rows.inputs : 0;
  rows.is_bfloat16 = x.element_type() == DataType::BF16;
  rows.norm_scale = some<float>(scale);
  rows.norm_bias = some<float>(bias);
  rows.epsilon = epsilon;
  rows.to_bfloat16 = to_bfloat16;
  require(may_have(scale, rows.inputs, DataType::F32), "a scale of a norm", scale);
  require(may_have(bias, rows.inputs, DataType::F32) && (rows.norm_scale || !rows.norm_bias), "a bias of a norm", bias);
  return rows;
}

// The number of columns of an output that has as many rows as x, and the like residual.
int64_t outputs_of(const Rows& x, const ffi::AnyBuffer& out, const ffi::AnyBuffer& residual) {
  require(out.dimensions().size() > 0, "an output", out);
  const int64_t outputs = out.dimensions().back();
  require(has(out, x.rows * outputs, DataType::F32), "an output", out);
  require(may_have(residual, x.rows * outputs, DataType::F32), "a residual", residual);
  return outputs;
}

}  // namespace
}  // namespace efflm
