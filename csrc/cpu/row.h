// A row of logits as vectors of PPG_LANES floats: element types, exp, tanh and the statistics that every kernel starts from.
// Included once per instruction set by foreach_isa.h, inside that instruction set's namespace: hence no include guard, no includes.

constexpr int LANES = PPG_LANES;
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
typedef float Vec __attribute__((vector_size(4 * PPG_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * PPG_LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * PPG_LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * PPG_LANES)));

#define PPG_INLINE static inline __attribute__((always_inline))

struct Pair {  // 2 * LANES elements of a row, in an order of their type's own
  Vec a, b;
};

PPG_INLINE Vec splat(float x) { return Vec{} + x; }
PPG_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }  // a NaN in `a` is passed over

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

// ---- element types ----------------------------------------------------------------------------------------------------------------
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
};

struct BF16 {
  using raw = uint16_t;
  PPG_INLINE Vec load(const raw* p) {
    HalfBits h;
    __builtin_memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, UintVec) << 16);
  }
  PPG_INLINE UintVec round_up(Vec v) {  // to nearest even in the upper half; a NaN that arithmetic made stays one
    const UintVec u = (UintVec)v;
    return u + 0x7fffu + ((u >> 16) & 1u);
  }
  PPG_INLINE void store(raw* p, Vec v) {
    const HalfBits h = __builtin_convertvector(round_up(v) >> 16, HalfBits);
    __builtin_memcpy(p, &h, sizeof h);
  }
  PPG_INLINE Pair load_pair(const raw* p) {  // even and odd elements: a shift and a mask in place of two conversions
    UintVec u;
    __builtin_memcpy(&u, p, sizeof u);
    return {(Vec)(u << 16), (Vec)(u & 0xffff0000u)};
  }
  PPG_INLINE void store_pair(raw* p, Pair v) {
    const UintVec u = (round_up(v.a) >> 16) | (round_up(v.b) & 0xffff0000u);
    __builtin_memcpy(p, &u, sizeof u);
  }
};

