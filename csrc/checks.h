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

inline void check_defined(const Tensor& t, const char* argument) {  // Python's None is an undefined tensor
  if (!t.defined()) refuse(argument, "None", "a tensor");
}

// The memory of a tensor that is to be float32, or bfloat16 where `bf16`, which then says so, is given.
template <class T>
T* typed(const Tensor& t, const char* argument, bool* bf16 = nullptr) {
  const ScalarType type = t.scalar_type();
  if (bf16) *bf16 = type == ScalarType::BFloat16;
  if (!t.is_cpu() || (type != ScalarType::Float && !(bf16 && *bf16)))
    refuse(argument, name(type) + " on " + device(t), bf16 ? "torch.float32 or torch.bfloat16 on cpu"
                                                           : "torch.float32 on cpu");
  return static_cast<T*>(t.data_ptr());
}

// The same of one with so many elements, contiguous.
template <class T>
T* ordered(const Tensor& t, const char* argument, int64_t elements) {
  check_defined(t, argument);
  if (t.numel() != elements || !t.is_contiguous())
    refuse(argument, shape(t) + " or its strides", std::to_string(elements) + " contiguous elements");
  return typed<T>(t, argument);
}

// The same of one with so many elements and no gaps, in any order.
template <class T>
T* memory(const Tensor& t, const char* argument, int64_t elements, bool* bf16 = nullptr) {
  check_defined(t, argument);
  int64_t reach = 1;
  for (int64_t i = 0; i < t.dim(); ++i) reach += (t.size(i) - 1) * t.stride(i);
  if (t.numel() != elements || (elements && reach != elements))
    refuse(argument, shape(t), std::to_string(elements) + " elements without gaps");
  return typed<T>(t, argument, bf16);
}

inline void check_order(const Tensor& t, const Tensor& like, const char* argument, const char* name_of_like) {
  bool same = t.sizes().equals(like.sizes());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == 1 || t.stride(i) == like.stride(i);
  if (!same) refuse(argument, "shape " + shape(t) + " or its strides", name_of_like + (" " + shape(like)) + "'s");
}

// The memory of one that is to be as `like`, which is float32 or bfloat16: of its dtype, shape and order.
inline void* alike(const Tensor& t, const Tensor& like, const char* argument, const char* name_of_like) {
  bool bf16;
  check_defined(t, argument);
  void* result = typed<void>(t, argument, &bf16);
  check_order(t, like, argument, name_of_like);
  if (t.scalar_type() != like.scalar_type()) refuse(argument, name(t.scalar_type()), name(like.scalar_type()));
  return result;
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
