// Runs csrc/reparam/cuda_kernels.cu, verbatim, on the CPU and compares it with the CPU kernels:
// shapes, dtypes, row strides, row offsets, aligned and not; and its kl near collapse with the
// formula. Exits 1 and says where at the first difference beyond rounding. Built by run.sh.
#include "../../csrc/reparam/cuda_kernels.cu"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string_view>

using namespace pegasus;

namespace {

const int sizes[dtypes] = {4, 8, 2, 2};

// Elements of one dtype with exact room, so that a sanitizer sees one element too many.
struct Buffer {
  Buffer(Dtype dtype, int64_t count, int64_t shift = 0) : dtype(dtype), shift(shift), count(count) {
    raw.reset(new unsigned char[(count + shift) * sizes[dtype]]());
  }
  void* data() { return raw.get() + shift * sizes[dtype]; }
  double get(int64_t i) {
    if (dtype == float64) return static_cast<double*>(data())[i];
    if (dtype == float32) return static_cast<float*>(data())[i];
    uint16_t h = static_cast<uint16_t*>(data())[i];
    return dtype == bfloat16 ? Bfloat16::widen<float>(h) : Float16::widen<float>(h);
  }
  void set(int64_t i, double x) {
    float f = static_cast<float>(x);
    if (dtype == float64) static_cast<double*>(data())[i] = x;
    if (dtype == float32) static_cast<float*>(data())[i] = f;
    if (dtype == bfloat16) static_cast<uint16_t*>(data())[i] = Bfloat16::narrow<float>(f);
    if (dtype == float16) static_cast<uint16_t*>(data())[i] = Float16::narrow<float>(f);
  }
  Dtype dtype;
  int64_t shift, count;
  std::unique_ptr<unsigned char[]> raw;
};

struct Case {
  Dtype dtype;
  int64_t rows, columns, stride, shift, row_offset, seed;
  bool with_kl;
};

void compare(const Case& c, const char* what, Buffer& got, Buffer& wanted, double scale) {
  const double step[dtypes] = {3e-6, 1e-13, 0.0079, 0.00098};  // of the result's own rounding
  for (int64_t i = 0; i < got.count; ++i) {
    const double g = got.get(i);
    const double w = wanted.get(i);
    const double allowed = step[got.dtype] * (std::fabs(w) + scale);
    if (std::fabs(g - w) <= allowed || (std::isnan(g) && std::isnan(w)) || g == w) continue;
    std::printf("%s[%lld]: the CUDA source gives %.9g, ", what, (long long)i, g);
    std::printf("the CPU kernel %.9g; ", w);
    std::printf("dtype %d, %lld x %lld, ", c.dtype, (long long)c.rows, (long long)c.columns);
    std::printf("stride %lld, shift %lld, row_offset %lld\n", (long long)c.stride,
                (long long)c.shift, (long long)c.row_offset);
    std::exit(1);
  }
}

// What both directions write.
struct Outputs {
  Outputs(Dtype dtype, Dtype sum_type, int64_t rows, int64_t count)
      : z(dtype, count), kl(sum_type, rows), dmu(dtype, count), dlogvar(dtype, count) {}
  Buffer z, kl, dmu, dlogvar;
};

void run_on_cpu(const Arguments& a, Dtype dtype, bool backward) {
  baseline::kernels.segments[backward][dtype](a, 0, a.rows * a.segments);
  if (!backward && a.kl) add_segments(a, dtype);
}

void run_cuda_source(const Arguments& a, Dtype dtype, bool backward) {
  if (!a.rows) return;  // a grid may not be empty
  const char* error = run_on_cuda(a, dtype, backward, nullptr);
  if (!error) return;
  std::printf("the launch failed: %s\n", error);
  std::exit(1);
}

void check(const Case& c) {
  const Dtype sum_type = c.dtype == float64 ? float64 : float32;
  const int64_t span = c.rows ? (c.rows - 1) * c.stride + c.columns : 0;
  const int64_t count = c.rows * c.columns;
  Buffer mu(c.dtype, span, c.shift), logvar(c.dtype, span, c.shift), dz(c.dtype, span, c.shift);
  Buffer dkl(sum_type, c.rows ? 1 : 0);  // expanded, as kl.sum()'s gradient is
  std::mt19937_64 random(count + c.stride);
  std::normal_distribution<double> normal;
  for (Buffer* b : {&mu, &logvar, &dz, &dkl})
    for (int64_t i = 0; i < b->count; ++i) b->set(i, normal(random));
  Outputs got(c.dtype, sum_type, c.rows, count);
  Outputs wanted(c.dtype, sum_type, c.rows, count);
  const int64_t segments = (c.columns + segment - 1) / segment;
  const std::unique_ptr<double[]> sums(new double[c.rows * segments]);
  for (Outputs* outputs : {&got, &wanted}) {
    const auto run = outputs == &got ? run_cuda_source : run_on_cpu;
    Arguments a{.in = {mu.data(), logvar.data(), dz.data()},
                .stride = {c.stride, c.stride, c.stride},
                .out = {outputs->z.data()},
                .kl = c.with_kl ? outputs->kl.data() : nullptr,
                .sums = sums.get(),
                .seed = &c.seed,
                .rows = c.rows,
                .columns = c.columns,
                .segments = segments,
                .row_offset = c.row_offset};
    run(a, c.dtype, false);
    a.out[0] = outputs->dmu.data();
    a.out[1] = outputs->dlogvar.data();
    a.dkl = c.with_kl ? dkl.data() : nullptr;
    run(a, c.dtype, true);
  }
  compare(c, "z", got.z, wanted.z, 4);
  compare(c, "kl", got.kl, wanted.kl, static_cast<double>(c.columns));
  compare(c, "dmu", got.dmu, wanted.dmu, 4);
  compare(c, "dlogvar", got.dlogvar, wanted.dlogvar, 4);
}

// Near collapse the kl is a small difference, of which float32 is to keep the digits.
void check_collapse(float logvar_of_all, int64_t columns) {
  const int64_t segments = (columns + segment - 1) / segment, seed = 0;
  Buffer mu(float32, columns), logvar(float32, columns), z(float32, columns), kl(float32, 1);
  for (int64_t i = 0; i < columns; ++i) logvar.set(i, logvar_of_all);
  const std::unique_ptr<double[]> sums(new double[segments]);
  const Arguments a{.in = {mu.data(), logvar.data()},
                    .stride = {columns, columns},
                    .out = {z.data()},
                    .kl = kl.data(),
                    .sums = sums.get(),
                    .seed = &seed,
                    .rows = 1,
                    .columns = columns,
                    .segments = segments};
  run_cuda_source(a, float32, false);
  const double v = logvar_of_all;
  const double wanted = columns * (std::expm1(v) - v) / 2;
  if (std::fabs(kl.get(0) - wanted) <= 2e-6 * wanted) return;
  std::printf("kl of %lld columns with logvar %g: the CUDA source gives %.9g, wanted %.9g\n",
              (long long)columns, v, kl.get(0), wanted);
  std::exit(1);
}

// One long row is work for several blocks.
void check_long_row() {
  on_cpu::most_blocks = 0;
  check({float32, 1, 2 * segment + 77, 2 * segment + 77, 0, 0, 5, true});
  if (on_cpu::most_blocks > 1) return;
  std::printf("one row of three segments: its grid has one block, wanted several\n");
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  // for sanitizers, where threads are slow
  const bool quick = argc > 1 && std::string_view(argv[1]) == "quick";
  const int64_t far = (int64_t{1} << 32) - 2;  // row counters pass 2^32 within the batch
  int cases = 0;
  for (Dtype dtype : {float32, float64, bfloat16, float16})
    for (int64_t columns : {1, 3, 4, 5, 31, 32, 127, 128, 130, 1024, 1025, 2051})
      for (int64_t rows : {0, 1, 5, 9})
        for (int64_t extra : {0, 3, 4}) {
          if (quick && (rows == 9 || (extra == 3 && columns % 2 == 0))) continue;
          const int64_t shift = extra == 3 ? 1 : 0;
          check({dtype, rows, columns, columns + extra, shift, extra ? far : 0, -7 * columns,
                 columns != 127});
          ++cases;
        }
  for (Dtype dtype : {float32, float64}) {  // rows of three segments
    check({dtype, 3, 2 * segment + 77, 2 * segment + 80, 0, far, 5, true});
    ++cases;
  }
  for (float logvar : {1e-3f, -1e-4f, 1e-6f})
    for (int64_t columns : {int64_t{128}, 32 * segment + 5}) {
      check_collapse(logvar, columns);
      ++cases;
    }
  check_long_row();
  ++cases;
  std::printf("%d cases: the CUDA source, run on the CPU, agrees with the CPU kernels\n", cases);
}
