// A row of logits: softcap and temperature, and the statistics that every kernel starts from. Included after
// elementary.h, in the same manner.

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
  // What the exponents of a row are relative to while its maximum is `max`; for near blocks an integer, to which and
  // from which a step is exact. Within LEVEL_REACH of 0 neither squares nor sums of them leave the normal range.
  double level(float max) const {
    constexpr double LEVEL_REACH = 50;
    const double t = double(max) * scale;
    if (ONE_LEVEL) return std::abs(t) <= LEVEL_REACH ? 0 : t;
    return NEAR_BLOCKS ? std::nearbyint(t) : t;
  }
  // Whether exp2_near has a result for every v from `least` to `max`.
  bool near(float least, float max) const {
    const double at = level(max);
    if (ONE_LEVEL) return at == 0 && double(least) * scale > -1e6;  // 0 from -150 on
    return NEAR_BLOCKS && std::abs(at)<(1 << 20) / PIECES&& double(least) * scale - at> - 125;
  }
  Product power_near(Vec v, float max) const {
    return exp2_near(v, splat(scale), splat(ONE_LEVEL ? NEAR_ROUNDER : float(NEAR_ROUNDER - level(max))));
  }
  // 2^(max * scale - level(max)), rounded as it is in near blocks.
  float unit(float max) const {
    if (near(max, max)) return power_near(splat(max), max).value()[0];
    return NEAR_BLOCKS ? float(std::exp2(double(max) * scale - level(max))) : 1.f;
  }
  // 2^((v - max) * scale) as it is in the sums.
  double share(float v, float max) const {
    if (near(v, max)) return power_near(splat(v), max).value()[0] / double(unit(max));
    return power(at_least(splat(v - max), low))[0];
  }
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

constexpr int STEP = 4 * LANES;  // elements in flight
constexpr int64_t BLOCK = 2048;  // elements whose maximum is taken before their exponentials: still in L1 by then
constexpr float LOWEST = -3.402823466e38f;  // start of a running maximum: unlike -inf, less itself it is 0

// Prefetch of the next row into L2 while this one is computed: `bytes` of it (0: no next row) for every STEP elements.
// Its four parts are read side by side: hardware runs ahead in each of them, where it would in one.
struct Fetch {
  static constexpr int64_t PARTS = 4, LINE = 64;
  const char* at;
  int64_t bytes, part = 0, due = 0;  // the size of a part; what the steps since the last four lines are worth
  void step() {
    if ((due += bytes) < PARTS * LINE) return;
    due -= PARTS * LINE;
    for (int64_t i = 0; i < PARTS; ++i) __builtin_prefetch(at + i * part, 0, 2);
    at += LINE;
  }
};

// Prefetch from L2 into L1 of what a loop comes to `AHEAD` elements later: of logits a block, whose maximum is taken
// first; of exponentials a block would push out what is needed sooner.
constexpr int64_t KEPT_AHEAD = 512;
template <int64_t AHEAD, bool WRITE = false, class T> PPG_INLINE void fetch_ahead(const T* at) {
#pragma GCC unroll 8
  for (int64_t v = 0; v < STEP; v += 64 / int64_t(sizeof(T))) __builtin_prefetch(at + AHEAD + v, WRITE, 3);
}

