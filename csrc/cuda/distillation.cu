// How far a teacher's row is from the student's, and the gradient by the student's logits: one CTA a pair of rows,
// which are read for their statistics, for the divergence and, unless that is the forward KL of aligned rows, for the
// gradient; after the first time from L1 or L2.
#include "row.cuh"

namespace ppg {
namespace {

constexpr float LEAST_LOGPROB = -1e4f;               // as in ppg_fast/spec.py
constexpr float LEAST_LOG2 = LEAST_LOGPROB * LOG2E;  // log-probs are in units of log 2 here

enum Divergence { FORWARD_KL, REVERSE_KL, JSD };

// One side of a row: v = z, or tanh(z / softcap), and log2 p = (v - ref) k - log2_sum, at least LEAST_LOG2.
struct Side {
  float k, twice, ref = 0.f, log2_sum = 0.f;
  __device__ __forceinline__ Side(float logit_softcap, float temperature)
      : k(exponent_scale(logit_softcap, temperature)),
        twice(logit_softcap != 0.f ? 2.f * LOG2E / logit_softcap : 0.f) {}
  template <int M> __device__ __forceinline__ void cap(float (&z)[M]) const {
    if (twice == 0.f) return;
#pragma unroll
    for (int i = 0; i < M; ++i) z[i] = 1.f - 2.f * hw::rcp(1.f + hw::ex2(z[i] * twice));
  }
  __device__ __forceinline__ float log2_prob(float v) const {
    const float l = (v - ref) * k - log2_sum;
    return l < LEAST_LOG2 ? LEAST_LOG2 : l;  // not fmaxf, which drops a NaN
  }
  __device__ __forceinline__ float slope(float v) const { return twice != 0.f ? 1.f - v * v : 1.f; }
};

// log2(p / m) and log2(q / m) of m = beta q + (1 - beta) p from log2(p / q), by the larger of p and q.
struct OverMixture {
  float student, teacher;
};
__device__ __forceinline__ OverMixture over_mixture(float ratio, float beta) {
  const bool student = ratio >= 0.f;
  const float share = student ? 1.f - beta : beta;
  const float larger = -log2f(fmaf(1.f - share, hw::ex2(-fabsf(ratio)), share));
  return {student ? larger : larger + ratio, student ? larger - ratio : larger};
}

// What one element adds, in units of log 2: to the divergence, and to KL(p, q) or KL(p, m).
struct Added {
  float divergence = 0.f, of_student = 0.f;
};
template <int KIND> __device__ __forceinline__ void add_term(Added& sums, float log2_p, float log2_q, float beta) {
  const float ratio = log2_p - log2_q;
  if constexpr (KIND == FORWARD_KL) sums.divergence -= hw::ex2(log2_q) * ratio;
  if constexpr (KIND == REVERSE_KL) sums.divergence += hw::ex2(log2_p) * ratio;
  if constexpr (KIND == JSD) {
    const OverMixture over = over_mixture(ratio, beta);
    const float term = hw::ex2(log2_p) * over.student;
    sums.of_student += term;
    sums.divergence += fmaf(beta * hw::ex2(log2_q), over.teacher, (1.f - beta) * term);
  }
}

// The gradient by the student's logit before its softcap and the factor of the row. `mean`: of log2(p / q), or
// log2(p / m), under p; the logarithms are turned into nats by that factor.
template <int KIND> __device__ __forceinline__ float slope_of(float log2_p, float log2_q, float mean, float beta) {
  if constexpr (KIND == FORWARD_KL) return hw::ex2(log2_p) - hw::ex2(log2_q);
  if constexpr (KIND == REVERSE_KL) return hw::ex2(log2_p) * (log2_p - log2_q - mean);
  return hw::ex2(log2_p) * (over_mixture(log2_p - log2_q, beta).student - mean);
}

// The statistics of a row by the whole CTA. `part`: an entry per warp.
// Which thread adds an element depends on the element's index only: the same bits at any alignment.
template <class E>
__device__ __forceinline__ void measure(Side& side, const typename E::raw* src, int V, float4* part) {
  const int tid = threadIdx.x, threads = blockDim.x, pad = offset16<E>(src);
  const View<false> plain(0.f, side.k);
  Stat stat;
  for (int e = tid * VEC<E>; e < V; e += threads * VEC<E>) {
    float z[VEC<E>];
    unpack16<E>(load_group<E>(src, pad, e, V), z);
    side.cap(z);
    if (e + VEC<E> <= V) add<false, PLAIN, true>(stat, z, plain, 0);
    else add<false, PLAIN, false>(stat, z, plain, V - e);
  }
  warp_combine<PLAIN>(stat, side.k);
  if ((tid & 31) == 0) part[tid / 32] = make_float4(stat.ref, stat.sum, 0.f, 0.f);
  __syncthreads();
  stat = combine<PLAIN>(part, nullptr, threads / 32, side.k);
  side.ref = stat.ref;
  side.log2_sum = log2f(stat.sum);
}

// A pair of rows whose statistics are known.
template <class E> struct Pair {
  using raw = typename E::raw;
  Side student, teacher;
  const raw *x, *y;
  float beta;

  // Elements e .. e + VEC of both as v and log-probs; those outside of the row are nothing that counts.
  __device__ __forceinline__ void load(int e, int V, float (&v)[VEC<E>], float* log2_p, float* log2_q) const {
    float z[VEC<E>];
    unpack16<E>(load_group<E>(x, offset16<E>(x) + VEC<E>, e, V), v);
    unpack16<E>(load_group<E>(y, offset16<E>(y) + VEC<E>, e, V), z);
    student.cap(v);
    teacher.cap(z);
#pragma unroll
    for (int i = 0; i < VEC<E>; ++i) {
      log2_p[i] = student.log2_prob(v[i]);
      log2_q[i] = teacher.log2_prob(z[i]);
    }
  }

  // With `out`, which is aligned and may be x or y, the gradient of the forward KL as well: it needs no sum.
  template <int KIND> __device__ __forceinline__ Added add_up(int V, raw* out, float factor) const {
    Added sums;
#pragma unroll 1  // more would spill registers
    for (int e = threadIdx.x * VEC<E>; e < V; e += blockDim.x * VEC<E>) {
      float v[VEC<E>], log2_p[VEC<E>], log2_q[VEC<E>];
      load(e, V, v, log2_p, log2_q);
#pragma unroll
      for (int i = 0; i < VEC<E>; ++i)
        if (e + i < V) add_term<KIND>(sums, log2_p[i], log2_q[i], beta);
      if constexpr (KIND == FORWARD_KL)
        if (out) store<KIND>(out, e, V, v, log2_p, log2_q, 0.f, factor);
    }
    return sums;
  }

  // In vectors of the alignment of `out`, which may be x or y: of what is overwritten a thread then reads only the
  // elements that it writes.
  template <int KIND> __device__ __forceinline__ void write_gradient(raw* out, int V, float mean, float factor) const {
#pragma unroll 1  // more would spill registers
    for (int e = (int)threadIdx.x * VEC<E> - offset16<E>(out); e < V; e += blockDim.x * VEC<E>) {
      float v[VEC<E>], log2_p[VEC<E>], log2_q[VEC<E>];
      load(e, V, v, log2_p, log2_q);
      store<KIND>(out, e, V, v, log2_p, log2_q, mean, factor);
    }
  }

  template <int KIND>
  __device__ __forceinline__ void store(raw* out, int e, int V, const float* v, const float* log2_p,
                                        const float* log2_q, float mean, float factor) const {
    float d[VEC<E>];
#pragma unroll
    for (int i = 0; i < VEC<E>; ++i)
      d[i] = factor * slope_of<KIND>(log2_p[i], log2_q[i], mean, beta) * student.slope(v[i]);
    if (e >= 0 && e + VEC<E> <= V) {
      hw::store16(out + e, pack16<E>(d));
    } else {
#pragma unroll
      for (int i = 0; i < VEC<E>; ++i)
        if (e + i >= 0 && e + i < V) store1<E>(out + e + i, d[i]);
    }
  }
};

template <class E, int KIND>
__global__ void __launch_bounds__(LARGE_THREADS, 2) distillation_kernel(const __grid_constant__ DistillationArgs a) {
  const int V = (int)a.V, tid = threadIdx.x, threads = blockDim.x, warps = threads / 32;
  // an entry per warp each; there are barriers between a write and the next row's, so that none waits for readers
  float4 *const of_student = reinterpret_cast<float4*>(hw::smem()), *const of_teacher = of_student + warps,
                *const of_both = of_teacher + warps;
  for (int64_t n = blockIdx.x; n < a.N; n += gridDim.x) {
    const float weight = a.weights ? a.weights[n] : 1.f;
    typename E::raw* const out = a.dlogits.data ? row_at<E>(a.dlogits, n) : nullptr;
    if (a.labels[n] < 0 || weight == 0.f) {
      if (tid == 0) a.divergence[n] = 0.f;
      if (out) zero_row<E>(out, V, tid, threads);
      continue;
    }
    const float temperature = a.temperatures ? a.temperatures[n] : a.temperature;
    Pair<E> rows{{a.logit_softcap, temperature},
                 {a.teacher_softcap, temperature},
                 row_at<E>(a.logits, n),
                 row_at<E>(a.teacher_logits, n),
                 a.beta};
    measure<E>(rows.student, rows.x, V, of_student);
    measure<E>(rows.teacher, rows.y, V, of_teacher);
    const float nats = KIND == FORWARD_KL ? 1.f : KIND == REVERSE_KL ? LN2 : LN2 * (1.f - a.beta);
    const float factor = weight * nats / temperature;
    const bool at_once = KIND == FORWARD_KL && out && offset16<E>(out) == 0;
    Added sums = rows.template add_up<KIND>(V, at_once ? out : nullptr, factor);
    sums = {warp_sum(sums.divergence), warp_sum(sums.of_student)};
    if ((tid & 31) == 0) of_both[tid / 32] = make_float4(sums.divergence, sums.of_student, 0.f, 0.f);
    __syncthreads();  // also: both rows have been read
    Added total;
    for (int i = 0; i < warps; ++i) {
      total.divergence += of_both[i].x;
      total.of_student += of_both[i].y;
    }
    if (tid == 0) a.divergence[n] = total.divergence * LN2;
    if (!out || at_once) continue;
    const float mean = KIND == JSD ? total.of_student : total.divergence;
    rows.template write_gradient<KIND>(out, V, mean, factor);
  }
}

template <class E> int launch_distillation(const DistillationArgs& a, void* stream) {
  hw::Device d;
  if (const int error = hw::current_device(&d)) return error;
  const int64_t bytes = 2 * a.V * (int64_t)sizeof(typename E::raw);  // of both rows
  const unsigned threads = bytes <= CHUNK ? SMALL_THREADS : LARGE_THREADS;
  const int64_t resident = (int64_t)d.sms * two_pass_ctas_per_sm(2 * a.V, sizeof(typename E::raw), threads);
  const auto grid = (unsigned)std::min<int64_t>(a.N, resident);
  const auto launch = [&](auto kernel) {
    return hw::launch(kernel, grid, threads, 0, 3 * threads / 32 * sizeof(float4), stream, a);
  };
  if (a.beta == 0.f) return launch(distillation_kernel<E, FORWARD_KL>);
  if (a.beta == 1.f) return launch(distillation_kernel<E, REVERSE_KL>);
  return launch(distillation_kernel<E, JSD>);
}

}  // namespace

namespace cuda {

int distillation(const DistillationArgs& a, void* stream) {
  if (a.N == 0) return 0;
  if (a.N < 0 || a.N > INT32_MAX || a.V < 1 || a.V > MAX_V) return hw::INVALID_VALUE;
  switch (a.dtype) {
    case DType::F32: return launch_distillation<F32>(a, stream);
    case DType::BF16: return launch_distillation<BF16>(a, stream);
    case DType::F16: return launch_distillation<F16>(a, stream);
  }
  return hw::INVALID_VALUE;
}

}  // namespace cuda
}  // namespace ppg
