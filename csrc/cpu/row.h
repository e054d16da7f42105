// A row of logits: softcap and temperature, and the statistics that every kernel starts from. Included after vec.h, in
// the same manner.

// With v = x, or tanh(x / softcap), the logit after softcap and temperature is v * scale in units of log 2. What is
// scaled is the distance d = v - max v, which is exact where it counts, however far from 0 all logits are.
template <bool CAP> struct View {
  double nats;  // scale in nats, not rounded
  float scale, inverse_cap;
  float low;  // the d of LEAST: its exponential is 0, and 0 * low is
  View(const Sweep& a, int64_t n) {
    const double temperature = a.temperatures ? a.temperatures[n] : a.temperature;
    nats = (CAP ? a.logit_softcap : 1.f) / temperature;
    scale = plain_nan(float(nats * LOG2E));
    inverse_cap = CAP ? 1.f / a.logit_softcap : 0.f;
    low = LEAST / scale;
  }
  Vec operator()(Vec x) const {
    if constexpr (CAP) return tanh_(x * inverse_cap);
    return x;
  }
  float operator()(float x) const { return (*this)(splat(x))[0]; }
  template <bool LOW = true> Vec distance(Vec x, float max) const {  // LOW: not below `low`
    const Vec d = (*this)(x) + splat(-max);  // a sum, unlike x - max, may take x straight from memory
    return LOW || LANES < 16 ? at_least(d, low) : d;
  }
  Vec power(Vec d) const { return exp2_(d, splat(scale)); }
  float power(float d) const { return power(at_least(splat(d), low))[0]; }
  // d z / d x, of a function that has already been divided by the temperature
  Vec slope(Vec x) const {
    const Vec t = tanh_(x * inverse_cap);
    return 1.f - t * t;
  }
};

struct Stats {
  float max;                // of v
  double sum, dot, square;  // sum 2^t, sum 2^t d, sum (2^t)^2, with t = d * scale, d = v - max
};

constexpr int STEP = 4 * LANES;       // elements in flight
constexpr int64_t BLOCK = 32 * STEP;  // elements whose maximum is taken before their exponentials: still in L1 by then
constexpr float LOWEST =
    -3.402823466e38f;  // start of the running maximum: unlike -inf it can be subtracted from itself

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
    const Vec d = view.template distance<ENT>(x, max), e = view.power(d);
    if constexpr (KEEP) F32::store(exps, e);
    sum += e;
    if constexpr (ENT) dot += e * d;
    if constexpr (NORM) square += e * e;
  };
  for (int64_t first = 0; first < V; first += BLOCK) {
    const int64_t last = first + BLOCK < V ? first + BLOCK : V;
    const float most = view(block_max<E>(x + first, last - first));
    if (most > max) {  // rescale the sums so far to the new maximum
      const float shift = at_least(splat(max - most), view.low)[0], scale = view.power(shift);
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
      Vec d = view.distance(count == LANES ? E::load(x + v) : load_tail<E>(x + v, count, x[v]), max);
      for (int i = count; i < LANES; ++i) d[i] = view.low;
      const Vec e = view.power(d);
      if constexpr (KEEP) store_tail<F32>(kept.exps + v, count, e);
      sum[0] += e;
      if constexpr (ENT) dot[0] += e * d;
      if constexpr (NORM) square[0] += e * e;
    }
  }
  const double total = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return {total == 0 ? NAN : max, total, reduce_add((dot[0] + dot[1]) + (dot[2] + dot[3])),
          reduce_add((square[0] + square[1]) + (square[2] + square[3]))};
}

// The log-prob of the label in nats. The label's distance is scaled in float64, so that its rounding is that of the
// logits.
template <bool CAP> PPG_INLINE float logprob_of(const Stats& s, const View<CAP>& view, float x_label) {
  return float((double(view(x_label)) - s.max) * view.nats - std::log(s.sum));
}
// log sum exp of the logits after softcap and temperature, in nats.
template <bool CAP> PPG_INLINE float lse_of(const Stats& s, const View<CAP>& view) {
  return float(s.max * view.nats + std::log(s.sum));
}
template <bool CAP> PPG_INLINE float entropy_of(const Stats& s, const View<CAP>& view) {
  return float(std::log(s.sum) - s.dot / s.sum * view.nats);
}

// |d logprob / d z|^2 = sum p^2 - 2 p_label + 1, never below 0. Not inlined, so that the label's exponential is rounded
// as it is in the sums, with which it cancels where p_label is 1: inlined, the compiler may share x * scale with the
// log-prob instead of fusing it into a multiply-add.
template <bool CAP> [[gnu::noinline]] float score_norm(const Stats& s, const View<CAP>& view, float x_label) {
  const double e_label = view.power(view.distance(splat(x_label), s.max))[0];
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
