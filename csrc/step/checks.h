// What the step's ops ask of their tensors: dtype, number of elements, layout.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>

#include "../reparam/parallel.h"

namespace pegasus {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string name(ScalarType type) {  // as Python prints it
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Long: return "torch.int64";
    default: return std::string("torch.") + torch::headeronly::toString(type);
  }
}

inline std::string describe(const Tensor& t) {
  if (!t.defined()) return "None";
  std::string shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape += (i ? ", " : "") + std::to_string(t.size(i));
  const std::string device = t.is_cuda() ? "cuda:" : "device ";
  return name(t.scalar_type()) + " of shape (" + shape + ") on " +
         (t.is_cpu() ? "cpu" : device + std::to_string(t.get_device_index()));
}

[[noreturn]] inline void refuse(const std::string& argument, const Tensor& t,
                                const std::string& wanted) {
  throw std::runtime_error(argument + ": got " + describe(t) + ", wanted " + wanted);
}

inline void check_defined(const Tensor& t, const char* argument) {
  if (!t.defined()) refuse(argument, t, "a tensor");
}

// The data of a float32 tensor on the CPU.
inline float* float_data(const Tensor& t, const char* argument) {
  if (!t.is_cpu() || t.scalar_type() != ScalarType::Float)
    refuse(argument, t, "torch.float32 on cpu");
  return static_cast<float*>(t.data_ptr());
}

// The data of a float32 or bfloat16 tensor on the CPU.
inline void* float_or_bfloat16_data(const Tensor& t, const char* argument) {
  const ScalarType type = t.scalar_type();
  if (!t.is_cpu() || (type != ScalarType::Float && type != ScalarType::BFloat16))
    refuse(argument, t, "torch.float32 or torch.bfloat16 on cpu");
  return t.data_ptr();
}

// The data of a contiguous float32 tensor of so many elements.
inline float* contiguous_data(const Tensor& t, const char* argument, int64_t elements) {
  check_defined(t, argument);
  if (t.numel() != elements || !t.is_contiguous())
    refuse(argument, t, std::to_string(elements) + " contiguous elements");
  return float_data(t, argument);
}

// The data of a tensor on the CPU of the dtype, shape and strides of `like`.
inline void* data_like(const Tensor& t, const Tensor& like, const char* argument,
                       const std::string& name_of_like) {
  check_defined(t, argument);
  bool alike = t.is_cpu() && t.scalar_type() == like.scalar_type();
  alike = alike && t.sizes().equals(like.sizes());
  for (int64_t i = 0; alike && i < t.dim(); ++i)
    alike = t.size(i) == 1 || t.stride(i) == like.stride(i);
  if (!alike) refuse(argument, t, name_of_like + "'s strides and " + describe(like));
  return t.data_ptr();
}

// Whether (B, C, H, W) is channels_last without gaps.
inline bool channels_innermost(const Tensor& x) {
  int64_t stride = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != stride) return false;
    stride *= x.size(dim);
  }
  return true;
}

}  // namespace pegasus
