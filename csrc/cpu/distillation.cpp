// How far a teacher's row is from the student's, and the gradient by the student's logits. Mirrors
// ppg_fast/reference/distillation.py
#ifndef PPG_LANES
#define PPG_KERNELS "distillation.cpp"
#include "foreach_isa.h"

namespace ppg::cpu {
PPG_DISPATCH(distillation, DistillationArgs)
}  // namespace ppg::cpu
#else

constexpr float LEAST_LOGPROB = -1e4f;  // as in ppg_fast/spec.py
constexpr float LEAST_EXPONENT = float(LEAST * LN2);

enum Divergence { FORWARD_KL, REVERSE_KL, JSD };

// exp(x) for x of log-probs; below, 0.
PPG_INLINE Vec exp_(Vec x) { return exp2_(at_least(x, LEAST_EXPONENT), splat(float(LOG2E))); }

// The softcap and temperature of one side: z = v * nats with v = x, or tanh(x / softcap).
struct Scale {
  float nats, inverse_cap;
  Scale(float softcap, float temperature)
      : nats(plain_nan((softcap != 0.f ? softcap : 1.f) / temperature)),
        inverse_cap(softcap != 0.f ? 1.f / softcap : 0.f) {}
  template <bool CAP> Vec of(Vec x) const {
    if constexpr (CAP) return tanh_(x * inverse_cap);
    return x;
  }
};

// The v of a row as float32, pairs of vectors in the order of the element type, -inf behind the last; their maximum.
template <class E, bool CAP> float unpack_row(const typename E::raw* x, int64_t V, const Scale& scale, float* out) {
  Vec m0 = splat(LOWEST), m1 = m0;
  int64_t v = 0;
  for (; v + 2 * LANES <= V; v += 2 * LANES) {
    const Pair p = E::load_pair(x + v), z{scale.of<CAP>(p.a), scale.of<CAP>(p.b)};
    F32::store(out + v, z.a);
    F32::store(out + v + LANES, z.b);
    m0 = vmax(z.a, m0);
    m1 = vmax(z.b, m1);
  }
  for (; v < V; v += LANES) {
    const int count = int(V - v < LANES ? V - v : LANES);
    Vec z = scale.of<CAP>(load_tail<E>(x + v, count, x[v]));
    for (int i = count; i < LANES; ++i) z[i] = -INFINITY;
    F32::store(out + v, z);
    m0 = vmax(z, m0);
  }
  return reduce_max(vmax(m0, m1));
}

// v becomes log p: z minus log-sum-exp. `length` is a multiple of 2 LANES.
PPG_INLINE void log_softmax(float* v, int64_t length, float max, float nats) {
  Vec sum[2] = {};
  for (int64_t i = 0; i < length; i += 2 * LANES) {
    const Vec a = (F32::load(v + i) - max) * nats, b = (F32::load(v + i + LANES) - max) * nats;
    F32::store(v + i, a);
    F32::store(v + i + LANES, b);
    sum[0] += exp_(a);
    sum[1] += exp_(b);
  }
  const double total = reduce_add(sum[0] + sum[1]);
  const float lse = total == 0 ? NAN : float(std::log(total));
  for (int64_t i = 0; i < length; i += LANES) F32::store(v + i, at_least(F32::load(v + i) - lse, LEAST_LOGPROB));
}

// A row as log-probs.
template <class E>
void log_probs(const typename E::raw* x, int64_t V, int64_t length, float softcap, float temperature, float* out) {
  const Scale scale(softcap, temperature);
  for (int64_t i = V / LANES * LANES; i < length; ++i) out[i] = -INFINITY;
  const float max = softcap != 0.f ? unpack_row<E, true>(x, V, scale, out) : unpack_row<E, false>(x, V, scale, out);
  log_softmax(out, length, max, scale.nats);
}

struct Added {
  Vec divergence, of_student;  // the latter: KL(p, q), or KL(p, m)
};

// log(p / m) and log(q / m) of m = beta q + (1 - beta) p from L = log(p / q), by the larger of p and q.
PPG_INLINE Pair over_mixture(Vec L, float beta) {
  const auto student = L >= 0.f;
  const Vec least = exp_(student ? -L : L), share = student ? splat(1.f - beta) : splat(beta);
  const Vec n = -log_(share + (1.f - share) * least);
  return {student ? n : n + L, student ? n - L : n};
}

