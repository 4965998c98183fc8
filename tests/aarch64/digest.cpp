// Prints digests of what the CPU kernels make of fixed numbers, a line for each kernel, dtype and width. run.sh compares
// the lines of this processor with those of a 64-bit ARM.
#include <cstdio>
#include <cstring>
#include <vector>

#include "formulas.h"
#include "kernels.h"

using namespace pegasus;

namespace {

uint64_t state = 1;

float number() {  // in [-3, 3), now and then a denormal
  state = state * 6364136223846793005u + 1442695040888963407u;
  const auto word = static_cast<int32_t>(state >> 32);
  return word % 32 ? static_cast<float>(word) * (3 / 2147483648.0f) : static_cast<float>(word >> 12) * 0x1p-149f;
}

void set(double& to, float x) { to = x; }
void set(float& to, float x) { to = x; }

struct Bfloat16 : scalar::Bfloat16Bits {};
struct Float16 : scalar::Float16Bits {};

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
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 1099511628211u;
  std::printf(" %s %016llx", what, static_cast<unsigned long long>(digest));
}

template <class T, class Sum>
void op(const char* name, Dtype dtype, int64_t columns) {
  const int64_t rows = 7, n = rows * columns, seed = -5;
  const auto mu = numbers<T>(n), logvar = numbers<T>(n), dz = numbers<T>(n);
  const auto dkl = numbers<Sum>(rows);
  std::vector<T> z(n), dmu(n), dlogvar(n);
  std::vector<Sum> kl(rows);
  const Arguments a{mu.data(), logvar.data(), &seed, z.data(), kl.data(), dz.data(), dkl.data(), dmu.data(),
                    dlogvar.data(), rows, columns, 3, columns, columns, columns, 1};
  baseline::kernels.forward[dtype](a, 0, rows);
  baseline::kernels.backward[dtype](a, 0, rows);
  std::printf("op %s %d", name, static_cast<int>(columns));
  show("z", z), show("kl", kl), show("dmu", dmu), show("dlogvar", dlogvar);
  std::printf("\n");
}

template <class T>
void adam(const char* name, bool bf16) {
  const int64_t n = 1003;
  auto weight = numbers<float>(n), mean = numbers<float>(n), square = numbers<float>(n);
  const auto grad = numbers<T>(n);
  for (float& x : square) x *= x;
  std::vector<uint16_t> copy(n);
  baseline::step_kernels.adam[bf16]({weight.data(), mean.data(), square.data(), grad.data(), copy.data(), 1e-3f, 1.1f,
                                     0.1f, 0.999f, 0.001f, 1e-8f, 0.5f}, 0, n);
  std::printf("adam %s", name);
  show("weight", weight), show("mean", mean), show("square", square), show("copy", copy);
  show("squares", std::vector<float>{baseline::step_kernels.squares[bf16](grad.data(), 0, n)});
  std::printf("\n");
}

template <class T>
void norm(const char* name, bool bf16) {
  const int64_t images = 3, places = 12, channels = 48, groups = 8, n = images * places * channels;
  const auto x = numbers<T>(n), dy = numbers<T>(n);
  const auto weight = numbers<float>(images * channels), bias = numbers<float>(images * channels);
  std::vector<T> y(n), dx(n);
  std::vector<float> mean(images * groups), inverse(mean), dweight(weight.size()), dbias(bias.size());
  std::vector<float> scratch((places + 6) * channels);
  const GroupNorm a{x.data(), dy.data(), y.data(), dx.data(), weight.data(), bias.data(), mean.data(), inverse.data(),
                    dweight.data(), dbias.data(), channels, channels, places, channels, groups, 1e-5f};
  baseline::step_kernels.norm[bf16](a, scratch.data(), 0, images);
  baseline::step_kernels.norm_backward[bf16](a, scratch.data(), 0, images);
  std::printf("norm %s", name);
  show("y", y), show("mean", mean), show("inverse", inverse), show("dx", dx), show("dweight", dweight);
  show("dbias", dbias);
  std::printf("\n");
}

template <class T>
void error(const char* name, bool bf16) {
  const int64_t images = 3, pixels = 3072;
  const auto logits = numbers<T>(images * pixels);
  const auto x = numbers<float>(images * pixels), dsse = numbers<float>(images);
  std::vector<T> dlogits(images * pixels);
  std::vector<float> sse(images);
  const SquaredError a{logits.data(), x.data(), dsse.data(), sse.data(), dlogits.data(), pixels};
  baseline::step_kernels.error[bf16](a, 0, images);
  baseline::step_kernels.error_backward[bf16](a, 0, images);
  std::printf("error %s", name);
  show("sse", sse), show("dlogits", dlogits);
  std::printf("\n");
}

void tiles() {
  const int64_t images = 2, rows = 8, columns = 4, channels = 48, count = images * rows * columns / 16 * channels;
  auto x = numbers<float>(images * rows * columns * channels);
  const auto bias = numbers<float>(channels);
  std::vector<float> planes(36 * count);
  const std::vector<float> outside(channels);
  const Tiles a{x.data(), planes.data(), bias.data(), outside.data(), rows, columns, channels, count};
  std::printf("tiles");
  for (const auto kernel : {baseline::tile_kernels.take[0], baseline::tile_kernels.take[1]}) {
    kernel(a, 0, images);
    show("planes", planes);
  }
  baseline::tile_kernels.give(a, 0, images);
  show("images", x);
  std::printf("\n");
}

template <class T>
void step(const char* name, bool bf16) {
  adam<T>(name, bf16);
  norm<T>(name, bf16);
  error<T>(name, bf16);
}

}  // namespace

int main() {
  for (int64_t columns : {1, 3, 4, 5, 31, 32, 127, 128, 130, 1025}) {
    op<float, float>("float32", float32, columns);
    op<double, double>("float64", float64, columns);
    op<Half<Bfloat16>, float>("bfloat16", bfloat16, columns);
    op<Half<Float16>, float>("float16", float16, columns);
  }
  step<float>("float32", false);
  step<Half<Bfloat16>>("bfloat16", true);
  tiles();
}
