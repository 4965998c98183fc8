// Registration through torch's stable ABI, the checks of arguments, the choice of the instruction set, and
// the Python module `pegasus_op`, which says what the build holds.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "kernels.h"

#ifndef PEGASUS_CUDA_ARCHITECTURES
#define PEGASUS_CUDA_ARCHITECTURES ""
#endif

namespace pegasus {
namespace {

// ---- instruction sets ----

struct Level {
  const CpuKernels* kernels;
  const StepKernels* step;
  const TileKernels* tiles;
  bool supported;
};

std::vector<Level> levels() {  // lowest first
#if defined(PEGASUS_X86)
  __builtin_cpu_init();
  return {{&baseline::kernels, &baseline::step_kernels, &baseline::tile_kernels, true},
          {&avx2::kernels, &avx2::step_kernels, &avx2::tile_kernels, __builtin_cpu_supports("avx2") != 0},
          {&avx512::kernels, &avx512::step_kernels, &avx512::tile_kernels, __builtin_cpu_supports("avx512f") != 0}};
#else
  return {{&baseline::kernels, &baseline::step_kernels, &baseline::tile_kernels, true}};
#endif
}

Level choose_level() {
  const char* set = std::getenv("PEGASUS_SIMD");
  const std::string wanted = set ? set : "";
  Level best{};
  std::string names;
  for (const Level& level : levels()) {
    if (wanted == level.kernels->level) {
      if (!level.supported)
        throw std::runtime_error("PEGASUS_SIMD: got " + wanted + ", which this processor lacks");
      return level;
    }
    if (level.supported) best = level;
    names += (names.empty() ? "" : ", ") + std::string(level.kernels->level);
  }
  if (!wanted.empty())
    throw std::runtime_error("PEGASUS_SIMD: got '" + wanted + "', wanted one of " + names);
  return best;
}

const Level& chosen_level() {
  static const Level chosen = choose_level();
  return chosen;
}

const CpuKernels& cpu_kernels() { return *chosen_level().kernels; }

// ---- checks ----

// `argument` is to be what `like`, mu, is: shape, dtype and device.
void check_like(const Tensor& t, const Tensor& like, const char* argument) {
  check_defined(t, argument);
  if (!t.sizes().equals(like.sizes())) refuse(argument, "shape " + shape(t), "mu's " + shape(like));
  if (t.scalar_type() != like.scalar_type())
    refuse(argument, "dtype " + name(t.scalar_type()), "mu's " + name(like.scalar_type()));
  if (t.device() != like.device()) refuse(argument, "device " + device(t), "mu's " + device(like));
}

Dtype check(const Tensor& mu, const Tensor& logvar, const Tensor& seed) {
  check_defined(mu, "mu"), check_defined(seed, "seed");
  if (mu.dim() != 2) refuse("mu", "shape " + shape(mu), "two dimensions (B, D)");
  Dtype dtype;
  switch (mu.scalar_type()) {
    case ScalarType::Float: dtype = float32; break;
    case ScalarType::Double: dtype = float64; break;
    case ScalarType::BFloat16: dtype = bfloat16; break;
    case ScalarType::Half: dtype = float16; break;
    default:
      refuse("mu", name(mu.scalar_type()), "one of torch.float32, torch.float64, torch.bfloat16, torch.float16");
  }
  check_like(logvar, mu, "logvar");
  if (seed.scalar_type() != ScalarType::Long || seed.numel() != 1 || seed.device() != mu.device())
    refuse("seed", name(seed.scalar_type()) + " of " + std::to_string(seed.numel()) + " elements on " + device(seed),
           "torch.int64 of one element on " + device(mu));
  return dtype;
}

// ---- the two ops ----

// Columns must be adjacent; rows may have any stride.
Tensor with_adjacent_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Above some megabytes the first touch of fresh pages costs more than the op's arithmetic: ask for huge ones. Advice
// only: where the system gives none, nothing changes.
void ask_for_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t huge_page = uintptr_t{1} << 21;
  const size_t bytes = t.numel() * t.element_size();
  if (!t.is_cpu() || bytes < 4 * huge_page) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + bytes;
  const uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page, last = end / huge_page * huge_page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  int32_t device_type = 0, dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  if (type != like.scalar_type()) dtype = aoti_torch_dtype_float32();
  const int64_t strides[2] = {sizes.size() == 2 ? std::max<int64_t>(1, sizes.begin()[1]) : 1, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, dtype, device_type,
                                                  like.get_device_index(), &handle));
  Tensor result(handle);
  ask_for_huge_pages(result);
  return result;
}

Arguments arguments(const Tensor& mu, const Tensor& logvar, const Tensor& seed, int64_t row_offset) {
  return {.mu = mu.data_ptr(), .logvar = logvar.data_ptr(), .seed = static_cast<const int64_t*>(seed.data_ptr()),
          .rows = mu.size(0), .columns = mu.size(1), .row_offset = row_offset,
          .mu_stride = mu.stride(0), .logvar_stride = logvar.stride(0)};
}

