// Vectors of PPG_LANES floats and the element types of rows.
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
// The minimum, as vmax.
PPG_INLINE Vec vmin(Vec a, Vec b) {
#if PPG_LANES == 16
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
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

// Memory that is kept from call to call and begins with a cache line: vectors that lie across two take twice as long.
struct alignas(64) CacheLine {
  float floats[16];
};
using Scratch = std::vector<CacheLine>;
PPG_INLINE float* floats_of(Scratch& memory, int64_t count) {
  const size_t lines = size_t(count + 15) / 16;
  if (memory.size() < lines) memory.resize(lines);
  return reinterpret_cast<float*>(memory.data());
}

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
