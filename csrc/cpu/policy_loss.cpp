// Log-prob, scalar loss and gradient of each row in one pass. Mirrors ppg_fast/reference/policy_loss.py and
// csrc/cuda/policy_loss.cu
#ifndef PPG_LANES
#define PPG_KERNELS "policy_loss.cpp"
#include "foreach_isa.h"

namespace ppg::cpu {
PPG_DISPATCH(policy_loss, PolicyLossArgs)
}  // namespace ppg::cpu
#else

// dlogit_v = 2^t (c0 + c1 d) + [v = label] at_label with t = d * scale, d = v - max, then through the softcap.
struct Slope {
  float c0, c1, at_label;
  bool zero() const { return c0 == 0.f && c1 == 0.f && at_label == 0.f; }
};

template <bool CAP, bool ENT> PPG_INLINE Vec gradient(Vec e, Vec x, const Slope& s, const View<CAP>& view, float max) {
  Vec d = e * s.c0;
  if constexpr (ENT) d = e * (s.c0 + s.c1 * view.distance(x, max));
  if constexpr (CAP) d *= view.slope(x);
  return d;
}

// The gradient of the label's logit. Not inlined, so that it is rounded alike whatever else is computed of the row.
template <bool CAP, bool ENT>
[[gnu::noinline]] float label_gradient(float x, const Slope& row, const View<CAP>& view, float max) {
  const Vec v = splat(x), e = view.power(view.distance(v, max));
  return (CAP ? row.at_label * view.slope(v)[0] : row.at_label) + gradient<CAP, ENT>(e, v, row, view, max)[0];
}

// The gradient of a row from the exponentials that row_stats kept. `out` may be `x` or `kept.exps`: every element is
// read before it is written.
template <class E, bool CAP, bool ENT, bool STREAM>
PPG_INLINE void write_gradient(const typename E::raw* x, typename E::raw* out, int64_t V, const Kept& kept,
                               int64_t label, Vec x_label, const Slope& row, const View<CAP>& view, float max,
                               Fetch& fetch) {
  constexpr bool AGAIN = CAP || ENT;  // whether the logits are read again beside the exponentials
  const float at_label = label_gradient<CAP, ENT>(x_label[0], row, view, max), unit = view.unit(max);
  for (int64_t first = 0; first < V; first += BLOCK) {
    const int64_t last = first + BLOCK < V ? first + BLOCK : V;
    const float scale = float(std::exp2(view.level(kept.maxima[first / BLOCK]) - view.level(max))) / unit;
    const Slope s{row.c0 * scale, row.c1 * scale, 0.f};
    int64_t v = first;
    for (; v + STEP <= last; v += STEP) {  // the order of row_stats
      fetch.step();
      fetch_ahead<KEPT_AHEAD>(kept.exps + v);
#pragma GCC unroll 2
      for (int64_t w = v; w < v + STEP; w += 2 * LANES) {
        const Pair p = AGAIN ? E::load_pair(x + w) : Pair{};
        const Pair d{gradient<CAP, ENT>(F32::load(kept.exps + w), p.a, s, view, max),
                     gradient<CAP, ENT>(F32::load(kept.exps + w + LANES), p.b, s, view, max)};
        STREAM ? E::stream_pair(out + w, d) : E::store_pair(out + w, d);
      }
    }
    for (; v < last; v += LANES) {
      const int count = int(last - v < LANES ? last - v : LANES);
      const Vec xv = AGAIN ? load_tail<E>(x + v, count, x[v]) : Vec{};
      store_tail<E>(out + v, count, gradient<CAP, ENT>(load_tail<F32>(kept.exps + v, count, 0.f), xv, s, view, max));
    }
  }
  store_one<E>(out + label, at_label);
}

// The outputs of a row, and the slope of its gradient, from its statistics.
template <bool CAP, bool ENT>
PPG_INLINE Slope finish_row(const PolicyLossArgs& a, int64_t n, const Stats& stats, const View<CAP>& view,
                            float x_label) {
  const double mean = ENT ? stats.dot / stats.sum * view.nats : 0.0;
  const float logprob = logprob_of(stats, view, x_label), entropy = ENT ? entropy_of(stats, view) : 0.f;
  const float lse = a.term.z_coef != 0.f ? lse_of(stats, view) : 0.f;
  const float old_logprob = a.old_logprobs ? a.old_logprobs[n] : logprob,
              ref_logprob = a.ref_logprobs ? a.ref_logprobs[n] : logprob;
  const float* const rollout = a.rollout_logprobs ? a.rollout_logprobs + n : nullptr;
  const Term term = policy_term(a.term, logprob, entropy, lse, old_logprob, ref_logprob, rollout, a.advantages[n]);
  const float weight = a.weights ? a.weights[n] : 1.f, temperature = a.temperatures ? a.temperatures[n] : a.temperature;
  float loss = weight * term.loss;
  double g = double(weight) * term.d_logprob / temperature;
  if (a.nll_weights) add_likelihood(a.nll_weights[n], temperature, logprob, loss, g);
  const double h = double(weight) * term.d_entropy / temperature, b = double(weight) * term.d_lse / temperature;
  a.loss[n] = loss;
  a.logprob[n] = logprob;
  if (ENT) a.entropy[n] = entropy;
  return {plain_nan(float((h * mean - g + b) / stats.sum)), plain_nan(float(-h * view.nats / stats.sum)),
          plain_nan(float(g))};
}

