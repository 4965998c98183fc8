// Registration of 3 x 3 convolutions in tiles (tiles.cpp), for CPUs: they write into tensors that fused.py makes.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "vectors.h"

namespace pegasus {
namespace {

// Scratch memory of a thread's own, reused: fresh pieces leave gaps, 30 MB of them in the end.
class Scratch {
 public:
  Tensor tensor(int64_t count, int64_t rows, int64_t columns) {
    const int64_t needed = (count * rows * columns + 15) / 16 * 16;
    if (size < needed || memory.use_count() > 1) {  // or somebody reads what is there
      size = 0;
      memory.reset();
      memory.reset(static_cast<float*>(std::aligned_alloc(64, needed * sizeof(float))), std::free);
      if (!memory) throw std::bad_alloc();
      size = needed;
    }
    return torch::stable::from_blob(memory.get(), {count, rows, columns}, {rows * columns, columns, 1},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
  }

  std::shared_ptr<float> memory;

 private:
  int64_t size = 0;
};

thread_local Scratch scratch_inputs, scratch_gradients, scratch_products, scratch_sums;

// n images (B, C, H, W), from the first on.
struct Part {
  const Tensor& images;
  int64_t first, n;

  int64_t tiles() const { return n * images.size(2) * images.size(3) / 16; }

  void run(void (*kernel)(const Tiles&, int64_t, int64_t), const Tensor& planes, const float* bias) const {
    const int64_t channels = images.size(1), each = images.numel() / images.size(0);
    const std::vector<float> outside(channels);
    const Tiles a{.images = static_cast<float*>(images.data_ptr()) + first * each,
                  .planes = static_cast<float*>(planes.data_ptr()), .bias = bias, .outside = outside.data(),
                  .rows = images.size(2), .columns = images.size(3), .channels = channels, .stride = planes.stride(0)};
    in_parallel(n, each, [&](int64_t from, int64_t to) { kernel(a, from, to); });
  }
};

// The tiles of images, or of their gradients, as planes (36, rows, C), with rows of zeros at the end: an odd number of
// rows, since planes a power of two apart would drive each other out of the cache, and at least five, from where on
// each row of a product is the same however many there are.
Tensor to_tiles(const Part& part, bool gradients) {
  const int64_t channels = part.images.size(1), tiles = part.tiles(), rows = std::max<int64_t>(tiles, 4) | 1;
  const Tensor planes = (gradients ? scratch_gradients : scratch_inputs).tensor(36, rows, channels);
  part.run(chosen_tile_kernels().take[gradients], planes, nullptr);
  float* end = static_cast<float*>(planes.data_ptr());
  for (int64_t plane = 0; plane < 36; ++plane, end += rows * channels)
    std::fill(end + tiles * channels, end + rows * channels, 0.0f);
  return planes;
}

// Tiles (36, rows, C) by kernels (36, C, K) to images (B, K, H, W), to which a bias is added where there is one.
void from_tiles(const Tensor& planes, const Tensor& kernels, const float* bias, const Part& part) {
  const Tensor products = scratch_products.tensor(36, planes.size(1), kernels.size(2));
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(products.get(), planes.get(), kernels.get()));
  part.run(chosen_tile_kernels().give, products, bias);
}

// work(first, last) for some images. Each thread has its own, whose tiles are then in its cache; but where the kernels
// are more than all tiles, the threads share each product instead.
template <class Work>
void share(const Tensor& images, const Tensor& kernels, const Work& work) {
  const int64_t n = images.size(0), whole = kernels.numel() > images.numel() / 16 * 36;
  torch::stable::parallel_for(0, n, whole ? n : 1, [&](int64_t first, int64_t last) {
    const scalar::FloatState flushing(scalar::FloatState::flushing);  // in this thread's products too
    work(first, last);
  });
}

void check_images(const Tensor& x, const Tensor& y, const Tensor& kernels, int64_t block) {
  for (const Tensor* images : {&x, &y})
    if (images->dim() != 4 || !images->numel() || !channels_innermost(*images) || images->size(1) % 16 ||
        images->size(2) % 4 || images->size(3) % 4)
      refuse("images", shape(*images), "(B, C, H, W), not empty, in channels_last, C a multiple of 16, H and W of 4");
  typed<float>(x, "images"), typed<float>(y, "images"), typed<float>(kernels, "kernels");
  if (x.size(0) != y.size(0) || x.size(2) != y.size(2) || x.size(3) != y.size(3))
    refuse("images", shape(y), "as many and as large ones as " + shape(x));
  if (kernels.dim() != 3 || kernels.size(0) != 36 || kernels.size(1) != x.size(1) || kernels.size(2) != y.size(1))
    refuse("kernels", shape(kernels), "(36, " + std::to_string(x.size(1)) + ", " + std::to_string(y.size(1)) + ")");
  if (block < 1) refuse("block", std::to_string(block), "1 or more");
}

void winograd(const Tensor& x, const Tensor& kernels, const Tensor& bias, const Tensor& y, int64_t block) {
  check_images(x, y, kernels, block);
  block = std::min(block, x.size(0));
  const float* added = bias.numel() ? memory<float>(bias, "bias", y.size(1)) : nullptr;
  share(x, kernels, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += block) {
      const int64_t n = std::min(block, last - i);
      from_tiles(to_tiles({x, i, n}, false), kernels, added, {y, i, n});
    }
  });
}

void winograd_backward(const Tensor& dy, const Tensor& x, const Tensor& kernels, const Tensor& dx,
                       const Tensor& dkernels, int64_t block) {
  check_images(dy, x, kernels, block);
  block = std::min(block, x.size(0));
  alike(dx, x, "dx", "x");
  float* sums = ordered<float>(dkernels, "dkernels", kernels.numel());
  std::map<int64_t, std::shared_ptr<const float>> parts;  // by first image, so that they are added in one order
  std::mutex adding;
  share(x, kernels, [&](int64_t first, int64_t last) {
    Tensor part = scratch_sums.tensor(36, dy.size(1), x.size(1));
    torch::stable::zero_(part);
    for (int64_t i = first; i < last; i += block) {
      const int64_t n = std::min(block, last - i);
      const Tensor inputs = to_tiles({x, i, n}, false);
      const Tensor turned = torch::stable::transpose(to_tiles({dy, i, n}, true), 1, 2);
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(part.get(), part.get(), turned.get(), inputs.get(), 1, 1));
      from_tiles(to_tiles({dy, i, n}, false), kernels, nullptr, {dx, i, n});
    }
    std::lock_guard lock(adding);
    parts[first] = scratch_sums.memory;
  });
  in_parallel(dkernels.numel(), 1, [&](int64_t first, int64_t last) {
    std::fill(sums + first, sums + last, 0.0f);
    for (const auto& [_, part] : parts)
      for (int64_t i = first; i < last; ++i) sums[i] += part.get()[i];
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(pegasus, m) {
  m.def("winograd(Tensor x, Tensor kernels, Tensor bias, Tensor(a!) y, int block) -> ()");
  m.def("winograd_backward(Tensor dy, Tensor x, Tensor kernels, Tensor(a!) dx, Tensor(b!) dkernels, int block) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pegasus, CPU, m) {
  m.impl("winograd", TORCH_BOX(&winograd));
  m.impl("winograd_backward", TORCH_BOX(&winograd_backward));
}

}  // namespace
}  // namespace pegasus