template <class T, class Bits, class Pick> PPG_INLINE T reduce(Bits bits, Pick pick) {
  constexpr int COUNT = sizeof(Bits) / sizeof(T);
  T lanes[COUNT];
  __builtin_memcpy(lanes, &bits, sizeof bits);
#pragma GCC unroll 5
  for (int half = COUNT / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = pick(lanes[i], lanes[i + half]);
  return lanes[0];
}
template <class E, class T> PPG_INLINE float of_bits(T bits) {
  typename E::raw x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return load_one<E>(&x);
}

struct Range {
  float max, min;
};

// The largest element of a block and, for near blocks, the smallest, or 0 where none is negative. As integers: the bits
// of floats are in order, those of negative ones backwards, and NaN is beyond infinity. As floats NaN is passed over.
template <class E> PPG_INLINE Range block_range(const typename E::raw* x, int64_t count) {
  constexpr bool SHORT = sizeof(*x) == 2;
  using Signed = std::conditional_t<SHORT, ShortVec, IntVec>;
  using Unsigned = std::conditional_t<SHORT, UshortVec, UintVec>;
  using Int = std::conditional_t<SHORT, int16_t, int32_t>;
  constexpr int64_t EACH = sizeof(Signed) / sizeof(*x);
  const auto larger = [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; };
  const auto smaller = [](auto a, auto b) __attribute__((always_inline)) { return a < b ? a : b; };
  typename E::raw few[EACH];
  if (count < EACH) {  // so that the last vector can end with the block
    std::fill_n(few, EACH, x[0]);
    __builtin_memcpy(few, x, count * sizeof(*x));
    x = few;
    count = EACH;
  }
  const auto load = [&](int64_t v) __attribute__((always_inline)) {
    Signed bits;
    __builtin_memcpy(&bits, x + v, sizeof bits);
    return bits;
  };
  Signed most = load(count - EACH);
  if constexpr (!SHORT && (LANES == 16 || !NEAR_BLOCKS)) {  // as floats: integers have half the throughput on AVX-512
    const Vec last = (Vec)most;
    Vec m[4] = {last, last, last, last}, l[4] = {last, last, last, last};
    const auto take = [&](int64_t v, int i) __attribute__((always_inline)) {
      const Vec x = (Vec)load(v);
      m[i] = vmax(x, m[i]);
      if constexpr (NEAR_BLOCKS) l[i] = vmin(x, l[i]);
    };
    int64_t v = 0;
    for (; v + 4 * EACH <= count; v += 4 * EACH)
      for (int i = 0; i < 4; ++i) take(v + i * EACH, i);
    for (; v + EACH <= count; v += EACH) take(v, 0);
    const Vec least = vmin(vmin(l[0], l[1]), vmin(l[2], l[3]));
    return {reduce_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3]))), NEAR_BLOCKS ? -reduce_max(-least) : 0.f};
  }
  Unsigned least = (Unsigned)most;
#pragma GCC unroll 4
  for (int64_t v = 0; v + EACH <= count; v += EACH) {
    const Signed bits = load(v);
    most = larger(bits, most);
    if constexpr (NEAR_BLOCKS) least = larger((Unsigned)bits, least);
  }
  Int max = reduce<Int>(most, larger);
  const Int min = NEAR_BLOCKS ? Int(reduce<std::make_unsigned_t<Int>>(least, larger)) : Int(0);
  if (max < 0) {  // negative all of them: the largest has the least bits
    most = load(count - EACH);
    for (int64_t v = 0; v + EACH <= count; v += EACH) most = smaller(load(v), most);
    max = reduce<Int>(most, smaller);
  }
  return {of_bits<E>(max), min < 0 ? of_bits<E>(min) : 0.f};
}

// The exponentials of a row, kept for its gradient: of a block b, relative to the level of maxima[b], the maximum by
// then. Stored as pairs of vectors in the order of the element type, the tail in plain order.
struct Kept {
  float *exps, *maxima;
};

// What is added up over a row, in as many vectors as hide the latency of a sum and leave registers to the exponential.
template <Sums SUMS> struct Totals {
  static constexpr bool ENT = SUMS >= ENTROPY, NORM = SUMS == SCORE_NORM;
  Vec sum[4] = {}, dot[2] = {}, square[2] = {};
  [[gnu::always_inline]] void add(int i, Product product, Vec e, Vec d) {
    sum[i] = fused(product.power, product.fraction, sum[i]);  // whether e is kept or not
    if constexpr (ENT) dot[i % 2] += e * d;
    if constexpr (NORM) square[i % 2] += e * e;
  }
  // To a maximum of which the old one has the distance `shift`; `scale`: 2^t of the step between their levels.
  void rescale(float shift, float scale) {
    for (int i = 0; i < 2; ++i) {
      if constexpr (ENT) dot[i] = (dot[i] + (sum[i] + sum[i + 2]) * shift) * scale;
      if constexpr (NORM) square[i] *= scale * scale;
    }
    for (Vec& s : sum) s *= scale;
  }
  Stats over(double unit, float max) const {
    const double total = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / unit;
    return {total == 0 ? NAN : max, total, reduce_add(dot[0] + dot[1]) / unit,
            reduce_add(square[0] + square[1]) / (unit * unit)};
  }
};

