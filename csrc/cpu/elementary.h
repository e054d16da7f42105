// Elementary functions of vectors: exp2, tanh, log. Included after vec.h, in the same manner.

// Whether blocks whose exponents stay in the normal range are taken apart, see exp2_near: without a fused multiply-add
// the product would be rounded.
#if PPG_LANES >= 8 || defined(__aarch64__)
constexpr bool NEAR_BLOCKS = true;
#else
constexpr bool NEAR_BLOCKS = false;
#endif

// An exponent whose exp2_ is 0, the least that it takes: with fewer than 16 lanes the exponent bits end there.
constexpr float LEAST = LANES == 16 ? -1e4f : -127.f;
PPG_INLINE Vec at_least(Vec t, float low) { return vmax(splat(low), t); }

// 2^f to 1.6e-7 relative, 1.8e-7 where no multiply-add is fused, for |f| <= 1/2, exactly 1 for 0: a minimax polynomial.
PPG_INLINE Vec exp2_fraction(Vec f) {
  Vec p = f * 1.326940604e-3f + 9.67129413e-3f;
  p = p * f + 5.550711229e-2f;
  p = p * f + 2.40222469e-1f;
  p = p * f + 6.931470037e-1f;
  return p * f + 1.f;
}

// 1.5 * 2^23: added to t, it rounds t to an integer n and leaves n in the low bits.
constexpr float ROUNDER = 12582912.f;

// 2^t with t = d * scale to the same error, 0 below the normal range, for t from LEAST (16 lanes: any) to a little
// above 0; NaN stays NaN. The product is taken in here because it is free where it is fused into the sums that split t.
PPG_INLINE Vec exp2_(Vec d, Vec scale) {
#if PPG_LANES == 16
  const Vec t = d * scale;
  const Vec f = (Vec)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t)
  Vec p = f * 1.877576673e-3f + 8.989340095e-3f;
  p = p * f + 5.582631805e-2f;
  p = p * f + 2.40153617e-1f;
  p = p * f + 6.931530732e-1f;
  p = p * f + 9.999999251e-1f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  const Vec rounder = splat(ROUNDER + 127), shifted = d * scale + rounder, f = d * scale - (shifted - rounder);
  // a product: adding to the exponent bits would turn some NaNs into finite numbers
  return exp2_fraction(f) * (Vec)((UintVec)shifted << 23);
#endif
}

// x * y + z, rounded once whatever the compiler's flags where NEAR_BLOCKS is.
PPG_INLINE Vec fused(Vec x, Vec y, Vec z) {
#if PPG_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif PPG_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
  return x * y + z;
#endif
}

// 2^t as a product that a sum may take in without rounding it: 2^t = 2^(k / PIECES) 2^f with k = PIECES t rounded. A
// table in registers has the roots of 2, so that f is small and few terms of it do.
struct Product {
  Vec power, fraction;
  Vec value() const { return power * fraction; }
};
#if PPG_LANES == 16
constexpr int PIECE_BITS = 5;
#elif PPG_LANES == 8
constexpr int PIECE_BITS = 3;
#else
constexpr int PIECE_BITS = 0;
#endif
constexpr int PIECES = 1 << PIECE_BITS, PIECE_SHIFT = 23 - PIECE_BITS;
constexpr float NEAR_ROUNDER = ROUNDER / PIECES;  // as ROUNDER, to multiples of 1 / PIECES

// 2^f for |f| <= 1 / (2 PIECES), exactly 1 for 0. The rounded product with a root is 2^t to 1.6e-7 relative, with 16
// lanes to 2.3e-7: minimax polynomials.
PPG_INLINE Vec near_fraction(Vec f) {
#if PPG_LANES == 16
  return (f * 2.402264923e-1f + 6.931573152e-1f) * f + 1.f;
#elif PPG_LANES == 8
  return ((f * 5.549622327e-2f + 2.402576357e-1f) * f + 6.931472421e-1f) * f + 1.f;
#else
  return exp2_fraction(f);
#endif
}

// 2^(i / PIECES) for the low bits i of each element of `k`.
#if PPG_LANES == 16
PPG_INLINE Vec root(UintVec k) {
  const Vec low{1.f,          1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f,
                1.138788635f, 1.163724858f, 1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f,
                1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f},
      high{1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f,
           1.610490332f, 1.645755478f, 1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f,
           1.834008086f, 1.874167633f, 1.915206561f, 1.957144124f};
  return (Vec)_mm512_permutex2var_ps((__m512)low, (__m512i)k, (__m512)high);
}
#elif PPG_LANES == 8
// As bits, less those that the low bits of k << PIECE_SHIFT add to them.
PPG_INLINE UintVec root_less_low_bits(UintVec k) {
  const Vec roots{1.f,          1.090507733f, 1.189207115f, 1.296839555f,
                  1.414213562f, 1.542210825f, 1.681792831f, 1.834008086f};
  const UintVec bits = (UintVec)roots - (UintVec{0, 1, 2, 3, 4, 5, 6, 7} << PIECE_SHIFT);
  return (UintVec)_mm256_permutevar8x32_epi32((__m256i)bits, (__m256i)k);
}
#endif

// With 16 lanes `level` is 0 in exp2_near: an instruction puts the exponent on, and it needs the whole of it.
constexpr bool ONE_LEVEL = LANES == 16;

// 2^(x * scale - level) with `rounder` = NEAR_ROUNDER - level, `level` an integer, where neither x nor the result is
// infinite or leaves the normal range: x * scale is exact inside the fused sums, so no distance is taken before it.
PPG_INLINE Product exp2_near(Vec x, Vec scale, Vec rounder) {
  const Vec shifted = fused(x, scale, rounder), whole = shifted - rounder, f = fused(x, scale, -whole);
  const UintVec k = (UintVec)shifted;
#if PPG_LANES == 16
  return {(Vec)_mm512_scalef_ps((__m512)root(k), (__m512)whole), near_fraction(f)};
#elif PPG_LANES == 8
  return {(Vec)(root_less_low_bits(k) + (k << PIECE_SHIFT)), near_fraction(f)};
#else
  return {(Vec)((k << PIECE_SHIFT) + 0x3f800000u), near_fraction(f)};
#endif
}

// tanh(x) to about 1e-7 relative: Cephes' odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose its digits.
PPG_INLINE Vec tanh_(Vec x) {
  const Vec a = x < 0.f ? -x : x, e = exp2_(at_least(a * float(-2 * LOG2E), LEAST), splat(1.f)),
            far = (1.f - e) / (1.f + e), z = x * x;
  Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  return a < 0.625f ? p * z * x + x : x < 0.f ? -far : far;
}

// log(x) to about 1e-7 for x of the normal range: Cephes' polynomial of the fraction in [sqrt(1/2), sqrt(2)).
PPG_INLINE Vec log_(Vec x) {
  const UintVec from = (UintVec)x - 0x3f3504f3u;  // 0x3f3504f3: sqrt(1/2)
  const IntVec exponent = (IntVec)from >> 23;
  const Vec f = (Vec)((from & 0x7fffffu) + 0x3f3504f3u) - 1.f, e = __builtin_convertvector(exponent, Vec), z = f * f;
  Vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * z - 0.5f * z - e * 2.12194440e-4f) + e * 0.693359375f;
}
