// torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace pegasus {

// Calls work(first, last) for rows of so many elements, in several threads where each gets at least
// 8192 elements: that is 10 to 20 us of work, below which a thread is not worth waking.
template <class Work>
void in_parallel(int64_t rows, int64_t elements, const Work& work) {
  const int64_t grain = 8192 / std::max<int64_t>(1, elements);
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, grain), work);
}

}  // namespace pegasus
