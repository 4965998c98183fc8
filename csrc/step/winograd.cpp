// The op winograd, a 3 x 3 convolution in tiles of 4 x 4 pixels, and its backward, for CPUs. They
// write into tensors that the caller makes. The transforms are in winograd_kernels.cpp.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "../reparam/vectors.h"
#include "checks.h"
#include "kernels.h"

namespace pegasus {
namespace {

// Scratch memory of one thread, reused: fresh pieces would leave gaps, 30 MB of them in the end.
class Scratch {
 public:
  Tensor tensor(int64_t count, int64_t rows, int64_t columns) {
    const int64_t needed = (count * rows * columns + 15) / 16 * 16;
    if (size < needed || memory.use_count() > 1) allocate(needed);  // or another thread reads it
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(memory.get(), {count, rows, columns},
                                    {rows * columns, columns, 1}, cpu, ScalarType::Float);
  }

  std::shared_ptr<float> memory;

 private:
  void allocate(int64_t needed) {
    size = 0;
    memory.reset();  // first, so that both do not exist at once
    void* fresh = std::aligned_alloc(64, needed * sizeof(float));
    memory.reset(static_cast<float*>(fresh), std::free);
    if (!memory) throw std::bad_alloc();
    size = needed;
  }

  int64_t size = 0;
};

thread_local Scratch scratch_inputs, scratch_gradients, scratch_products, scratch_sums;
thread_local Scratch scratch_kernels, scratch_total;

// Some images of a tensor (B, C, H, W).
struct Part {
  const Tensor& images;
  int64_t first, n;

  int64_t tiles() const { return n * images.size(2) * images.size(3) / 16; }

  void run(TilesKernel kernel, const Tensor& planes, const float* bias) const {
    const int64_t channels = images.size(1);
    const int64_t image_size = images.numel() / images.size(0);
    const std::vector<float> zeros(channels);
    const Tiles a{.images = static_cast<float*>(images.data_ptr()) + first * image_size,
                  .planes = static_cast<float*>(planes.data_ptr()),
                  .bias = bias,
                  .zeros = zeros.data(),
                  .rows = images.size(2),
                  .columns = images.size(3),
                  .channels = channels,
                  .stride = planes.stride(0)};
    in_parallel(n, image_size, [&](int64_t from, int64_t to) { kernel(a, from, to); });
  }
};

// The tiles of images or gradients as planes (36, rows, C), with rows of zeros at the end. The
// number of rows is odd, since planes a power of two apart would drive each other out of the cache,
// and at least five, from where on a product's rows do not depend on how many there are.
Tensor to_planes(const Part& part, TilesKernel kernel, Scratch& scratch) {
  const int64_t channels = part.images.size(1);
  const int64_t tiles = part.tiles();
  const int64_t rows = std::max<int64_t>(tiles, 4) | 1;
  const Tensor planes = scratch.tensor(36, rows, channels);
  part.run(kernel, planes, nullptr);
  float* data = static_cast<float*>(planes.data_ptr());
  for (int64_t plane = 0; plane < 36; ++plane, data += rows * channels)
    std::fill(data + tiles * channels, data + rows * channels, 0.0f);
  return planes;
}

Tensor inputs_to_planes(const Part& part) {
  return to_planes(part, tile_kernels().inputs_to_planes, scratch_inputs);
}

Tensor gradients_to_planes(const Part& part) {
  return to_planes(part, tile_kernels().gradients_to_planes, scratch_gradients);
}

// A weight (K, C, 3, 3) as kernels (36, K, C).
Tensor to_kernels(const Tensor& weight, TilesKernel kernel) {
  const Tensor kernels = scratch_kernels.tensor(36, weight.size(0), weight.size(1));
  Part{weight, 0, weight.size(0)}.run(kernel, kernels, nullptr);
  return kernels;
}

// Planes (36, rows, C) times kernels (36, C, K), to images (B, K, H, W). bias: (K,) or null.
void planes_to_outputs(const Tensor& planes, const Tensor& kernels, const float* bias,
                       const Part& part) {
  const Tensor products = scratch_products.tensor(36, planes.size(1), kernels.size(2));
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(products.get(), planes.get(), kernels.get()));
  part.run(tile_kernels().planes_to_outputs, products, bias);
}

// Calls work(first, last) for images in several threads. Each thread takes images, so that their
// tiles stay in its cache; but where the kernels are larger than all tiles, one thread takes all
// images and the threads share each product.
template <class Work>
void share_images(const Tensor& images, const Tensor& kernels, const Work& work) {
  const int64_t n = images.size(0);
  const bool share_products = kernels.numel() > images.numel() / 16 * 36;
  torch::stable::parallel_for(0, n, share_products ? n : 1, [&](int64_t first, int64_t last) {
    using scalar::FloatState;
    const FloatState state(FloatState::flushing);  // for this thread's products too
    work(first, last);
  });
}

void check_images(const Tensor& images) {
  check_defined(images, "images");
  if (images.dim() != 4 || !images.numel() || !channels_innermost(images) ||
      images.size(1) % 16 || images.size(2) % 4 || images.size(3) % 4)
    refuse("images", images,
           "(B, C, H, W), not empty, in channels_last, C a multiple of 16, H and W of 4");
  float_data(images, "images");
}

// x: (B, C, H, W). y: (B, K, H, W).
void check(const Tensor& x, const Tensor& y, const Tensor& weight, int64_t block) {
  check_images(x);
  check_images(y);
  check_defined(weight, "weight");
  float_data(weight, "weight");
  if (x.size(0) != y.size(0) || x.size(2) != y.size(2) || x.size(3) != y.size(3))
    refuse("images", y, "as many and as large ones as " + describe(x));
  const int64_t before = x.size(1);
  const int64_t after = y.size(1);
  if (weight.dim() != 4 || weight.size(0) != after || weight.size(1) != before ||
      weight.size(2) != 3 || weight.size(3) != 3 || !channels_innermost(weight))
    refuse("weight", weight,
           "(" + std::to_string(after) + ", " + std::to_string(before) +
               ", 3, 3), in channels_last");
  if (block < 1) throw std::runtime_error("block: wanted 1 or more");
}

void winograd(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& y,
              int64_t block) {
  check(x, y, weight, block);
  check_defined(bias, "bias");
  block = std::min(block, x.size(0));
  const float* added = bias.numel() ? contiguous_data(bias, "bias", y.size(1)) : nullptr;
  const Tensor planes = to_kernels(weight, tile_kernels().weights_to_planes);
  const Tensor kernels = torch::stable::transpose(planes, 1, 2);
  share_images(x, kernels, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += block) {
      const int64_t n = std::min(block, last - i);
      planes_to_outputs(inputs_to_planes({x, i, n}), kernels, added, {y, i, n});
    }
  });
}

