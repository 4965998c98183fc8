// What both files of ops share: threads, and what complaints are made of.
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

}  // namespace pegasus
