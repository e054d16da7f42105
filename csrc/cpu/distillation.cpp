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
};

// tanh(x / softcap) of a row, pairs of vectors in the order of the element type; the largest.
template <class E> float unpack_row(const typename E::raw* x, int64_t V, const Scale& scale, float* out) {
  Vec m0 = splat(LOWEST), m1 = m0;
  int64_t v = 0;
  for (; v + 2 * LANES <= V; v += 2 * LANES) {
    const Pair p = E::load_pair(x + v), z{tanh_(p.a * scale.inverse_cap), tanh_(p.b * scale.inverse_cap)};
    F32::store(out + v, z.a);
    F32::store(out + v + LANES, z.b);
    m0 = vmax(z.a, m0);
    m1 = vmax(z.b, m1);
  }
  for (; v < V; v += LANES) {
    const int count = int(V - v < LANES ? V - v : LANES);
    const Vec z = tanh_(load_tail<E>(x + v, count, x[v]) * scale.inverse_cap);
    F32::store(out + v, z);
    m0 = vmax(z, m0);
  }
  return reduce_max(vmax(m0, m1));
}

// A row in scratch: z - max z of each element, -inf behind the last, and its exponential.
struct Side {
  float *z, *exps;
  float lse, inverse;  // log of the sum of the exponentials, and 1 / sum
  Vec logp(int64_t v) const { return at_least(F32::load(z + v) - lse, LEAST_LOGPROB); }
  Vec p(int64_t v) const { return F32::load(exps + v) * inverse; }
};

template <class E, bool CAP>
Side exponentials(const typename E::raw* x, int64_t V, int64_t length, const Scale& scale, float* memory) {
  float *const z = memory, *const exps = memory + length, nats = scale.nats;
  float max;
  if constexpr (CAP) max = unpack_row<E>(x, V, scale, z);
  else max = block_range<E>(x, V).max;
  Vec sum[2] = {};
  const auto add = [&](int64_t v, Vec x, Vec& sum) __attribute__((always_inline)) {
    const Vec d = (x - max) * nats, e = exp_(d);
    F32::store(z + v, d);
    F32::store(exps + v, e);
    sum += e;
  };
  int64_t v = 0;
  for (; v + 2 * LANES <= V; v += 2 * LANES) {
    const Pair p = CAP ? F32::load_pair(z + v) : E::load_pair(x + v);
    add(v, p.a, sum[0]);
    add(v + LANES, p.b, sum[1]);
  }
  for (; v < length; v += LANES) {
    const int count = int(V - v < LANES ? (V - v < 0 ? 0 : V - v) : LANES);
    Vec last = CAP ? F32::load(z + v) : count ? load_tail<E>(x + v, count, x[v]) : Vec{};
    for (int i = count; i < LANES; ++i) last[i] = -INFINITY;
    add(v, last, sum[0]);
  }
  const double total = reduce_add(sum[0] + sum[1]);
  return {z, exps, float(std::log(total)), float(1 / total)};
}

template <class E>
Side side_of(const typename E::raw* x, int64_t V, int64_t length, float softcap, float temperature, float* memory) {
  const Scale scale(softcap, temperature);
  return softcap != 0.f ? exponentials<E, true>(x, V, length, scale, memory)
                        : exponentials<E, false>(x, V, length, scale, memory);
}

// x as it is rounded, so that no product in it is fused into a sum.
PPG_INLINE Vec rounded(Vec x) {
#ifdef __has_builtin
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(x);
#endif
#endif
  return x;
}

struct Added {
  Vec divergence, of_student;  // the latter: KL(p, m)
};

// log(p / m) and log(q / m) of m = beta q + (1 - beta) p from L = log(p / q), by the larger of p and q.
PPG_INLINE Pair over_mixture(Vec L, float beta) {
  const auto student = L >= 0.f;
  const Vec least = exp_(student ? -L : L), share = student ? splat(1.f - beta) : splat(beta);
  const Vec n = -log_(share + (1.f - share) * least);
  return {student ? n : n + L, student ? n - L : n};
}