struct F16 {
  using raw = uint16_t;
#if PPG_LANES == 16
  PPG_INLINE Vec load(const raw* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  PPG_INLINE void store(raw* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif PPG_LANES == 8
  PPG_INLINE Vec load(const raw* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  PPG_INLINE void store(raw* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
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
};

// The `count` < LANES elements at the end of a row; the lanes behind them are copies of `fill`.
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

// ---- functions --------------------------------------------------------------------------------------------------------------------
// 2^t to 1.5e-7 relative, for t that may be far below zero (0 below the normal range) but not far above; NaN stays NaN.
// Minimax polynomials of the fractional part.
PPG_INLINE Vec exp2_(Vec t) {
#if PPG_LANES == 16
  const Vec f = (Vec)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t)
  Vec p = f * 1.877576673e-3f + 8.989340095e-3f;
  p = p * f + 5.582631805e-2f;
  p = p * f + 2.40153617e-1f;
  p = p * f + 6.931530732e-1f;
  p = p * f + 9.999999251e-1f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low mantissa bits
  const Vec shifted = t + magic, f = t - (shifted - magic);
  Vec p = f * 1.5345812e-4f + 1.339993122e-3f;
  p = p * f + 9.618488957e-3f;
  p = p * f + 5.550328777e-2f;
  p = p * f + 2.402264689e-1f;
  p = p * f + 6.931472057e-1f;
  p = p * f + 1.000000001f;
  const Vec scaled = (Vec)((UintVec)p + ((UintVec)shifted << 23));
  return t < splat(-126.f) ? Vec{} : scaled;
#endif
}

// tanh(x) to about 1e-7 relative: Cephes' odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose its digits.
PPG_INLINE Vec tanh_(Vec x) {
  const Vec a = x < 0.f ? -x : x, e = exp2_(a * float(-2 * LOG2E)), far = (1.f - e) / (1.f + e), z = x * x;
  Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  return a < 0.625f ? p * z * x + x : x < 0.f ? -far : far;
}

// ---- the logit after softcap and temperature ----------------------------------------------------------------------------------------
// In units of log 2, so that a probability is one FMA away from the argument of exp2: z = x * scale, or tanh(x * inverse_cap) * scale.
template <bool CAP> struct View {
  float scale, inverse_cap;
  View(const Sweep& a, int64_t n) {
    const double temperature = a.temperatures ? a.temperatures[n] : a.temperature;
    scale = float((CAP ? a.logit_softcap : 1.f) / temperature * LOG2E);
    inverse_cap = CAP ? 1.f / a.logit_softcap : 0.f;
  }
  Vec operator()(Vec x, float minus) const {
    if constexpr (CAP) return tanh_(x * inverse_cap) * scale - minus;
    return x * scale - minus;
  }
  float operator()(float x) const { return (*this)(splat(x), 0.f)[0]; }
  // d z / d x, of a function that has already been divided by the temperature
  Vec slope(Vec x) const {
    const Vec t = tanh_(x * inverse_cap);
    return 1.f - t * t;
  }
};

constexpr float NEGLIGIBLE = -1e4f;  // an exponent whose exp2 is 0: keeps 0 * -inf out of the entropy sums
PPG_INLINE Vec at_least(Vec t, float low) { return t < low ? splat(low) : t; }

struct Stats {
  float max;        // of z, in units of log 2
  double sum, dot;  // sum 2^t, sum 2^t t, with t = z - max
};

template <class E> PPG_INLINE float row_max(const typename E::raw* x, int64_t V) {
  Vec m0 = splat(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
  int64_t v = 0;
  for (; v + 4 * LANES <= V; v += 4 * LANES) {
    const Pair p = E::load_pair(x + v), q = E::load_pair(x + v + 2 * LANES);
    m0 = vmax(p.a, m0);
    m1 = vmax(p.b, m1);
    m2 = vmax(q.a, m2);
    m3 = vmax(q.b, m3);
  }
  for (; v + LANES <= V; v += LANES) m0 = vmax(E::load(x + v), m0);
  if (v < V) m1 = vmax(load_tail<E>(x + v, int(V - v), x[v]), m1);
  return reduce_max(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// One exp2 per element, kept in `exps` if the gradient will need it; meanwhile the row at `next` (null: none) is fetched into L2.
// `exps` holds pairs of vectors as their element type orders them, then the tail in plain order.
template <class E, bool CAP, bool ENT, bool KEEP>
PPG_INLINE Stats row_stats(const typename E::raw* x, int64_t V, const View<CAP>& view, float* exps, const typename E::raw* next) {
  constexpr int STEP = 4 * LANES;
  const float max = view(row_max<E>(x, V));
  Vec sum[4] = {}, dot[4] = {};
  const auto add = [&](Vec x, float* kept, Vec& sum, Vec& dot) __attribute__((always_inline)) {
    Vec t = view(x, max);
    if constexpr (ENT) t = at_least(t, NEGLIGIBLE);
    const Vec e = exp2_(t);
    if constexpr (KEEP) F32::store(kept, e);
    sum += e;
    if constexpr (ENT) dot += e * t;
  };
  int64_t v = 0;
  for (; v + STEP <= V; v += STEP) {
    if (next) {
      for (size_t byte = 0; byte < STEP * sizeof(*x); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(next + v) + byte, 0, 2);
    }
    const Pair p = E::load_pair(x + v), q = E::load_pair(x + v + 2 * LANES);
    add(p.a, exps + v, sum[0], dot[0]);
    add(p.b, exps + v + LANES, sum[1], dot[1]);
    add(q.a, exps + v + 2 * LANES, sum[2], dot[2]);
    add(q.b, exps + v + 3 * LANES, sum[3], dot[3]);
  }
  for (; v < V; v += LANES) {
    const int count = int(V - v < LANES ? V - v : LANES);
    Vec t = view(count == LANES ? E::load(x + v) : load_tail<E>(x + v, count, x[v]), max);
    for (int i = count; i < LANES; ++i) t[i] = NEGLIGIBLE;
    t = at_least(t, NEGLIGIBLE);
    const Vec e = exp2_(t);
    if constexpr (KEEP) store_tail<F32>(exps + v, count, e);
    sum[0] += e;
    if constexpr (ENT) dot[0] += e * t;
  }
  return {max, reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])), reduce_add((dot[0] + dot[1]) + (dot[2] + dot[3]))};
}

// The row behind row n that will be read, to be fetched early; null if there is none.
template <class E> PPG_INLINE const typename E::raw* next_row(const Sweep& a, int64_t n, int64_t last) {
  return n + 1 < last && a.labels[n + 1] >= 0 ? static_cast<const typename E::raw*>(a.logits.data) + a.logits.offset(n + 1) : nullptr;
}

template <class E> PPG_INLINE void zero_row(const Rows& rows, int64_t n, int64_t V) {
  std::memset(static_cast<typename E::raw*>(rows.data) + rows.offset(n), 0, V * sizeof(typename E::raw));
}

// Calls f<E>(...) for the dtype of the tensor.
#define PPG_BY_DTYPE(dtype, f, ...)                \
  switch (dtype) {                                 \
    case DType::F32: return f<F32>(__VA_ARGS__);   \
    case DType::BF16: return f<BF16>(__VA_ARGS__); \
    case DType::F16: return f<F16>(__VA_ARGS__);   \
  }
