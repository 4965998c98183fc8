// The op silu_group_norm and its backward, for CPUs. They write into tensors that the caller makes.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "checks.h"
#include "kernels.h"

namespace pegasus {
namespace {

void check_affine(const Tensor& t, const Tensor& x, const char* argument) {
  check_defined(t, argument);
  if (t.dim() != 2 || t.size(0) != x.size(0) || t.size(1) != x.size(1) || t.stride(1) != 1)
    refuse(argument, t, "(B, C) with adjacent columns");
}

// The arguments that both directions share. x: (B, C, H, W).
GroupNorm group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const Tensor& stats, int64_t groups) {
  check_defined(x, "x");
  if (x.dim() != 4) refuse("x", x, "four dimensions (B, C, H, W)");
  const int64_t images = x.size(0);
  const int64_t channels = x.size(1);
  if (!x.numel() || !channels_innermost(x) || channels % 16 || groups < 1 || channels % groups)
    refuse("x", x, "not empty, in channels_last, C a multiple of 16 and of the groups");
  check_affine(weight, x, "weight");
  check_affine(bias, x, "bias");
  float* mean = contiguous_data(stats, "stats", 2 * images * groups);
  return {.x = float_or_bfloat16_data(x, "x"),
          .weight = float_data(weight, "weight"),
          .bias = float_data(bias, "bias"),
          .mean = mean,
          .inverse = mean + images * groups,
          .weight_stride = weight.stride(0),
          .bias_stride = bias.stride(0),
          .pixels = x.size(2) * x.size(3),
          .channels = channels,
          .groups = groups};
}

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

// scratch: how many numbers a thread's part needs besides its images.
void run(NormKernel kernel, const GroupNorm& a, int64_t images, int64_t scratch) {
  in_parallel(images, a.pixels * a.channels, [&](int64_t first, int64_t last) {
    const auto memory = std::make_unique_for_overwrite<float[]>(scratch);
    kernel(a, memory.get(), first, last);
  });
}

void silu_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y,
                     const Tensor& stats, int64_t groups, double epsilon) {
  GroupNorm a = group_norm(x, weight, bias, stats, groups);
  a.y = data_like(y, x, "y", "x");
  a.epsilon = static_cast<float>(epsilon);
  run(norm_kernels().forward[is_bfloat16(x)], a, x.size(0), 6 * a.channels);
}

void silu_group_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                              const Tensor& bias, const Tensor& stats, const Tensor& dx,
                              const Tensor& dweight, const Tensor& dbias, int64_t groups) {
  GroupNorm a = group_norm(x, weight, bias, stats, groups);
  a.dy = data_like(dy, x, "dy", "x");
  a.dx = data_like(dx, x, "dx", "x");
  a.dweight = contiguous_data(dweight, "dweight", x.size(0) * x.size(1));
  a.dbias = contiguous_data(dbias, "dbias", x.size(0) * x.size(1));
  run(norm_kernels().backward[is_bfloat16(x)], a, x.size(0), (a.pixels + 6) * a.channels);
}

STABLE_TORCH_LIBRARY_FRAGMENT(pegasus_step, m) {
  m.def(
      "silu_group_norm(Tensor x, Tensor weight, Tensor bias, Tensor(a!) y, Tensor(b!) stats,"
      " int groups, float epsilon) -> ()");
  m.def(
      "silu_group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor stats,"
      " Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, int groups) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pegasus_step, CPU, m) {
  m.impl("silu_group_norm", TORCH_BOX(&silu_group_norm));
  m.impl("silu_group_norm_backward", TORCH_BOX(&silu_group_norm_backward));
}

}  // namespace
}  // namespace pegasus
