// Rows of a gradient times a number each, or all times one, in place or from float32 into 16 bits. Mirrors
// csrc/cuda/scale_rows.cu
#ifndef PPG_LANES
#define PPG_KERNELS "scale_rows.cpp"
#include "foreach_isa.h"

namespace ppg::cpu {
PPG_DISPATCH(scale_rows, ScaleRowsArgs)
}  // namespace ppg::cpu
#else

// From float32, any NaN may come, and not every one outlives BF16::round_up: see plain_nan.
template <class From, class To> PPG_INLINE Vec scaled(Vec x, float scale) {
  const Vec y = x * scale;
  return std::is_same_v<From, To> ? y : y == y ? y : splat(NAN);
}

template <class From, class To> void scale_rows_of(const ScaleRowsArgs& a, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    const float scale = plain_nan(a.scale[a.one_scale ? 0 : n]);
    if (scale == 1.f && a.in_place()) continue;
    const auto* x = static_cast<const typename From::raw*>(a.x.data) + a.x.offset(n);
    auto* out = static_cast<typename To::raw*>(a.out.data) + a.out.offset(n);
    const int64_t length = a.length(n);
    int64_t v = 0;
    for (; v + LANES <= length; v += LANES) To::store(out + v, scaled<From, To>(From::load(x + v), scale));
    if (const int left = int(length - v))
      store_tail<To>(out + v, left, scaled<From, To>(load_tail<From>(x + v, left, x[v]), scale));
  }
}
template <class E> void scale_same(const ScaleRowsArgs& a, int64_t first, int64_t last) {
  scale_rows_of<E, E>(a, first, last);
}
template <class E> void scale_cast(const ScaleRowsArgs& a, int64_t first, int64_t last) {
  scale_rows_of<F32, E>(a, first, last);
}

void scale_rows(const ScaleRowsArgs& a, int64_t first, int64_t last) {
  if (a.dtype == a.out_dtype) PPG_BY_DTYPE(a.dtype, scale_same, a, first, last);
  PPG_BY_DTYPE(a.out_dtype, scale_cast, a, first, last);
}

#endif