void winograd_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& dx,
                       const Tensor& dweight, int64_t block) {
  check(x, dy, weight, block);
  block = std::min(block, x.size(0));
  data_like(dx, x, "dx", "x");
  data_like(dweight, weight, "dweight", "weight");
  const Tensor kernels = to_kernels(weight, tile_kernels().turned_weights_to_planes);
  // Each thread's sums, by its first image, so that they are added in one order.
  std::map<int64_t, std::shared_ptr<const float>> sums;
  std::mutex adding;
  share_images(x, kernels, [&](int64_t first, int64_t last) {
    Tensor sum = scratch_sums.tensor(36, dy.size(1), x.size(1));
    torch::stable::zero_(sum);
    for (int64_t i = first; i < last; i += block) {
      const int64_t n = std::min(block, last - i);
      const Tensor inputs = inputs_to_planes({x, i, n});
      const Tensor gradients = torch::stable::transpose(gradients_to_planes({dy, i, n}), 1, 2);
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(sum.get(), sum.get(), gradients.get(),
                                                        inputs.get(), 1, 1));
      planes_to_outputs(inputs_to_planes({dy, i, n}), kernels, nullptr, {dx, i, n});
    }
    std::lock_guard lock(adding);
    sums[first] = scratch_sums.memory;
  });
  const Tensor dkernels = scratch_total.tensor(36, dy.size(1), x.size(1));
  float* total = static_cast<float*>(dkernels.data_ptr());
  in_parallel(dkernels.numel(), 1, [&](int64_t first, int64_t last) {
    std::fill(total + first, total + last, 0.0f);
    for (const auto& [_, sum] : sums)
      for (int64_t i = first; i < last; ++i) total[i] += sum.get()[i];
  });
  Part{dweight, 0, dweight.size(0)}.run(tile_kernels().planes_to_weights, dkernels, nullptr);
}

STABLE_TORCH_LIBRARY_FRAGMENT(pegasus_step, m) {
  m.def("winograd(Tensor x, Tensor weight, Tensor bias, Tensor(a!) y, int block) -> ()");
  m.def(
      "winograd_backward(Tensor dy, Tensor x, Tensor weight, Tensor(a!) dx, Tensor(b!) dweight,"
      " int block) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pegasus_step, CPU, m) {
  m.impl("winograd", TORCH_BOX(&winograd));
  m.impl("winograd_backward", TORCH_BOX(&winograd_backward));
}

}  // namespace
}  // namespace pegasus
