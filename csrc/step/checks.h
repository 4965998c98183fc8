// What the step's ops ask of their tensors: dtype, number of elements, layout.
#pragma once
#include <string>

#include "../reparam/describe.h"
#include "../reparam/parallel.h"

namespace pegasus {

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
