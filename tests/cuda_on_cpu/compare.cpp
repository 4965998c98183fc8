// Runs csrc/reparam.cu, verbatim, on the CPU and compares it with the CPU kernels: shapes, dtypes, row strides, row
// offsets, aligned and not. Exits 1 and says where at the first difference beyond rounding. Built by run.sh.
#include "../../csrc/reparam.cu"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string_view>

using namespace pegasus;

namespace {

const int sizes[dtypes] = {4, 8, 2, 2};

// Elements of one dtype with exact room: a sanitizer sees one element too many.
struct Buffer {
  Buffer(Dtype dtype, int64_t count, int64_t shift = 0) : dtype(dtype), shift(shift), count(count) {
    raw.reset(new unsigned char[(count + shift) * sizes[dtype]]());
  }
  void* data() { return raw.get() + shift * sizes[dtype]; }
  double get(int64_t i) {
    if (dtype == float64) return static_cast<double*>(data())[i];
    if (dtype == float32) return static_cast<float*>(data())[i];
    uint16_t h = static_cast<uint16_t*>(data())[i];
    return dtype == bfloat16 ? scalar::Bfloat16Bits::widen<float>(h) : scalar::Float16Bits::widen<float>(h);
  }
  void set(int64_t i, double x) {
    float f = static_cast<float>(x);
    if (dtype == float64) static_cast<double*>(data())[i] = x;
    if (dtype == float32) static_cast<float*>(data())[i] = f;
    if (dtype == bfloat16) static_cast<uint16_t*>(data())[i] = scalar::Bfloat16Bits::narrow<float>(f);
    if (dtype == float16) static_cast<uint16_t*>(data())[i] = scalar::Float16Bits::narrow<float>(f);
  }
  Dtype dtype;
  int64_t shift, count;
  std::unique_ptr<unsigned char[]> raw;
};

struct Case {
  Dtype dtype;
  int64_t rows, columns, stride, shift, row_offset, seed;
};

void compare(const Case& c, const char* what, Buffer& got, Buffer& wanted, double scale) {
  const double step[dtypes] = {3e-6, 1e-13, 0.0079, 0.00098};  // of the result's own rounding
  for (int64_t i = 0; i < got.count; ++i) {
    double g = got.get(i), w = wanted.get(i), allowed = step[got.dtype] * (std::fabs(w) + scale);
    if (std::fabs(g - w) <= allowed || (std::isnan(g) && std::isnan(w)) || g == w) continue;
    std::printf("%s[%lld]: the CUDA source gives %.9g, the CPU kernel %.9g; dtype %d, %lld x %lld, stride %lld, "
                "shift %lld, row_offset %lld\n", what, (long long)i, g, w, c.dtype, (long long)c.rows,
                (long long)c.columns, (long long)c.stride, (long long)c.shift, (long long)c.row_offset);
    std::exit(1);
  }
}

void check(const Case& c) {
  const Dtype sum_type = c.dtype == float64 ? float64 : float32;
  const int64_t span = c.rows ? (c.rows - 1) * c.stride + c.columns : 0, count = c.rows * c.columns;
  Buffer mu(c.dtype, span, c.shift), logvar(c.dtype, span, c.shift), dz(c.dtype, span, c.shift);
  Buffer dkl(sum_type, c.rows ? 1 : 0);  // expanded, as kl.sum()'s gradient is
  std::mt19937_64 random(count + c.stride);
  std::normal_distribution<double> normal;
  for (Buffer* b : {&mu, &logvar, &dz, &dkl})
    for (int64_t i = 0; i < b->count; ++i) b->set(i, normal(random));
  Buffer out[2][4] = {{{c.dtype, count}, {sum_type, c.rows}, {c.dtype, count}, {c.dtype, count}},
                      {{c.dtype, count}, {sum_type, c.rows}, {c.dtype, count}, {c.dtype, count}}};
  for (int side = 0; side < 2; ++side) {
    Arguments a{};
    a.mu = mu.data(), a.logvar = logvar.data(), a.dz = dz.data(), a.dkl = dkl.data(), a.seed = &c.seed;
    a.z = out[side][0].data(), a.kl = out[side][1].data();
    a.dmu = out[side][2].data(), a.dlogvar = out[side][3].data();
    a.rows = c.rows, a.columns = c.columns, a.row_offset = c.row_offset;
    a.mu_stride = a.logvar_stride = a.dz_stride = c.stride;
    if (side == 0 && c.rows && (cuda_forward(a, c.dtype, nullptr) || cuda_backward(a, c.dtype, nullptr))) {
      std::printf("the launch failed\n");
      std::exit(1);
    }
    if (side == 1) baseline::kernels.forward[c.dtype](a, 0, c.rows), baseline::kernels.backward[c.dtype](a, 0, c.rows);
  }
  compare(c, "z", out[0][0], out[1][0], 4);
  compare(c, "kl", out[0][1], out[1][1], static_cast<double>(c.columns));
  compare(c, "dmu", out[0][2], out[1][2], 4);
  compare(c, "dlogvar", out[0][3], out[1][3], 4);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string_view(argv[1]) == "quick";  // for sanitizers, where threads are slow
  const int64_t far = (int64_t{1} << 32) - 2;                           // row counters pass 2^32 within the batch
  int cases = 0;
  for (Dtype dtype : {float32, float64, bfloat16, float16})
    for (int64_t columns : {1, 3, 4, 5, 31, 32, 127, 128, 130, 1024, 1025, 2051})
      for (int64_t rows : {0, 1, 5, 9})
        for (int64_t extra : {0, 3, 4}) {
          if (quick && (rows == 9 || (extra == 3 && columns % 2 == 0))) continue;
          check({dtype, rows, columns, columns + extra, extra == 3 ? 1 : 0, extra ? far : 0, -7 * columns});
          ++cases;
        }
  std::printf("%d cases: the CUDA source, run on the CPU, agrees with the CPU kernels\n", cases);
}
