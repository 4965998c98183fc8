// What a refusal says of a tensor.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>

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
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
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

}  // namespace pegasus
