// Log-prob and entropy of each row, and their gradient. Mirrors ppg_fast/reference/logprobs.py and
// csrc/cuda/logprobs.cu
#ifndef PPG_LANES
#define PPG_KERNELS "logprobs.cpp"
#include "foreach_isa.h"

namespace ppg::cpu {
PPG_DISPATCH(logprobs_fwd, LogprobsFwdArgs)
PPG_DISPATCH(logprobs_bwd, LogprobsBwdArgs)
}  // namespace ppg::cpu
#else

template <class E, bool CAP, Sums SUMS> void logprobs_fwd_rows(const LogprobsFwdArgs& a, int64_t first, int64_t last) {
  constexpr bool ENT = SUMS >= ENTROPY;
  for (int64_t n = first; n < last; ++n) {
    const int64_t label = a.labels[n];
    a.logprob[n] = a.lse[2 * n] = a.lse[2 * n + 1] = 0.f;
    if (ENT) a.entropy[n] = 0.f;
    if (SUMS == SCORE_NORM) a.score_norm[n] = 0.f;
    if (label < 0) continue;
    const auto* x = static_cast<const typename E::raw*>(a.logits.data) + a.logits.offset(n);
    const View<CAP> view(a, n);
    Fetch fetch = fetch_next<E>(a, n, last, 1);
    const Stats stats = row_stats<E, CAP, SUMS, false>(x, a.V, view, {}, fetch);
    const float x_label = load_one<E>(x + label);
    a.logprob[n] = logprob_of(stats, view, x_label);
    a.lse[2 * n] = stats.max;
    a.lse[2 * n + 1] = float(stats.sum);
    if (ENT) a.entropy[n] = entropy_of(stats, view);
    if (SUMS == SCORE_NORM) a.score_norm[n] = score_norm(stats, view, x_label);
  }
}

template <class E, bool CAP> void logprobs_fwd_of(const LogprobsFwdArgs& a, int64_t first, int64_t last) {
  if (a.score_norm) return logprobs_fwd_rows<E, CAP, SCORE_NORM>(a, first, last);
  a.entropy ? logprobs_fwd_rows<E, CAP, ENTROPY>(a, first, last) : logprobs_fwd_rows<E, CAP, PLAIN>(a, first, last);
}
template <class E> void logprobs_fwd_of(const LogprobsFwdArgs& a, int64_t first, int64_t last) {
  a.logit_softcap != 0.f ? logprobs_fwd_of<E, true>(a, first, last) : logprobs_fwd_of<E, false>(a, first, last);
}

void logprobs_fwd(const LogprobsFwdArgs& a, int64_t first, int64_t last) {
  PPG_BY_DTYPE(a.dtype, logprobs_fwd_of, a, first, last);
}

// dlogit_v = 2^t (c0 + c1 d) + [v = label] at_label with t = d * scale, d = v - max, then through the softcap.
template <bool CAP, bool ENT> PPG_INLINE Vec gradient(Vec x, const View<CAP>& view, float max, float c0, float c1) {
  Vec d = view.distance(x, max);
  d = view.power(d) * (ENT ? c0 + c1 * d : splat(c0));
  if constexpr (CAP) d *= view.slope(x);
  return d;
}

template <class E, bool CAP, bool ENT> void logprobs_bwd_rows(const LogprobsBwdArgs& a, int64_t first, int64_t last) {
  const auto live = [&](int64_t n) {
    const bool wanted = a.d_logprob[n] != 0.f || (ENT && a.d_entropy[n] != 0.f) || (a.d_lse && a.d_lse[n] != 0.f);
    return a.labels[n] >= 0 && wanted;
  };
  for (int64_t n = first; n < last; ++n) {
    const int64_t label = a.labels[n];
    const float d_logprob = a.d_logprob[n], d_entropy = ENT ? a.d_entropy[n] : 0.f, d_lse = a.d_lse ? a.d_lse[n] : 0.f;
    if (!live(n)) {
      zero_row<E>(a.dlogits, n, a.V);
      continue;
    }
    const auto* x = static_cast<const typename E::raw*>(a.logits.data) + a.logits.offset(n);
    auto* out = static_cast<typename E::raw*>(a.dlogits.data) + a.dlogits.offset(n);
    const View<CAP> view(a, n);
    const float temperature = a.temperatures ? a.temperatures[n] : a.temperature;
    // p = 2^t / sum and log p = d * nats - log(sum)
    const double sum = a.lse[2 * n + 1], of_entropy = ENT ? d_entropy * (a.entropy[n] - std::log(sum)) : 0.0;
    const float max = plain_nan(a.lse[2 * n]), g = plain_nan(d_logprob / temperature),
                c0 = plain_nan(float(-(d_logprob + of_entropy - d_lse) / temperature / sum)),
                c1 = plain_nan(float(-d_entropy / temperature * view.nats / sum));
    const Vec x_label = splat(load_one<E>(x + label));
    const float at_label = (CAP ? g * view.slope(x_label)[0] : g) + gradient<CAP, ENT>(x_label, view, max, c0, c1)[0];
    Fetch fetch = n + 1 < last && live(n + 1) ? fetch_next<E>(a, n, last, 1) : Fetch{};
    const auto sweep = [&](auto streams) __attribute__((always_inline)) {
      int64_t v = 0;
      for (; v + STEP <= a.V; v += STEP) {
        fetch.step();
        fetch_ahead<BLOCK>(x + v);
#pragma GCC unroll 2
        for (int64_t w = v; w < v + STEP; w += 2 * LANES) {
          const Pair p = E::load_pair(x + w);
          const Pair d{gradient<CAP, ENT>(p.a, view, max, c0, c1), gradient<CAP, ENT>(p.b, view, max, c0, c1)};
          decltype(streams)::value ? E::stream_pair(out + w, d) : E::store_pair(out + w, d);
        }
      }
      return v;
    };
    int64_t v = out != x && can_stream(out) ? sweep(std::true_type{}) : sweep(std::false_type{});
    for (; v < a.V; v += LANES) {
      const int count = int(a.V - v < LANES ? a.V - v : LANES);
      store_tail<E>(out + v, count, gradient<CAP, ENT>(load_tail<E>(x + v, count, x[v]), view, max, c0, c1));
    }
    store_one<E>(out + label, at_label);
  }
  finish_streaming();
}

template <class E> void logprobs_bwd_of(const LogprobsBwdArgs& a, int64_t first, int64_t last) {
  const bool cap = a.logit_softcap != 0.f;
  if (a.d_entropy)
    return cap ? logprobs_bwd_rows<E, true, true>(a, first, last) : logprobs_bwd_rows<E, false, true>(a, first, last);
  return cap ? logprobs_bwd_rows<E, true, false>(a, first, last) : logprobs_bwd_rows<E, false, false>(a, first, last);
}

void logprobs_bwd(const LogprobsBwdArgs& a, int64_t first, int64_t last) {
  PPG_BY_DTYPE(a.dtype, logprobs_bwd_of, a, first, last);
}

#endif
