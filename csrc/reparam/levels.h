// The choice of an instruction set, which the sources call a level: baseline, avx2 or avx512.
#pragma once
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

// Pointers to the `kernels` of all levels that the build has, lowest first.
#if defined(PEGASUS_X86)
#define PEGASUS_ALL_LEVELS(kernels) {&baseline::kernels, &avx2::kernels, &avx512::kernels}
#else
#define PEGASUS_ALL_LEVELS(kernels) {&baseline::kernels}
#endif

namespace pegasus {

inline bool processor_has(const std::string& level) {
#if defined(PEGASUS_X86)
  __builtin_cpu_init();
  if (level == "avx2") return __builtin_cpu_supports("avx2");
  if (level == "avx512") return __builtin_cpu_supports("avx512f");
#endif
  return level == "baseline";
}

// The best kernels for this processor, or those of the environment variable PEGASUS_SIMD's level.
template <class Kernels>
const Kernels& choose(const std::vector<const Kernels*>& all) {
  const char* variable = std::getenv("PEGASUS_SIMD");
  const std::string wanted = variable ? variable : "";
  const Kernels* best = nullptr;
  std::string names;
  for (const Kernels* kernels : all) {
    if (!processor_has(kernels->level)) continue;
    if (wanted.empty() || wanted == kernels->level) best = kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->level);
  }
  if (best) return *best;
  names += ", which this processor has";
  throw std::runtime_error("PEGASUS_SIMD: got '" + wanted + "', wanted one of " + names);
}

}  // namespace pegasus