// What one vector adds to the sums; `s` and `t` become what the gradient is made of, s - of_student * t.
template <Divergence KIND> PPG_INLINE void add(float* s, float* t, float beta, Added& sums) {
  const Vec logp = F32::load(s), logq = F32::load(t), L = logp - logq, p = exp_(logp);
  Vec u;
  if constexpr (KIND == FORWARD_KL) {
    const Vec q = exp_(logq);
    sums.divergence -= q * L;
    u = p - q;
  } else if constexpr (KIND == REVERSE_KL) {
    u = p * L;
    sums.divergence += u;
  } else {
    const Pair over = over_mixture(L, beta);
    u = p * over.a;
    sums.of_student += u;
    sums.divergence += beta * (exp_(logq) * over.b) + (1.f - beta) * u;
  }
  F32::store(s, u);
  if constexpr (KIND != FORWARD_KL) F32::store(t, p);
}

template <Divergence KIND> Added add_up(float* s, float* t, int64_t length, float beta) {
  Added even{}, odd{};
  for (int64_t i = 0; i < length; i += 2 * LANES) {
    add<KIND>(s + i, t + i, beta, even);
    add<KIND>(s + i + LANES, t + i + LANES, beta, odd);
  }
  return {even.divergence + odd.divergence, even.of_student + odd.of_student};
}

// (s - mean t) factor, through the softcap, in the order of unpack_row. `x` may be `out`: read before it is written.
template <class E, bool CAP, bool MEAN>
void write_gradient(const typename E::raw* x, typename E::raw* out, int64_t V, const float* s, const float* t,
                    float mean, float factor, float inverse_cap) {
  const auto gradient = [&](int64_t v, Vec x) __attribute__((always_inline)) {
    Vec d = F32::load(s + v);
    if constexpr (MEAN) d -= mean * F32::load(t + v);
    d *= factor;
    if constexpr (CAP) {
      const Vec h = tanh_(x * inverse_cap);
      d *= 1.f - h * h;
    }
    return d;
  };
  int64_t v = 0;
  for (; v + 2 * LANES <= V; v += 2 * LANES) {
    const Pair p = CAP ? E::load_pair(x + v) : Pair{};
    E::store_pair(out + v, {gradient(v, p.a), gradient(v + LANES, p.b)});
  }
  for (; v < V; v += LANES) {
    const int count = int(V - v < LANES ? V - v : LANES);
    store_tail<E>(out + v, count, gradient(v, CAP ? load_tail<E>(x + v, count, x[v]) : Vec{}));
  }
}

// Divergence and, where it is wanted, gradient of the row that is not masked and has a weight. `s`, `t`: `length`
// floats of scratch each, a multiple of 2 LANES.
template <class E>
void distil_row(const DistillationArgs& a, int64_t n, float weight, int64_t length, float* s, float* t) {
  const auto* x = static_cast<const typename E::raw*>(a.logits.data) + a.logits.offset(n);
  const auto* y = static_cast<const typename E::raw*>(a.teacher_logits.data) + a.teacher_logits.offset(n);
  const float temperature = a.temperatures ? a.temperatures[n] : a.temperature;
  log_probs<E>(x, a.V, length, a.logit_softcap, temperature, s);
  log_probs<E>(y, a.V, length, a.teacher_softcap, temperature, t);
  const bool forward = a.beta == 0.f, reverse = a.beta == 1.f;
  const Added sums = forward   ? add_up<FORWARD_KL>(s, t, length, a.beta)
                     : reverse ? add_up<REVERSE_KL>(s, t, length, a.beta)
                               : add_up<JSD>(s, t, length, a.beta);
  const float divergence = float(reduce_add(sums.divergence));
  a.divergence[n] = divergence;
  if (!a.dlogits.data) return;
  auto* out = static_cast<typename E::raw*>(a.dlogits.data) + a.dlogits.offset(n);
  const float mean = forward || reverse ? divergence : float(reduce_add(sums.of_student));
  const float factor = weight / temperature * (forward || reverse ? 1.f : 1.f - a.beta);
  const auto write = a.logit_softcap != 0.f
                         ? (forward ? write_gradient<E, true, false> : write_gradient<E, true, true>)
                         : (forward ? write_gradient<E, false, false> : write_gradient<E, false, true>);
  write(x, out, a.V, s, t, mean, factor, a.logit_softcap != 0.f ? 1.f / a.logit_softcap : 0.f);
}

template <class E> void distillation_of(const DistillationArgs& a, int64_t first, int64_t last) {
  const int64_t length = (a.V + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < 2 * length) memory.resize(2 * length);
  for (int64_t n = first; n < last; ++n) {
    const float weight = a.weights ? plain_nan(a.weights[n]) : 1.f;
    if (a.labels[n] >= 0 && weight != 0.f) {
      distil_row<E>(a, n, weight, length, memory.data(), memory.data() + length);
      continue;
    }
    a.divergence[n] = 0.f;
    if (a.dlogits.data) zero_row<E>(a.dlogits, n, a.V);
  }
}

void distillation(const DistillationArgs& a, int64_t first, int64_t last) {
  PPG_BY_DTYPE(a.dtype, distillation_of, a, first, last);
}

#endif
