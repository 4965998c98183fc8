// Prints digests of what the CPU kernels make of fixed numbers, a line for each kernel, dtype and
// width. run.sh compares the lines of this processor with those of a 64-bit ARM.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/reparam/formulas.h"
#include "../../csrc/reparam/kernels.h"
#include "../../csrc/step/kernels.h"

using namespace pegasus;

namespace {

uint64_t state = 1;

float number() {  // in [-3, 3), now and then a denormal
  state = state * 6364136223846793005u + 1442695040888963407u;
  const auto word = static_cast<int32_t>(state >> 32);
  if (word % 32) return static_cast<float>(word) * (3 / 2147483648.0f);
  return static_cast<float>(word >> 12) * 0x1p-149f;
}

void set(double& to, float x) { to = x; }
void set(float& to, float x) { to = x; }

// A 16-bit number of either format; of the same size as its bits.
template <class Format>
struct Half {
  uint16_t bits;
};

template <class Format>
void set(Half<Format>& to, float x) {
  to.bits = static_cast<uint16_t>(Format::template narrow<float>(x));
}

template <class T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> result(n);
  for (T& x : result) set(x, number());
  return result;
}

template <class T>
void show(const char* what, const std::vector<T>& values) {
  uint64_t digest = 1469598103934665603u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i)
    digest = (digest ^ bytes[i]) * 1099511628211u;
  std::printf(" %s %016llx", what, static_cast<unsigned long long>(digest));
}

template <class T, class Sum>
void op(const char* name, Dtype dtype, int64_t columns) {
  const int64_t rows = 7, n = rows * columns, seed = -5;
  const auto mu = numbers<T>(n), logvar = numbers<T>(n), dz = numbers<T>(n);
  const auto dkl = numbers<Sum>(rows);
  std::vector<T> z(n), dmu(n), dlogvar(n);
  std::vector<double> sums(rows);
  Arguments a{.in = {mu.data(), logvar.data(), dz.data()},
              .stride = {columns, columns, columns},
              .out = {z.data()},
              .kl = sums.data(),  // asked for; the caller adds up
              .sums = sums.data(),
              .dkl = dkl.data(),
              .dkl_stride = 1,
              .seed = &seed,
              .rows = rows,
              .columns = columns,
              .segments = 1,
              .row_offset = 3};
  baseline::kernels.segments[0][dtype](a, 0, rows);
  a.out[0] = dmu.data();
  a.out[1] = dlogvar.data();
  baseline::kernels.segments[1][dtype](a, 0, rows);
  std::printf("op %s %d", name, static_cast<int>(columns));
  show("z", z);
  show("kl", sums);
  show("dmu", dmu);
  show("dlogvar", dlogvar);
  std::printf("\n");
}

template <class T>
void norm(const char* name, bool bf16) {
  const int64_t images = 3, pixels = 12, channels = 48, groups = 8;
  const int64_t n = images * pixels * channels;
  const auto x = numbers<T>(n), dy = numbers<T>(n);
  const auto weight = numbers<float>(images * channels), bias = numbers<float>(images * channels);
  std::vector<T> y(n), dx(n);
  std::vector<float> mean(images * groups), inverse(mean);
  std::vector<float> dweight(weight.size()), dbias(bias.size());
  std::vector<float> scratch((pixels + 6) * channels);
  const GroupNorm a{.x = x.data(),
                    .dy = dy.data(),
                    .y = y.data(),
                    .dx = dx.data(),
                    .weight = weight.data(),
                    .bias = bias.data(),
                    .mean = mean.data(),
                    .inverse = inverse.data(),
                    .dweight = dweight.data(),
                    .dbias = dbias.data(),
                    .weight_stride = channels,
                    .bias_stride = channels,
                    .pixels = pixels,
                    .channels = channels,
                    .groups = groups,
                    .epsilon = 1e-5f};
  baseline::norm_kernels.forward[bf16](a, scratch.data(), 0, images);
  baseline::norm_kernels.backward[bf16](a, scratch.data(), 0, images);
  std::printf("norm %s", name);
  show("y", y);
  show("mean", mean);
  show("inverse", inverse);
  show("dx", dx);
  show("dweight", dweight);
  show("dbias", dbias);
  std::printf("\n");
}

void tile(const char* what, TilesKernel kernel, const Tiles& a, int64_t images,
          const std::vector<float>& result) {
  kernel(a, 0, images);
  show(what, result);
}

void tiles() {
  const int64_t images = 2, rows = 8, columns = 4, channels = 48, weights = 5;
  const int64_t count = images * rows * columns / 16 * channels;
  auto x = numbers<float>(images * rows * columns * channels);
  auto w = numbers<float>(weights * 9 * channels);
  const auto bias = numbers<float>(channels);
  std::vector<float> planes(36 * count), kernels(36 * weights * channels);
  const std::vector<float> zeros(channels);
  const Tiles a{x.data(), planes.data(), bias.data(), zeros.data(), rows, columns, channels, count};
  const Tiles b{w.data(), kernels.data(), nullptr, nullptr, 3, 3, channels, weights * channels};
  const TileKernels& k = baseline::tile_kernels;
  std::printf("tiles");
  tile("inputs", k.inputs_to_planes, a, images, planes);
  tile("gradients", k.gradients_to_planes, a, images, planes);
  tile("outputs", k.planes_to_outputs, a, images, x);
  tile("weights", k.weights_to_planes, b, weights, kernels);
  tile("turned", k.turned_weights_to_planes, b, weights, kernels);
  tile("dweights", k.planes_to_weights, b, weights, w);
  std::printf("\n");
}

}  // namespace

int main() {
  for (int64_t columns : {1, 3, 4, 5, 31, 32, 127, 128, 130, 1025}) {
    op<float, float>("float32", float32, columns);
    op<double, double>("float64", float64, columns);
    op<Half<scalar::Bfloat16>, float>("bfloat16", bfloat16, columns);
    op<Half<scalar::Float16>, float>("float16", float16, columns);
  }
  norm<float>("float32", false);
  norm<Half<scalar::Bfloat16>>("bfloat16", true);
  tiles();
}