#if defined(PEGASUS_CUDA)
void run_on_cuda(int (*launch)(const Arguments&, Dtype, void*), const Arguments& a, Dtype dtype, int32_t index) {
  if (a.rows == 0) return;  // a grid may not be empty
  torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  if (int error = launch(a, dtype, stream))
    throw std::runtime_error(std::string("reparameterize_kl: CUDA did not launch the kernel: ") + cuda_message(error));
}
#endif

void run(bool forward, const Arguments& a, Dtype dtype, const Tensor& mu) {
#if defined(PEGASUS_CUDA)
  if (mu.is_cuda()) return run_on_cuda(forward ? cuda_forward : cuda_backward, a, dtype, mu.get_device_index());
#endif
  (void)mu;
  const RangeKernel kernel = (forward ? cpu_kernels().forward : cpu_kernels().backward)[dtype];
  in_parallel(a.rows, a.columns, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

std::tuple<Tensor, Tensor> reparameterize_kl(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                             int64_t row_offset) {
  const Dtype dtype = check(mu, logvar, seed);
  const Tensor m = with_adjacent_columns(mu), v = with_adjacent_columns(logvar);
  Tensor z = empty({mu.size(0), mu.size(1)}, mu.scalar_type(), mu);
  Tensor kl = empty({mu.size(0)}, dtype == float64 ? ScalarType::Double : ScalarType::Float, mu);
  Arguments a = arguments(m, v, seed, row_offset);
  a.z = z.data_ptr();
  a.kl = kl.data_ptr();
  run(true, a, dtype, mu);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_kl_backward(const Tensor& dz, const Tensor& dkl, const Tensor& mu,
                                                      const Tensor& logvar, const Tensor& seed, int64_t row_offset) {
  const Dtype dtype = check(mu, logvar, seed);
  check_like(dz, mu, "dz"), check_defined(dkl, "dkl");
  const ScalarType kl_type = dtype == float64 ? ScalarType::Double : ScalarType::Float;
  if (dkl.dim() != 1 || dkl.size(0) != mu.size(0) || dkl.scalar_type() != kl_type || dkl.device() != mu.device())
    refuse("dkl", name(dkl.scalar_type()) + " of shape " + shape(dkl) + " on " + device(dkl),
           name(kl_type) + " of shape (" + std::to_string(mu.size(0)) + ",) on " + device(mu));
  const Tensor m = with_adjacent_columns(mu), v = with_adjacent_columns(logvar), g = with_adjacent_columns(dz);
  Tensor dmu = empty({mu.size(0), mu.size(1)}, mu.scalar_type(), mu);
  Tensor dlogvar = empty({mu.size(0), mu.size(1)}, mu.scalar_type(), mu);
  Arguments a = arguments(m, v, seed, row_offset);
  a.dz = g.data_ptr();
  a.dkl = dkl.data_ptr();
  a.dz_stride = g.stride(0);
  a.dkl_stride = dkl.stride(0);
  a.dmu = dmu.data_ptr();
  a.dlogvar = dlogvar.data_ptr();
  run(false, a, dtype, mu);
  return {dmu, dlogvar};
}

STABLE_TORCH_LIBRARY(pegasus, m) {
  m.def("reparameterize_kl(Tensor mu, Tensor logvar, Tensor seed, SymInt row_offset=0) -> (Tensor z, Tensor kl)");
  m.def(
      "reparameterize_kl_backward(Tensor dz, Tensor dkl, Tensor mu, Tensor logvar, Tensor seed, SymInt row_offset=0)"
      " -> (Tensor dmu, Tensor dlogvar)");
}

STABLE_TORCH_LIBRARY_IMPL(pegasus, CPU, m) {
  m.impl("reparameterize_kl", TORCH_BOX(&reparameterize_kl));
  m.impl("reparameterize_kl_backward", TORCH_BOX(&reparameterize_kl_backward));
}

#if defined(PEGASUS_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pegasus, CUDA, m) {
  m.impl("reparameterize_kl", TORCH_BOX(&reparameterize_kl));
  m.impl("reparameterize_kl_backward", TORCH_BOX(&reparameterize_kl_backward));
}
#endif

}  // namespace

const StepKernels& chosen_step_kernels() { return *chosen_level().step; }
const TileKernels& chosen_tile_kernels() { return *chosen_level().tiles; }

}  // namespace pegasus

PYBIND11_MODULE(pegasus_op, module) {
  module.doc() = "The compiled op behind reparam.py; importing it registers torch.ops.pegasus.";
  pybind11::list names;
  for (const auto& level : pegasus::levels()) names.append(level.kernels->level);
  module.attr("simd_levels") = pybind11::tuple(names);
  module.attr("simd_level") = pegasus::cpu_kernels().level;
  module.attr("cuda_architectures") = PEGASUS_CUDA_ARCHITECTURES;
}
