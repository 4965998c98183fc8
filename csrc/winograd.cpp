// Registration of 3 x 3 convolutions in tiles (tiles.cpp), for CPUs: they write into tensors that fused.py makes.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#include "checks.h"
#include "kernels.h"

namespace pegasus {
namespace {

// Memory of a thread's own, used again and again: new pieces leave gaps, 30 MB of them in the end.
class Room {
 public:
  ~Room() { std::free(memory); }

  Tensor tensor(int64_t count, int64_t rows, int64_t columns) {
    const int64_t needed = (count * rows * columns + 15) / 16 * 16;
    if (size < needed) {
      std::free(memory);
      size = 0;
      memory = static_cast<float*>(std::aligned_alloc(64, needed * sizeof(float)));
      if (!memory) throw std::bad_alloc();
      size = needed;
    }
    return torch::stable::from_blob(memory, {count, rows, columns}, {rows * columns, columns, 1},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
  }

 private:
  float* memory = nullptr;
  int64_t size = 0;
};

thread_local Room room_of_inputs, room_of_gradients, room_of_products, room_of_sums;

Tensor some(Tensor images, int64_t first, int64_t n) { return torch::stable::narrow(images, 0, first, n); }

Tiles tiles_of(const Tensor& images, const Tensor& planes, const float* bias = nullptr) {
  return {.images = static_cast<float*>(images.data_ptr()), .planes = static_cast<float*>(planes.data_ptr()),
          .bias = bias, .rows = images.size(2), .columns = images.size(3), .channels = images.size(1),
          .stride = planes.stride(0)};
}

// The tiles of images, or of their gradients, as planes (36, rows, C), with rows of zeros behind: an odd number of
// rows, since planes a power of two apart would drive each other out of the cache, and at least five, from where on
// each row of a product is the same however many there are.
Tensor to_tiles(const Tensor& images, bool gradients) {
  const int64_t tiles = images.numel() / images.size(1) / 16, rows = std::max<int64_t>(tiles, 4) | 1;
  const Tensor planes = (gradients ? room_of_gradients : room_of_inputs).tensor(36, rows, images.size(1));
  const Tiles a = tiles_of(images, planes);
  const auto kernel = chosen_tile_kernels().take[gradients];
  in_parallel(images.size(0), images.numel() / images.size(0),
              [&](int64_t first, int64_t last) { kernel(a, first, last); });
  for (int64_t plane = 0; plane < 36; ++plane)
    std::fill(a.planes + plane * a.stride + tiles * a.channels, a.planes + (plane + 1) * a.stride, 0.0f);
  return planes;
}

// Tiles (36, rows, C) by kernels (36, C, K) as images (B, K, H, W), to which a bias is added where there is one.
void from_tiles(const Tensor& planes, const Tensor& kernels, const float* bias, const Tensor& images) {
  const Tensor products = room_of_products.tensor(36, planes.size(1), kernels.size(2));
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(products.get(), planes.get(), kernels.get()));
  const Tiles a = tiles_of(images, products, bias);
  const auto kernel = chosen_tile_kernels().give;
  in_parallel(images.size(0), images.numel() / images.size(0),
              [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

// work(first, last) for some images. Each thread has its own, whose tiles are then in its cache; but where the kernels
// are more than all tiles, the threads share each product instead.
template <class Work>
void share(const Tensor& images, const Tensor& kernels, const Work& work) {
  const int64_t n = images.size(0), whole = kernels.numel() > images.numel() / 16 * 36;
  torch::stable::parallel_for(0, n, whole ? n : 1, work);
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
      from_tiles(to_tiles(some(x, i, n), false), kernels, added, some(y, i, n));
    }
  });
}

void winograd_backward(const Tensor& dy, const Tensor& x, const Tensor& kernels, const Tensor& dx,
                       const Tensor& dkernels, int64_t block) {
  check_images(dy, x, kernels, block);
  block = std::min(block, x.size(0));
  check_order(dx, x, "dx", "x"), typed<float>(dx, "dx");
  float* sums = ordered<float>(dkernels, "dkernels", kernels.numel());
  std::map<int64_t, const float*> parts;  // by first image, so that they are added in the same order each time
  std::mutex adding;
  share(x, kernels, [&](int64_t first, int64_t last) {
    // a thread's own: OpenMP, which torch uses wherever it has MKL, gives each thread one range
    Tensor part = room_of_sums.tensor(36, dy.size(1), x.size(1));
    torch::stable::zero_(part);
    for (int64_t i = first; i < last; i += block) {
      const int64_t n = std::min(block, last - i);
      const Tensor some_dy = some(dy, i, n), inputs = to_tiles(some(x, i, n), false);
      const Tensor turned = torch::stable::transpose(to_tiles(some_dy, true), 1, 2);
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_baddbmm_out(part.get(), part.get(), turned.get(), inputs.get(), 1, 1));
      from_tiles(to_tiles(some_dy, false), kernels, nullptr, some(dx, i, n));
    }
    std::lock_guard lock(adding);
    parts[first] = static_cast<const float*>(part.data_ptr());
  });
  in_parallel(dkernels.numel(), 1, [&](int64_t first, int64_t last) {
    std::fill(sums + first, sums + last, 0.0f);
    for (const auto& [_, part] : parts)
      for (int64_t i = first; i < last; ++i) sums[i] += part[i];
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