// Where the exponentials of a row are kept: over its float32 logits where the gradient is written over them too and
// they are not read again, else in `memory`.
template <class E, bool CAP>
PPG_INLINE Kept keep(Scratch& memory, const typename E::raw* x, typename E::raw* out, const PolicyLossArgs& a) {
  float* const floats = floats_of(memory, a.V + (a.V + BLOCK - 1) / BLOCK);
  if constexpr (std::is_same_v<E, F32> && !CAP) {
    if (out == x && a.term.entropy_coef == 0.f) return {out, floats};
  }
  return {floats, floats + a.V};
}

template <class E, bool CAP, Sums SUMS> void policy_loss_rows(const PolicyLossArgs& a, int64_t first, int64_t last) {
  constexpr bool ENT = SUMS >= ENTROPY;
  static thread_local Scratch memory;
  for (int64_t n = first; n < last; ++n) {
    const int64_t label = a.labels[n];
    if (label < 0) {
      a.loss[n] = a.logprob[n] = 0.f;
      if (ENT) a.entropy[n] = 0.f;
      if (SUMS == SCORE_NORM) a.score_norm[n] = 0.f;
      if (a.dlogits.data) zero_row<E>(a.dlogits, n, a.V);
      continue;
    }
    const bool full = a.dlogits.data && a.live(n);
    const auto* x = static_cast<const typename E::raw*>(a.logits.data) + a.logits.offset(n);
    auto* out = a.dlogits.data ? static_cast<typename E::raw*>(a.dlogits.data) + a.dlogits.offset(n) : nullptr;
    const View<CAP> view(a, n);
    const Vec x_label = splat(load_one<E>(x + label));  // before the gradient is written over it
    const Kept kept = full ? keep<E, CAP>(memory, x, out, a) : Kept{};
    Fetch fetch = fetch_next<E>(a, n, last, full ? 2 : 1);
    const Stats stats = full ? row_stats<E, CAP, SUMS, true>(x, a.V, view, kept, fetch)
                             : row_stats<E, CAP, SUMS, false>(x, a.V, view, kept, fetch);
    const Slope slope = finish_row<CAP, ENT>(a, n, stats, view, x_label[0]);
    if constexpr (SUMS == SCORE_NORM) a.score_norm[n] = score_norm(stats, view, x_label[0]);
    if (!out) continue;
    if (!full || slope.zero()) {
      zero_row<E>(a.dlogits, n, a.V);  // not before the row was read: it may be the same memory
    } else if (ENT && slope.c1 != 0.f) {
      write_gradient<E, CAP, true, false>(x, out, a.V, kept, label, x_label, slope, view, stats.max, fetch);
    } else if (!CAP && out != x && can_stream(out)) {
      write_gradient<E, CAP, false, !CAP>(x, out, a.V, kept, label, x_label, slope, view, stats.max, fetch);
    } else {
      write_gradient<E, CAP, false, false>(x, out, a.V, kept, label, x_label, slope, view, stats.max, fetch);
    }
  }
  finish_streaming();
}

template <class E, bool CAP> void policy_loss_of(const PolicyLossArgs& a, int64_t first, int64_t last) {
  if (a.score_norm) return policy_loss_rows<E, CAP, SCORE_NORM>(a, first, last);
  a.entropy ? policy_loss_rows<E, CAP, ENTROPY>(a, first, last) : policy_loss_rows<E, CAP, PLAIN>(a, first, last);
}
template <class E> void policy_loss_of(const PolicyLossArgs& a, int64_t first, int64_t last) {
  a.logit_softcap != 0.f ? policy_loss_of<E, true>(a, first, last) : policy_loss_of<E, false>(a, first, last);
}

void policy_loss(const PolicyLossArgs& a, int64_t first, int64_t last) {
  PPG_BY_DTYPE(a.dtype, policy_loss_of, a, first, last);
}

#endif