// What the vector at v adds to the sums; the student's z becomes u of its gradient, u - KL p.
template <Divergence KIND>
PPG_INLINE void add(const Side& student, const Side& teacher, int64_t v, float beta, Added& sums) {
  const Vec L = student.logp(v) - teacher.logp(v), p = student.p(v);
  Vec u;
  if constexpr (KIND == FORWARD_KL) {
    const Vec q = teacher.p(v);
    sums.divergence -= q * L;
    u = rounded(p) - q;  // of equal logits exactly 0, which one fused multiply-add would not be
  } else if constexpr (KIND == REVERSE_KL) {
    u = p * L;
    sums.divergence += u;
  } else {
    const Pair over = over_mixture(L, beta);
    u = p * over.a;
    sums.of_student += u;
    sums.divergence += beta * (teacher.p(v) * over.b) + (1.f - beta) * u;
  }
  F32::store(student.z + v, u);
}

template <Divergence KIND> Added add_up(const Side& student, const Side& teacher, int64_t length, float beta) {
  Added even{}, odd{};
  for (int64_t v = 0; v < length; v += 2 * LANES) {
    add<KIND>(student, teacher, v, beta, even);
    add<KIND>(student, teacher, v + LANES, beta, odd);
  }
  return {even.divergence + odd.divergence, even.of_student + odd.of_student};
}

// (u - mean e) factor, through the softcap, in the order of the row. `x` may be `out`: read before it is written.
template <class E, bool CAP, bool MEAN>
void write_gradient(const typename E::raw* x, typename E::raw* out, int64_t V, const Side& student, float mean,
                    float factor, float inverse_cap) {
  const auto gradient = [&](int64_t v, Vec x) __attribute__((always_inline)) {
    Vec d = F32::load(student.z + v);
    if constexpr (MEAN) d -= mean * F32::load(student.exps + v);
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

// Divergence and, where it is wanted, gradient of a row that is not masked and has a weight. `memory`: four times
// `length` floats of scratch, a multiple of 2 LANES.
template <class E> void distil_row(const DistillationArgs& a, int64_t n, float weight, int64_t length, float* memory) {
  const auto* x = static_cast<const typename E::raw*>(a.logits.data) + a.logits.offset(n);
  const auto* y = static_cast<const typename E::raw*>(a.teacher_logits.data) + a.teacher_logits.offset(n);
  const float temperature = a.temperatures ? a.temperatures[n] : a.temperature;
  const Side student = side_of<E>(x, a.V, length, a.logit_softcap, temperature, memory);
  const Side teacher = side_of<E>(y, a.V, length, a.teacher_softcap, temperature, memory + 2 * length);
  const bool forward = a.beta == 0.f, reverse = a.beta == 1.f;
  const Added sums = forward   ? add_up<FORWARD_KL>(student, teacher, length, a.beta)
                     : reverse ? add_up<REVERSE_KL>(student, teacher, length, a.beta)
                               : add_up<JSD>(student, teacher, length, a.beta);
  const float divergence = float(reduce_add(sums.divergence));
  a.divergence[n] = divergence;
  if (!a.dlogits.data) return;
  auto* out = static_cast<typename E::raw*>(a.dlogits.data) + a.dlogits.offset(n);
  const float mean = student.inverse * (reverse ? divergence : float(reduce_add(sums.of_student)));
  const float factor = weight / temperature * (forward || reverse ? 1.f : 1.f - a.beta);
  const bool cap = a.logit_softcap != 0.f;
  const auto write = cap ? (forward ? write_gradient<E, true, false> : write_gradient<E, true, true>)
                         : (forward ? write_gradient<E, false, false> : write_gradient<E, false, true>);
  write(x, out, a.V, student, mean, factor, cap ? 1.f / a.logit_softcap : 0.f);
}

template <class E> void distillation_of(const DistillationArgs& a, int64_t first, int64_t last) {
  const int64_t length = (a.V + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
  static thread_local Scratch memory;
  float* const floats = floats_of(memory, 4 * length);
  for (int64_t n = first; n < last; ++n) {
    const float weight = a.weights ? plain_nan(a.weights[n]) : 1.f;
    if (a.labels[n] >= 0 && weight != 0.f) {
      distil_row<E>(a, n, weight, length, floats);
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
