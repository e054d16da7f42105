// Vectors of PPG_LANES floats: element types, exp, tanh, log.
// Included once per instruction set by foreach_isa.h, inside that instruction set's namespace: hence no include guard,
// no includes.

constexpr int LANES = PPG_LANES;
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
typedef float Vec __attribute__((vector_size(4 * PPG_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * PPG_LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * PPG_LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * PPG_LANES)));
typedef int16_t ShortVec __attribute__((vector_size(4 * PPG_LANES)));
typedef uint16_t UshortVec __attribute__((vector_size(4 * PPG_LANES)));

// Whether blocks whose exponents stay in the normal range are taken apart, see exp2_near: AVX-512 has instructions that
// need no such care, and without a fused multiply-add the product would be rounded.
#if PPG_LANES == 8 || defined(__aarch64__)
constexpr bool NEAR_BLOCKS = true;
#else
constexpr bool NEAR_BLOCKS = false;
#endif

#define PPG_INLINE static inline __attribute__((always_inline))

struct Pair {  // 2 * LANES elements of a row, in the order that suits their type
  Vec a, b;
};

PPG_INLINE Vec splat(float x) { return x - Vec{}; }  // not a sum: 0 + -0 is 0, so that the compiler would have to add
// The maximum; b where either is NaN. By intrinsic: compilers turn the ternary into a compare and a blend.
PPG_INLINE Vec vmax(Vec a, Vec b) {
#if PPG_LANES == 16
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif PPG_LANES == 8
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// x, or the NaN 0x7fc00000 for any NaN: BF16::round_up would carry 0x7fffffff, the NaN of CUDA, into a finite number.
PPG_INLINE float plain_nan(float x) { return x != x ? float(NAN) : x; }

PPG_INLINE float reduce_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
PPG_INLINE double reduce_add(Vec v) {
  double s = 0;
  for (int i = 0; i < LANES; ++i) s += v[i];
  return s;
}

// Streaming store past the caches, for memory that is written as a whole and not read soon. `p` is aligned to a vector.
PPG_INLINE void stream(void* p, Vec v) {
#if PPG_LANES == 16
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif PPG_LANES == 8
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#else
  __builtin_memcpy(p, &v, sizeof v);
#endif
}
PPG_INLINE void finish_streaming() {  // before another thread may read it
#if PPG_LANES > 4
  _mm_sfence();
#endif
}
PPG_INLINE bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0; }

// ---- element types ----
struct F32 {
  using raw = float;
  PPG_INLINE Vec load(const raw* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  PPG_INLINE void store(raw* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
  PPG_INLINE Pair load_pair(const raw* p) { return {load(p), load(p + LANES)}; }
  PPG_INLINE void store_pair(raw* p, Pair v) {
    store(p, v.a);
    store(p + LANES, v.b);
  }
  PPG_INLINE void stream_pair(raw* p, Pair v) {
    stream(p, v.a);
    stream(p + LANES, v.b);
  }
};

struct BF16 {
  using raw = uint16_t;
  PPG_INLINE Vec load(const raw* p) {
    HalfBits h;
    __builtin_memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, UintVec) << 16);
  }
  PPG_INLINE UintVec round_up(Vec v) {  // to nearest even in the upper half; a NaN needs a set bit there, see plain_nan
    const UintVec u = (UintVec)v;
    return u + 0x7fffu + ((u >> 16) & 1u);
  }
  PPG_INLINE void store(raw* p, Vec v) {
    const HalfBits h = __builtin_convertvector(round_up(v) >> 16, HalfBits);
    __builtin_memcpy(p, &h, sizeof h);
  }
  PPG_INLINE Pair load_pair(const raw* p) {  // even and odd elements: a shift and a mask instead of two conversions
    UintVec u;
    __builtin_memcpy(&u, p, sizeof u);
    return {(Vec)(u << 16), (Vec)(u & 0xffff0000u)};
  }
  // Rounded to nearest, from half-way away from 0: a sum, where to even takes four operations. NaN as in round_up.
  PPG_INLINE Vec joined(Pair v) {
    return (Vec)((((UintVec)v.a + 0x8000u) >> 16) | (((UintVec)v.b + 0x8000u) & 0xffff0000u));
  }
  PPG_INLINE void store_pair(raw* p, Pair v) {
    const Vec u = joined(v);
    __builtin_memcpy(p, &u, sizeof u);
  }
  PPG_INLINE void stream_pair(raw* p, Pair v) { stream(p, joined(v)); }
};

struct F16 {
  using raw = uint16_t;
#if PPG_LANES == 16
  PPG_INLINE Vec load(const raw* p) {
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  PPG_INLINE void store(raw* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif PPG_LANES == 8
  PPG_INLINE Vec load(const raw* p) {
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  PPG_INLINE void store(raw* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__aarch64__)
  PPG_INLINE Vec load(const raw* p) { return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  PPG_INLINE void store(raw* p, Vec v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v))); }
#else
  PPG_INLINE Vec load(const raw* p) {
    Vec v;
    for (int i = 0; i < LANES; ++i) {
      _Float16 h;
      __builtin_memcpy(&h, p + i, 2);
      v[i] = float(h);
    }
    return v;
  }
  PPG_INLINE void store(raw* p, Vec v) {
    for (int i = 0; i < LANES; ++i) {
      const _Float16 h = _Float16(v[i]);
      __builtin_memcpy(p + i, &h, 2);
    }
  }
#endif
  PPG_INLINE Pair load_pair(const raw* p) { return {load(p), load(p + LANES)}; }
  PPG_INLINE void store_pair(raw* p, Pair v) {
    store(p, v.a);
    store(p + LANES, v.b);
  }
  PPG_INLINE void stream_pair(raw* p, Pair v) {
    raw both[2 * LANES];
    store_pair(both, v);
    Vec u;
    __builtin_memcpy(&u, both, sizeof u);
    stream(p, u);
  }
};

// The last `count` < LANES elements of a row; the other lanes are `fill`.
template <class E> PPG_INLINE Vec load_tail(const typename E::raw* p, int count, typename E::raw fill) {
  typename E::raw buffer[LANES];
  for (int i = 0; i < LANES; ++i) buffer[i] = fill;
  __builtin_memcpy(buffer, p, count * sizeof(buffer[0]));
  return E::load(buffer);
}
template <class E> PPG_INLINE void store_tail(typename E::raw* p, int count, Vec v) {
  typename E::raw buffer[LANES];
  E::store(buffer, v);
  __builtin_memcpy(p, buffer, count * sizeof(buffer[0]));
}
template <class E> PPG_INLINE float load_one(const typename E::raw* p) { return load_tail<E>(p, 1, *p)[0]; }
template <class E> PPG_INLINE void store_one(typename E::raw* p, float x) { store_tail<E>(p, 1, splat(x)); }

// ---- functions ----
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
#if PPG_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
  return x * y + z;
#endif
}

// 2^(x * scale - level) with `rounder` = ROUNDER - level, an integer, where neither x nor the result is NaN or leaves
// the normal range: x * scale is exact inside the fused sums, so no distance is taken before it.
PPG_INLINE Vec exp2_near(Vec x, Vec scale, Vec rounder) {
  const Vec shifted = fused(x, scale, rounder), f = fused(x, scale, rounder - shifted);
  return (Vec)((UintVec)exp2_fraction(f) + ((UintVec)shifted << 23));
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
