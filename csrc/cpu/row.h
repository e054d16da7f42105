// A row of logits: softcap and temperature, and the statistics that every kernel starts from. Included after vec.h, in
// the same manner.

// The logit after softcap and temperature, in units of log 2 so that a probability is one FMA away from the argument of
// exp2: z = x * scale, or tanh(x * inverse_cap) * scale.
template <bool CAP> struct View {
  float scale, inverse_cap;
  View(const Sweep& a, int64_t n) {
    const double temperature = a.temperatures ? a.temperatures[n] : a.temperature;
    scale = plain_nan(float((CAP ? a.logit_softcap : 1.f) / temperature * LOG2E));
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
PPG_INLINE Vec at_least(Vec t, float low) { return vmax(splat(low), t); }

struct Stats {
  float max;                // of z, in units of log 2
  double sum, dot, square;  // sum 2^t, sum 2^t t, sum (2^t)^2, with t = z - max
};

constexpr int STEP = 4 * LANES;       // elements in flight
constexpr int64_t BLOCK = 32 * STEP;  // elements whose maximum is taken before their exponentials: still in L1 by then
// Start of the running maximum. A logit below it counts as -inf, which is what masking by finfo.min means.
constexpr float LOWEST = -1e9f;

// Prefetch of the next row into L2 while this one is computed: `bytes` of it (0: no next row) for every STEP elements.
struct Fetch {
  const char* at;
  int64_t bytes;
  void step() {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
    at += bytes;
  }
};

PPG_INLINE ShortVec ordered(ShortVec bits) { return bits ^ ((bits >> 15) & int16_t(0x7fff)); }  // its own inverse

template <class E> PPG_INLINE float block_max(const typename E::raw* x, int64_t count) {
  int64_t v = 0;
  if constexpr (sizeof(*x) == 2) {  // 16-bit floats compare like integers once the negative ones are reversed
    ShortVec a, b, m = ShortVec{} + int16_t(-32768), n = m;
    for (; v + STEP <= count; v += STEP) {
      __builtin_memcpy(&a, x + v, sizeof a);
      __builtin_memcpy(&b, x + v + 2 * LANES, sizeof b);
      a = ordered(a);
      b = ordered(b);
      m = a > m ? a : m;
      n = b > n ? b : n;
    }
    m = m > n ? m : n;
    int16_t most = -32768;
    for (int i = 0; i < 2 * LANES; ++i) most = m[i] > most ? m[i] : most;
    for (; v < count; ++v) {
      const int16_t key = ordered(ShortVec{} + int16_t(x[v]))[0];
      most = key > most ? key : most;
    }
    const uint16_t bits = ordered(ShortVec{} + most)[0];
    return load_one<E>(&bits);
  } else {
    Vec m0 = splat(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
    for (; v + STEP <= count; v += STEP) {
      m0 = vmax(E::load(x + v), m0);
      m1 = vmax(E::load(x + v + LANES), m1);
      m2 = vmax(E::load(x + v + 2 * LANES), m2);
      m3 = vmax(E::load(x + v + 3 * LANES), m3);
    }
    float most = reduce_max(vmax(vmax(m0, m1), vmax(m2, m3)));
    for (; v < count; ++v) most = x[v] > most ? x[v] : most;
    return most;
  }
}

// The exponentials of a row, kept for its gradient, each relative to the running maximum at its block: exps[v]
// 2^maxima[v / BLOCK]. Stored as pairs of vectors in the order of the element type, the tail in plain order.
struct Kept {
  float *exps, *maxima;
};

// One pass over the row, one exp2 per element; KEEP: stored in `kept` for the gradient. `kept.exps` may be the row
// itself.
template <class E, bool CAP, Sums SUMS, bool KEEP>
PPG_INLINE Stats row_stats(const typename E::raw* x, int64_t V, const View<CAP>& view, const Kept& kept, Fetch& fetch) {
  constexpr bool ENT = SUMS >= ENTROPY, NORM = SUMS == SCORE_NORM;
  Vec sum[4] = {}, dot[4] = {}, square[4] = {};
  float max = LOWEST;
  const auto add = [&](Vec x, float* exps, Vec& sum, Vec& dot, Vec& square) __attribute__((always_inline)) {
    Vec t = view(x, max);
    if constexpr (ENT) t = at_least(t, NEGLIGIBLE);
    const Vec e = exp2_(t);
    if constexpr (KEEP) F32::store(exps, e);
    sum += e;
    if constexpr (ENT) dot += e * t;
    if constexpr (NORM) square += e * e;
  };
  for (int64_t first = 0; first < V; first += BLOCK) {
    const int64_t last = first + BLOCK < V ? first + BLOCK : V;
    const float most = view(block_max<E>(x + first, last - first));
    if (most > max) {  // rescale the sums so far to the new maximum
      const float shift = max - most, scale = exp2_(splat(shift))[0];
      for (int i = 0; i < 4; ++i) {
        if constexpr (ENT) dot[i] = (dot[i] + sum[i] * shift) * scale;
        if constexpr (NORM) square[i] *= scale * scale;
        sum[i] *= scale;
      }
      max = most;
    }
    if constexpr (KEEP) kept.maxima[first / BLOCK] = max;
    int64_t v = first;
    for (; v + STEP <= last; v += STEP) {
      fetch.step();
      const Pair p = E::load_pair(x + v), q = E::load_pair(x + v + 2 * LANES);
      add(p.a, kept.exps + v, sum[0], dot[0], square[0]);
      add(p.b, kept.exps + v + LANES, sum[1], dot[1], square[1]);
      add(q.a, kept.exps + v + 2 * LANES, sum[2], dot[2], square[2]);
      add(q.b, kept.exps + v + 3 * LANES, sum[3], dot[3], square[3]);
    }
    for (; v < last; v += LANES) {
      const int count = int(last - v < LANES ? last - v : LANES);
      Vec t = view(count == LANES ? E::load(x + v) : load_tail<E>(x + v, count, x[v]), max);
      for (int i = count; i < LANES; ++i) t[i] = NEGLIGIBLE;
      t = at_least(t, NEGLIGIBLE);
      const Vec e = exp2_(t);
      if constexpr (KEEP) store_tail<F32>(kept.exps + v, count, e);
      sum[0] += e;
      if constexpr (ENT) dot[0] += e * t;
      if constexpr (NORM) square[0] += e * e;
    }
  }
  const double total = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return {total == 0 ? NAN : max, total, reduce_add((dot[0] + dot[1]) + (dot[2] + dot[3])),
          reduce_add((square[0] + square[1]) + (square[2] + square[3]))};
}

// |d logprob / d z|^2 = sum p^2 - 2 p_label + 1, never below 0. Not inlined, so that the label's exponential is rounded
// as it is in the sums, with which it cancels where p_label is 1: inlined, the compiler may share x * scale with the
// log-prob instead of fusing it into a multiply-add.
template <bool CAP> [[gnu::noinline]] float score_norm(const Stats& s, const View<CAP>& view, float x_label) {
  const double e_label = exp2_(at_least(view(splat(x_label), s.max), NEGLIGIBLE))[0];
  const double norm = s.square / (s.sum * s.sum) - 2 * e_label / s.sum + 1;
  return norm < 0 ? 0.f : float(norm);  // NaN stays NaN
}

// Prefetches row n + 1, if it will be read, in `passes` equal parts.
template <class E> PPG_INLINE Fetch fetch_next(const Sweep& a, int64_t n, int64_t last, int passes) {
  if (n + 1 >= last || a.labels[n + 1] < 0) return {nullptr, 0};
  return {static_cast<const char*>(a.logits.data) + a.logits.offset(n + 1) * int64_t(sizeof(typename E::raw)),
          int64_t(STEP * sizeof(typename E::raw)) / passes};
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
