// Registration of the training step's ops, for CPUs: they write into tensors that fused.py makes.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "checks.h"
#include "kernels.h"

namespace pegasus {
namespace {

constexpr int64_t chunk = 16384;  // elements that are summed up before chunks are

void adam(const Tensor& weight, const Tensor& grad, const Tensor& mean, const Tensor& square, const Tensor& half,
          double rate, double root_correction, double beta1, double beta2, double epsilon, double scale) {
  const int64_t n = weight.numel();
  bool grad_is_half, wants_half;
  Adam a{memory<float>(weight, "weight", n), memory<float>(mean, "mean", n), memory<float>(square, "square", n),
         memory<void>(grad, "grad", n, &grad_is_half), memory<uint16_t>(half, "half", n, &wants_half),
         static_cast<float>(rate), static_cast<float>(root_correction), static_cast<float>(1 - beta1),
         static_cast<float>(beta2), static_cast<float>(1 - beta2), static_cast<float>(epsilon),
         static_cast<float>(scale)};
  check_order(grad, weight, "grad", "weight");
  check_order(mean, weight, "mean", "weight");
  check_order(square, weight, "square", "weight");
  check_order(half, weight, "half", "weight");
  if (!wants_half) a.half = nullptr;
  const auto kernel = chosen_step_kernels().adam[grad_is_half];
  in_parallel(n, 1, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

void add_squares(const Tensor& values, const Tensor& total) {
  const int64_t n = values.numel(), chunks = (n + chunk - 1) / chunk;
  bool half;
  const void* memory_of_values = memory<void>(values, "values", n, &half);
  const auto kernel = chosen_step_kernels().squares[half];
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
                     bool* half) {
  if (x.dim() != 4) refuse("x", shape(x), "four dimensions (B, C, H, W)");
  const int64_t images = x.size(0), channels = x.size(1), values = x.numel();
  if (!values || !channels_innermost(x) || channels % 16 || groups < 1 || channels % groups)
    refuse("x", shape(x), "not empty, in channels_last, C a multiple of 16 and of the groups");
  for (const Tensor* t : {&weight, &bias})
    if (t->dim() != 2 || t->size(0) != images || t->size(1) != channels || t->stride(1) != 1)
      refuse("weight, bias", shape(*t), "(B, C) with adjacent columns");
  float* statistics = ordered<float>(stats, "stats", 2 * images * groups);
  return {.x = memory<void>(x, "x", values, half), .weight = typed<float>(weight, "weight"),
          .bias = typed<float>(bias, "bias"), .mean = statistics,
          .inverse = statistics + images * groups, .weight_stride = weight.stride(0), .bias_stride = bias.stride(0),
          .places = values / (images * channels), .channels = channels, .groups = groups};
}

void run(void (*kernel)(const GroupNorm&, float*, int64_t, int64_t), const GroupNorm& a, int64_t images,
         int64_t room_for_places) {
  in_parallel(images, a.places * a.channels, [&](int64_t first, int64_t last) {
    std::vector<float> room((room_for_places + 6) * a.channels);
    kernel(a, room.data(), first, last);
  });
}

void silu_group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y, const Tensor& stats,
                     int64_t groups, double epsilon) {
  bool half, same;
  GroupNorm a = group_norm(x, weight, bias, stats, groups, &half);
  a.y = memory<void>(y, "y", x.numel(), &same);
  a.epsilon = static_cast<float>(epsilon);
  check_order(y, x, "y", "x");
  if (half != same) refuse("y", name(y.scalar_type()), name(x.scalar_type()));
  run(chosen_step_kernels().norm[half], a, x.size(0), 0);
}

void silu_group_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& bias,
                              const Tensor& stats, const Tensor& dx, const Tensor& dweight, const Tensor& dbias,
                              int64_t groups) {
  bool half, same, same_too;
  GroupNorm a = group_norm(x, weight, bias, stats, groups, &half);
  a.dy = memory<void>(dy, "dy", x.numel(), &same);
  a.dx = memory<void>(dx, "dx", x.numel(), &same_too);
  a.dweight = ordered<float>(dweight, "dweight", x.size(0) * x.size(1));
  a.dbias = ordered<float>(dbias, "dbias", x.size(0) * x.size(1));
  check_order(dy, x, "dy", "x");
  check_order(dx, x, "dx", "x");
  if (half != same || half != same_too) refuse("dy", name(dy.scalar_type()), name(x.scalar_type()));
  run(chosen_step_kernels().norm_backward[half], a, x.size(0), a.places);
}

SquaredError squared_error_of(const Tensor& logits, const Tensor& x, bool* half) {
  const int64_t images = x.dim() ? x.size(0) : 0, pixels = images ? x.numel() / images : 0;
  if (!logits.sizes().equals(x.sizes())) refuse("logits", shape(logits), "x's shape " + shape(x));
  if (!pixels || pixels % 16 || !x.is_contiguous() || !logits.is_contiguous())
    refuse("x, logits", shape(x), "contiguous images of a multiple of 16 numbers each");
  return {.logits = memory<void>(logits, "logits", x.numel(), half), .x = memory<float>(x, "x", x.numel()),
          .pixels = pixels};
}

void squared_error(const Tensor& logits, const Tensor& x, const Tensor& sse) {
  bool half;
  SquaredError a = squared_error_of(logits, x, &half);
  a.sse = memory<float>(sse, "sse", x.size(0));
  const auto kernel = chosen_step_kernels().error[half];
  in_parallel(x.size(0), a.pixels, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

void squared_error_backward(const Tensor& dsse, const Tensor& logits, const Tensor& x, const Tensor& dlogits) {
  bool half, same;
  SquaredError a = squared_error_of(logits, x, &half);
  a.dsse = memory<float>(dsse, "dsse", x.size(0));
  a.dlogits = memory<void>(dlogits, "dlogits", x.numel(), &same);
  check_order(dlogits, logits, "dlogits", "logits");
  if (half != same) refuse("dlogits", name(dlogits.scalar_type()), name(logits.scalar_type()));
  const auto kernel = chosen_step_kernels().error_backward[half];
  in_parallel(x.size(0), a.pixels, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(pegasus, m) {
  m.def("adam(Tensor(a!) weight, Tensor grad, Tensor(b!) mean, Tensor(c!) square, Tensor(d!) half, float rate, "
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
