// The two ops: checks of arguments, memory for results and registration by torch's stable ABI; and
// the Python module `pegasus_op`, which says what the build holds.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "kernels.h"
#include "levels.h"

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
    default: refuse("mu", mu, "torch.float32, torch.float64, torch.bfloat16 or torch.float16");
  }
}

ScalarType kl_type(Dtype dtype) {
  return dtype == float64 ? ScalarType::Double : ScalarType::Float;
}

void check_like_mu(const char* argument, const Tensor& t, const Tensor& mu) {
  const bool alike = t.defined() && t.sizes().equals(mu.sizes()) &&
                     t.scalar_type() == mu.scalar_type() && t.device() == mu.device();
  if (!alike) refuse(argument, t, "mu's " + describe(mu));
}

Dtype check(const Tensor& mu, const Tensor& logvar, const Tensor& seed) {
  if (!mu.defined() || mu.dim() != 2) refuse("mu", mu, "two dimensions (B, D)");
  const Dtype dtype = dtype_of(mu);
  check_like_mu("logvar", logvar, mu);
  if (!seed.defined() || seed.scalar_type() != ScalarType::Long || seed.numel() != 1 ||
      seed.device() != mu.device())
    refuse("seed", seed, "torch.int64 of one element on mu's device");
  return dtype;
}

// Columns must be adjacent; rows may have any stride.
Tensor with_adjacent_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Advises huge pages for a large tensor: the first touch of fresh small ones would cost more than
// the op's arithmetic.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const size_t bytes = t.numel() * t.element_size();
  if (!t.is_cpu() || bytes < 4 * page) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A contiguous tensor of mu's shape, or of its first dimension alone. type: mu's or float32.
Tensor empty(const Tensor& mu, int dimensions, ScalarType type) {
  int32_t device_type = 0, dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(mu.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(mu.get(), &dtype));
  if (type != mu.scalar_type()) dtype = aoti_torch_dtype_float32();
  const int64_t sizes[2] = {mu.size(0), mu.size(1)};
  const int64_t strides[2] = {dimensions == 2 ? std::max<int64_t>(1, mu.size(1)) : 1, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, dtype, device_type,
                                                  mu.get_device_index(), &handle));
  Tensor result(handle);
  advise_huge_pages(result);
  return result;
}

// in: mu, logvar and, backward, dz. a: outputs, dkl and row offset; the rest is filled in here.
void run(bool backward, Arguments a, const Tensor* in, const Tensor& seed, Dtype dtype) {
  for (int i = 0; i < inputs[backward]; ++i) {
    a.in[i] = in[i].data_ptr();
    a.stride[i] = in[i].stride(0);
  }
  a.seed = static_cast<const int64_t*>(seed.data_ptr());
  a.rows = in[0].size(0);
  a.columns = in[0].size(1);
#if defined(PEGASUS_CUDA)
  if (seed.is_cuda()) {
    if (a.rows == 0) return;  // a grid may not be empty
    torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(seed.get_device_index(), &stream));
    const char* error = run_on_cuda(a, dtype, backward, stream);
    if (error) throw std::runtime_error(std::string("reparameterize_kl: CUDA: ") + error);
    return;
  }
#endif
  const RowsKernel kernel = cpu_kernels().rows[backward][dtype];
  in_parallel(a.rows, a.columns, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

std::tuple<Tensor, Tensor> reparameterize_kl(const Tensor& mu, const Tensor& logvar,
                                             const Tensor& seed, int64_t row_offset) {
  const Dtype dtype = check(mu, logvar, seed);
  const Tensor in[] = {with_adjacent_columns(mu), with_adjacent_columns(logvar)};
  Tensor z = empty(mu, 2, mu.scalar_type());
  Tensor kl = empty(mu, 1, kl_type(dtype));
  Arguments a{.out = {z.data_ptr()}, .kl = kl.data_ptr(), .row_offset = row_offset};
  run(false, a, in, seed, dtype);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_kl_backward(const Tensor& dz, const Tensor& dkl,
                                                      const Tensor& mu, const Tensor& logvar,
                                                      const Tensor& seed, int64_t row_offset) {
  const Dtype dtype = check(mu, logvar, seed);
  check_like_mu("dz", dz, mu);
  if (!dkl.defined() || dkl.dim() != 1 || dkl.size(0) != mu.size(0) ||
      dkl.scalar_type() != kl_type(dtype) || dkl.device() != mu.device())
    refuse("dkl", dkl, name(kl_type(dtype)) + " of shape (B,) on mu's device");
  const Tensor in[] = {with_adjacent_columns(mu), with_adjacent_columns(logvar),
                       with_adjacent_columns(dz)};
  Tensor dmu = empty(mu, 2, mu.scalar_type());
  Tensor dlogvar = empty(mu, 2, mu.scalar_type());
  Arguments a{.out = {dmu.data_ptr(), dlogvar.data_ptr()}, .dkl = dkl.data_ptr(),
              .dkl_stride = dkl.stride(0), .row_offset = row_offset};
  run(true, a, in, seed, dtype);
  return {dmu, dlogvar};
}

STABLE_TORCH_LIBRARY(pegasus, m) {
  m.def(
      "reparameterize_kl(Tensor mu, Tensor logvar, Tensor seed, SymInt row_offset=0)"
      " -> (Tensor z, Tensor kl)");
  m.def(
      "reparameterize_kl_backward(Tensor dz, Tensor dkl, Tensor mu, Tensor logvar, Tensor seed,"
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
