// The two ops: checks of arguments, memory for results and registration by torch's stable ABI; and
// the Python module `pegasus_op`, which says what the build holds.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "describe.h"
#include "kernels.h"
#include "levels.h"
#include "parallel.h"

namespace pegasus {
namespace {

const CpuKernels& cpu_kernels() {
  static const CpuKernels& best = choose<CpuKernels>(PEGASUS_ALL_LEVELS(kernels));
  return best;
}

Dtype dtype_of(const Tensor& mu) {
  switch (mu.scalar_type()) {
    case ScalarType::Float: return float32;
    case ScalarType::Double: return float64;
    case ScalarType::BFloat16: return bfloat16;
    case ScalarType::Half: return float16;
    default: refuse("mu", mu, "a floating-point type");
  }
}

ScalarType kl_type(Dtype dtype) {
  return dtype == float64 ? ScalarType::Double : ScalarType::Float;
}

bool is_like(const Tensor& t, const Tensor& mu) {
  return t.defined() && t.sizes().equals(mu.sizes()) && t.scalar_type() == mu.scalar_type() &&
         t.device() == mu.device();
}

// What memory safety needs, however the op is called.
Dtype check(const Tensor& mu, const Tensor& logvar, const Tensor& seed, int64_t row_offset) {
  if (!mu.defined() || mu.dim() != 2) refuse("mu", mu, "two dimensions (B, D)");
  const Dtype dtype = dtype_of(mu);
  if (!is_like(logvar, mu)) refuse("logvar", logvar, "mu's " + describe(mu));
  if (!seed.defined() || seed.scalar_type() != ScalarType::Long || seed.numel() != 1 ||
      seed.device() != mu.device())
    refuse("seed", seed, "torch.int64 of one element on mu's device");
  if (row_offset < 0 || row_offset > INT64_MAX - mu.size(0))
    throw std::runtime_error("row_offset: got " + std::to_string(row_offset) +
                             ", wanted 0 to 2^63 - 1 - B");
  return dtype;
}

// Columns must be adjacent; rows may have any stride.
Tensor with_adjacent_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// A contiguous tensor (rows, columns), or (rows,) without columns, on mu's device.
Tensor empty(const Tensor& mu, int64_t rows, std::optional<int64_t> columns, ScalarType type) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(mu.get(), &device_type));
  const int32_t dtype = static_cast<int32_t>(type);
  const int64_t sizes[2] = {rows, columns.value_or(1)};
  const int64_t strides[2] = {std::max<int64_t>(1, sizes[1]), 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(columns ? 2 : 1, sizes, strides, dtype,
                                                  device_type, mu.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty_like_mu(const Tensor& mu) {
  return empty(mu, mu.size(0), mu.size(1), mu.scalar_type());
}

// in: mu, logvar and, backward, dz.
Arguments arguments_of(const Tensor* in, int count, const Tensor& seed, int64_t row_offset) {
  Arguments a{.seed = static_cast<const int64_t*>(seed.data_ptr()),
              .rows = in[0].size(0),
              .columns = in[0].size(1),
              .row_offset = row_offset};
  a.segments = std::max<int64_t>(1, (a.columns + segment - 1) / segment);
  for (int i = 0; i < count; ++i) {
    a.in[i] = in[i].data_ptr();
    a.stride[i] = in[i].stride(0);
  }
  return a;
}

#if defined(PEGASUS_CUDA)
void run_on_current_stream(bool backward, Arguments a, const Tensor& mu, Dtype dtype) {
  if (a.rows == 0) return;  // a grid may not be empty
  torch::stable::accelerator::DeviceGuard guard(mu.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(mu.get_device_index(), &stream));
  Tensor sums = empty(mu, a.segments > 1 ? a.rows * a.segments : 0, {}, ScalarType::Double);
  a.sums = static_cast<double*>(sums.data_ptr());
  const char* error = run_on_cuda(a, dtype, backward, stream);
  if (error) throw std::runtime_error(std::string("reparameterize_kl: CUDA: ") + error);
}
#endif

void run_in_threads(bool backward, Arguments a, Dtype dtype) {
  const int64_t count = a.rows * a.segments;
  const std::unique_ptr<double[]> sums(a.kl ? new double[count] : nullptr);
  a.sums = sums.get();
  const SegmentsKernel kernel = cpu_kernels().segments[backward][dtype];
  in_parallel(count, std::min(a.columns, segment),
              [&](int64_t first, int64_t last) { kernel(a, first, last); });
  if (a.kl) add_segments(a, dtype);
}

void run(bool backward, const Arguments& a, const Tensor& mu, Dtype dtype) {
#if defined(PEGASUS_CUDA)
  if (mu.is_cuda()) return run_on_current_stream(backward, a, mu, dtype);
#endif
  run_in_threads(backward, a, dtype);
}

std::tuple<Tensor, Tensor> reparameterize_kl(const Tensor& mu, const Tensor& logvar,
                                             const Tensor& seed, int64_t row_offset, bool with_kl) {
  const Dtype dtype = check(mu, logvar, seed, row_offset);
  const Tensor in[] = {with_adjacent_columns(mu), with_adjacent_columns(logvar)};
  Tensor z = empty_like_mu(mu);
  Tensor kl = empty(mu, with_kl ? mu.size(0) : 0, {}, kl_type(dtype));
  Arguments a = arguments_of(in, 2, seed, row_offset);
  a.out[0] = z.data_ptr();
  if (with_kl) a.kl = kl.data_ptr();
  run(false, a, mu, dtype);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_kl_backward(const Tensor& dz, std::optional<Tensor> dkl,
                                                      const Tensor& mu, const Tensor& logvar,
                                                      const Tensor& seed, int64_t row_offset) {
  const Dtype dtype = check(mu, logvar, seed, row_offset);
  if (!is_like(dz, mu)) refuse("dz", dz, "mu's " + describe(mu));
  if (dkl && (dkl->dim() != 1 || dkl->size(0) != mu.size(0) || dkl->device() != mu.device() ||
              dkl->scalar_type() != kl_type(dtype)))
    refuse("dkl", *dkl, name(kl_type(dtype)) + " of shape (B,), on mu's device");
  const Tensor in[] = {with_adjacent_columns(mu), with_adjacent_columns(logvar),
                       with_adjacent_columns(dz)};
  Tensor dmu = empty_like_mu(mu);
  Tensor dlogvar = empty_like_mu(mu);
  Arguments a = arguments_of(in, 3, seed, row_offset);
  a.out[0] = dmu.data_ptr();
  a.out[1] = dlogvar.data_ptr();
  if (dkl) {
    a.dkl = dkl->data_ptr();
    a.dkl_stride = dkl->stride(0);
  }
  run(true, a, mu, dtype);
  return {dmu, dlogvar};
}

STABLE_TORCH_LIBRARY(pegasus, m) {
  m.def(
      "reparameterize_kl(Tensor mu, Tensor logvar, Tensor seed, SymInt row_offset=0,"
      " bool with_kl=True) -> (Tensor z, Tensor kl)");
  m.def(
      "reparameterize_kl_backward(Tensor dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor seed,"
      " SymInt row_offset=0) -> (Tensor dmu, Tensor dlogvar)");
}

template <class Library>
void implement(Library& m) {
  m.impl("reparameterize_kl", TORCH_BOX(&reparameterize_kl));
  m.impl("reparameterize_kl_backward", TORCH_BOX(&reparameterize_kl_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pegasus, CPU, m) { implement(m); }
#if defined(PEGASUS_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pegasus, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace pegasus

PYBIND11_MODULE(pegasus_op, module) {
  module.doc() = "The compiled op behind reparam.py; importing it registers torch.ops.pegasus.";
  module.attr("simd_level") = pegasus::cpu_kernels().level;
  module.attr("cuda_architectures") = PEGASUS_CUDA_ARCHITECTURES;
}