// One pass over the row, one exp2 per element; KEEP: stored in `kept` for the gradient. `kept.exps` may be the row
// itself.
template <class E, bool CAP, Sums SUMS, bool KEEP>
PPG_INLINE Stats row_stats(const typename E::raw* x, int64_t V, const View<CAP>& view, const Kept& kept, Fetch& fetch) {
  constexpr bool ENT = SUMS >= ENTROPY;
  Totals<SUMS> totals;
  float max = LOWEST, unit = view.unit(max);
  const auto far = [&](Vec d) __attribute__((always_inline)) {
    return Product{view.power(d), splat(NEAR_BLOCKS ? unit : 1.f)};
  };
  const auto take = [&](auto near, Vec x, float* exps, int i) __attribute__((always_inline)) {
    Vec d{};
    Product product;
    if constexpr (decltype(near)::value) {
      const Vec v = view(x);
      product = view.power_near(v, max);
      if constexpr (ENT) d = v + splat(-max);
    } else {
      d = view.template distance<ENT>(x, max);
      product = far(d);
    }
    const Vec e = product.value();
    if constexpr (KEEP) F32::store(exps, e);
    totals.add(i, product, e, d);
  };
  const auto sweep = [&](auto near, int64_t v, int64_t last) __attribute__((always_inline)) {
    for (; v + STEP <= last; v += STEP) {
      fetch.step();
      fetch_ahead<BLOCK>(x + v);
      if constexpr (KEEP) fetch_ahead<KEPT_AHEAD, true>(kept.exps + v);
      const Pair p = E::load_pair(x + v), q = E::load_pair(x + v + 2 * LANES);
      take(near, p.a, kept.exps + v, 0);
      take(near, p.b, kept.exps + v + LANES, 1);
      take(near, q.a, kept.exps + v + 2 * LANES, 2);
      take(near, q.b, kept.exps + v + 3 * LANES, 3);
    }
    return v;
  };
  for (int64_t first = 0; first < V; first += BLOCK) {
    const int64_t last = first + BLOCK < V ? first + BLOCK : V;
    const Range range = block_range<E>(x + first, last - first);
    const float most = view(range.max), least = view(range.min);
    if (most > max) {
      const float shift = at_least(splat(max - most), view.low)[0];
      totals.rescale(shift, float(std::exp2(view.level(max) - view.level(most))));
      max = most;
      unit = view.unit(max);
    }
    if constexpr (KEEP) kept.maxima[first / BLOCK] = max;
    const bool near = most <= max && view.near(least, max);
    int64_t v = near ? sweep(std::bool_constant<NEAR_BLOCKS>{}, first, last) : sweep(std::false_type{}, first, last);
    for (; v < last; v += LANES) {
      const int count = int(last - v < LANES ? last - v : LANES);
      Vec d = view.distance(count == LANES ? E::load(x + v) : load_tail<E>(x + v, count, x[v]), max);
      for (int i = count; i < LANES; ++i) d[i] = view.low;
      const Product product = far(d);
      const Vec e = product.value();
      if constexpr (KEEP) store_tail<F32>(kept.exps + v, count, e);
      totals.add(0, product, e, d);
    }
  }
  return totals.over(unit, max);
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
  const double e_label = view.share(view(x_label), s.max);
  const double norm = s.square / (s.sum * s.sum) - 2 * e_label / s.sum + 1;
  return norm < 0 ? 0.f : float(norm);  // NaN stays NaN
}

// Prefetches row n + 1, if it will be read, in `passes` over row n.
template <class E> PPG_INLINE Fetch fetch_next(const Sweep& a, int64_t n, int64_t last, int passes) {
  if (n + 1 >= last || a.labels[n + 1] < 0) return {nullptr, 0};
  constexpr int64_t SIZE = sizeof(typename E::raw), ROUND = Fetch::PARTS * Fetch::LINE;
  return {static_cast<const char*>(a.logits.data) + a.logits.offset(n + 1) * SIZE, STEP * SIZE / passes,
          (a.V * SIZE + ROUND - 1) / ROUND * Fetch::LINE};
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
