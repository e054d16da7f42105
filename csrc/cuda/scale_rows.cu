// Rows of a gradient times a number each, or all times one, in place or from float32 into 16 bits.
#include "row.cuh"

namespace ppg {
namespace {

constexpr int THREADS = 256, CTAS_PER_SM = 8;

// Grid-stride loop over rows, in vectors of 16 bytes of the output, however both are aligned.
template <class From, class To>
__global__ void __launch_bounds__(THREADS) scale_rows_kernel(const __grid_constant__ ScaleRowsArgs a) {
  for (int64_t n = blockIdx.x; n < a.N; n += gridDim.x) {
    const float scale = a.scale[a.one_scale ? 0 : n];
    if (scale == 1.f && a.in_place()) continue;
    const auto* const x = row_at<From>(a.x, n);
    auto* const out = row_at<To>(a.out, n);
    const int len = (int)a.length(n), pad = offset16<From>(x) + VEC<To>;  // a vector more, so that pad + e >= 0
    for (int e = (int)threadIdx.x * VEC<To> - offset16<To>(out); e < len; e += THREADS * VEC<To>) {
      float z[VEC<To>];
#pragma unroll
      for (int i = 0; i < VEC<To>; i += VEC<From>) unpack16<From>(load_group<From>(x, pad, e + i, len), z + i);
#pragma unroll
      for (int i = 0; i < VEC<To>; ++i) z[i] *= scale;
      if (e >= 0 && e + VEC<To> <= len) {
        hw::store16(out + e, pack16<To>(z));
      } else {
#pragma unroll
        for (int i = 0; i < VEC<To>; ++i)
          if (e + i >= 0 && e + i < len) store1<To>(out + e + i, z[i]);
      }
    }
  }
}

template <class From, class To> int launch_scale(const ScaleRowsArgs& a, void* stream) {
  hw::Device d;
  if (const int error = hw::current_device(&d)) return error;
  const auto grid = (unsigned)std::min<int64_t>(a.N, (int64_t)CTAS_PER_SM * d.sms);
  return hw::launch(scale_rows_kernel<From, To>, grid, THREADS, 0, 0, stream, a);
}

}  // namespace

namespace cuda {

int scale_rows(const ScaleRowsArgs& a, void* stream) {
  if (a.N == 0) return 0;
  if (a.N < 0 || a.N > INT32_MAX || a.V < 1 || a.V > MAX_V) return hw::INVALID_VALUE;
  const bool cast = a.dtype != a.out_dtype;
  if (cast && a.dtype != DType::F32) return hw::INVALID_VALUE;
  switch (a.out_dtype) {
    case DType::F32: return launch_scale<F32, F32>(a, stream);
    case DType::BF16: return cast ? launch_scale<F32, BF16>(a, stream) : launch_scale<BF16, BF16>(a, stream);
    case DType::F16: return cast ? launch_scale<F32, F16>(a, stream) : launch_scale<F16, F16>(a, stream);
  }
  return hw::INVALID_VALUE;
}

}  // namespace cuda
}  // namespace ppg
