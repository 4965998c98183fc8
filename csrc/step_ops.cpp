// Registration of the training step's ops, for CPUs: they write into tensors that fused.py makes.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace pegasus {
namespace {

constexpr int64_t chunk = 16384;  // elements summed in float; the sums of chunks are added in double

void adam(const Tensor& weight, const Tensor& grad, const Tensor& mean, const Tensor& square, const Tensor& bf16,
          double rate, double root_correction, double beta1, double beta2, double epsilon, double scale) {
  const int64_t n = weight.numel();
  bool grad_is_bf16, wants_bf16;
  Adam a{memory<float>(weight, "weight", n), memory<float>(mean, "mean", n), memory<float>(square, "square", n),
         memory<void>(grad, "grad", n, &grad_is_bf16), memory<uint16_t>(bf16, "bf16", n, &wants_bf16),
         static_cast<float>(rate), static_cast<float>(root_correction), static_cast<float>(1 - beta1),
         static_cast<float>(beta2), static_cast<float>(1 - beta2), static_cast<float>(epsilon),
         static_cast<float>(scale)};
  check_order(grad, weight, "grad", "weight");
  check_order(mean, weight, "mean", "weight");
  check_order(square, weight, "square", "weight");
  check_order(bf16, weight, "bf16", "weight");
  if (!wants_bf16) a.bf16 = nullptr;
  const auto kernel = chosen_step_kernels().adam[grad_is_bf16];
  in_parallel(n, 1, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

void add_squares(const Tensor& values, const Tensor& total) {
  const int64_t n = values.numel(), chunks = (n + chunk - 1) / chunk;
  bool bf16;
  const void* memory_of_values = memory<void>(values, "values", n, &bf16);
  const auto kernel = chosen_step_kernels().squares[bf16];
  std::vector<float> sums(chunks);  // of fixed chunks: the same for any number of threads
  in_parallel(chunks, chunk, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) sums[i] = kernel(memory_of_values, i * chunk, std::min(n, (i + 1) * chunk));
  });
  double all = 0;
  for (float sum : sums) all += sum;
  *memory<float>(total, "total", 1) += static_cast<float>(all);
}

// x (B, C, H, W) to the record that both directions share.
GroupNorm group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& stats, int64_t groups,
                     bool* bf16) {
  check_defined(x, "x");
  if (x.dim() != 4) refuse("x", shape(x), "four dimensions (B, C, H, W)");
  const int64_t images = x.size(0), channels = x.size(1), values = x.numel();
  if (!values || !channels_innermost(x) || channels % 16 || groups < 1 || channels % groups)
    refuse("x", shape(x), "not empty, in channels_last, C a multiple of 16 and of the groups");
  for (const Tensor* t : {&weight, &bias}) {
    check_defined(*t, "weight, bias");
    if (t->dim() != 2 || t->size(0) != images || t->size(1) != channels || t->stride(1) != 1)
      refuse("weight, bias", shape(*t), "(B, C) with adjacent columns");
  }
  float* statistics = ordered<float>(stats, "stats", 2 * images * groups);
  return {.x = memory<void>(x, "x", values, bf16), .weight = typed<float>(weight, "weight"),
          .bias = typed<float>(bias, "bias"), .mean = statistics,
          .inverse = statistics + images * groups, .weight_stride = weight.stride(0), .bias_stride = bias.stride(0),
          .places = values / (images * channels), .channels = channels, .groups = groups};
}

void run(void (*kernel)(const GroupNorm&, float*, int64_t, int64_t), const GroupNorm& a, int64_t images,
         int64_t places) {
  in_parallel(images, a.places * a.channels, [&](int64_t first, int64_t last) {
    const auto scratch = std::make_unique_for_overwrite<float[]>((places + 6) * a.channels);
    kernel(a, scratch.get(), first, last);
  });
}

