// What the files of ops share: threads, what complaints are made of, and what a tensor has to be.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pegasus {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// work(first, last) for rows of so many elements. A thread is worth waking for 8192 of them, 10 to 20 us of work.
template <class Work>
void in_parallel(int64_t rows, int64_t elements, const Work& work) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, elements)), work);
}

inline std::string name(ScalarType type) {  // as Python says it
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Bool: return "torch.bool";
    default: return std::string("torch.") + torch::headeronly::toString(type);
  }
}

inline std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + (t.dim() == 1 ? ",)" : ")");
}

inline std::string device(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

[[noreturn]] inline void refuse(const std::string& argument, const std::string& got, const std::string& wanted) {
  throw std::runtime_error(argument + ": got " + got + ", wanted " + wanted);
}

// The memory of a tensor that is to be float32, or bfloat16 where `half` is given.
template <class T>
T* typed(const Tensor& t, const char* argument, bool* half = nullptr) {
  const ScalarType type = t.scalar_type();
  if (half) *half = type == ScalarType::BFloat16;
  if (!t.is_cpu() || (type != ScalarType::Float && !(half && *half)))
    refuse(argument, name(type) + " on " + device(t), half ? "torch.float32 or torch.bfloat16 on cpu"
                                                           : "torch.float32 on cpu");
  return static_cast<T*>(t.data_ptr());
}

// The same of one with so many elements, contiguous.
template <class T>
T* ordered(const Tensor& t, const char* argument, int64_t elements) {
  if (t.numel() != elements || !t.is_contiguous())
    refuse(argument, shape(t) + " or its strides", std::to_string(elements) + " contiguous elements");
  return typed<T>(t, argument);
}

// The same of one with so many elements and no gaps, in any order.
template <class T>
T* memory(const Tensor& t, const char* argument, int64_t elements, bool* half = nullptr) {
  int64_t reach = 1;
  for (int64_t i = 0; i < t.dim(); ++i) reach += (t.size(i) - 1) * t.stride(i);
  if (t.numel() != elements || (elements && reach != elements))
    refuse(argument, shape(t), std::to_string(elements) + " elements without gaps");
  return typed<T>(t, argument, half);
}

inline void check_order(const Tensor& t, const Tensor& like, const char* argument, const char* name_of_like) {
  bool same = t.sizes().equals(like.sizes());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == 1 || t.stride(i) == like.stride(i);
  if (!same) refuse(argument, "shape " + shape(t) + " or its strides", name_of_like + (" " + shape(like)) + "'s");
}

inline bool channels_innermost(const Tensor& x) {
  int64_t step = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != step) return false;
    step *= x.size(dim);
  }
  return true;
}

}  // namespace pegasus