void silu_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y, const Tensor& stats,
                     int64_t groups, double epsilon) {
  bool bf16;
  GroupNorm a = group_norm(x, weight, bias, stats, groups, &bf16);
  a.y = alike(y, x, "y", "x");
  a.epsilon = static_cast<float>(epsilon);
  run(chosen_step_kernels().norm[bf16], a, x.size(0), 0);
}

void silu_group_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias,
                              const Tensor& stats, const Tensor& dx, const Tensor& dweight, const Tensor& dbias,
                              int64_t groups) {
  bool bf16;
  GroupNorm a = group_norm(x, weight, bias, stats, groups, &bf16);
  a.dy = alike(dy, x, "dy", "x");
  a.dx = alike(dx, x, "dx", "x");
  a.dweight = ordered<float>(dweight, "dweight", x.size(0) * x.size(1));
  a.dbias = ordered<float>(dbias, "dbias", x.size(0) * x.size(1));
  run(chosen_step_kernels().norm_backward[bf16], a, x.size(0), a.places);
}

SquaredError squared_error_of(const Tensor& logits, const Tensor& x, bool* bf16) {
  const int64_t images = x.dim() ? x.size(0) : 0, pixels = images ? x.numel() / images : 0;
  if (!logits.sizes().equals(x.sizes())) refuse("logits", shape(logits), "x's shape " + shape(x));
  if (!pixels || pixels % 16 || !x.is_contiguous() || !logits.is_contiguous())
    refuse("x, logits", shape(x), "contiguous images of a multiple of 16 numbers each");
  return {.logits = memory<void>(logits, "logits", x.numel(), bf16), .x = memory<float>(x, "x", x.numel()),
          .pixels = pixels};
}

void squared_error(const Tensor& logits, const Tensor& x, const Tensor& sse) {
  bool bf16;
  SquaredError a = squared_error_of(logits, x, &bf16);
  a.sse = memory<float>(sse, "sse", x.size(0));
  const auto kernel = chosen_step_kernels().error[bf16];
  in_parallel(x.size(0), a.pixels, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

void squared_error_backward(const Tensor& dsse, const Tensor& logits, const Tensor& x, const Tensor& dlogits) {
  bool bf16;
  SquaredError a = squared_error_of(logits, x, &bf16);
  a.dsse = memory<float>(dsse, "dsse", x.size(0));
  a.dlogits = alike(dlogits, logits, "dlogits", "logits");
  const auto kernel = chosen_step_kernels().error_backward[bf16];
  in_parallel(x.size(0), a.pixels, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(pegasus, m) {
  m.def("adam(Tensor(a!) weight, Tensor grad, Tensor(b!) mean, Tensor(c!) square, Tensor(d!) bf16, float rate, "
        "float root_correction, float beta1, float beta2, float epsilon, float scale) -> ()");
  m.def("add_squares(Tensor values, Tensor(a!) total) -> ()");
  m.def("silu_group_norm(Tensor x, Tensor weight, Tensor bias, Tensor(a!) y, Tensor(b!) stats, int groups, "
        "float epsilon) -> ()");
  m.def("silu_group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor stats, Tensor(a!) dx, "
        "Tensor(b!) dweight, Tensor(c!) dbias, int groups) -> ()");
  m.def("squared_error(Tensor logits, Tensor x, Tensor(a!) sse) -> ()");
  m.def("squared_error_backward(Tensor dsse, Tensor logits, Tensor x, Tensor(a!) dlogits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pegasus, CPU, m) {
  m.impl("adam", TORCH_BOX(&adam));
  m.impl("add_squares", TORCH_BOX(&add_squares));
  m.impl("silu_group_norm", TORCH_BOX(&silu_group_norm));
  m.impl("silu_group_norm_backward", TORCH_BOX(&silu_group_norm_backward));
  m.impl("squared_error", TORCH_BOX(&squared_error));
  m.impl("squared_error_backward", TORCH_BOX(&squared_error_backward));
}

}  // namespace
}  // namespace pegasus
