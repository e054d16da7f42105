// Parts of every kernel over the vocabulary: element types, the mathematics of a row, loads and stores.
#pragma once
#include "../args.h"
#include "hw.cuh"
#include "plan.h"

namespace ppg {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float LOWEST = -3.402823466e38f;  // start of a running maximum: unlike -inf it can be subtracted from itself
constexpr float NEGLIGIBLE = -1000.f;       // an exponent whose ex2 is 0: keeps 0 * -inf out of the entropy sums
constexpr uint32_t NAN_BITS = 0x7fc00000u;

// ---- element types ----
struct F32 {
  using raw = uint32_t;
  static __device__ __forceinline__ void unpack(uint32_t w, float* z) { z[0] = hw::bits_to_float(w); }
  static __device__ __forceinline__ uint32_t pack(const float* z) { return hw::float_to_bits(z[0]); }
};
struct BF16 {
  using raw = uint16_t;
  static __device__ __forceinline__ void unpack(uint32_t w, float* z) {
    z[0] = hw::bits_to_float(w << 16);
    z[1] = hw::bits_to_float(w & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* z) { return hw::pack_bf16(z[0], z[1]); }
};
struct F16 {
  using raw = uint16_t;
  static __device__ __forceinline__ void unpack(uint32_t w, float* z) {
    z[0] = hw::half_to_float(w & 0xffffu);
    z[1] = hw::half_to_float(w >> 16);
  }
  static __device__ __forceinline__ uint32_t pack(const float* z) { return hw::pack_f16(z[0], z[1]); }
};
template <class E> constexpr int VEC = 16 / (int)sizeof(typename E::raw);  // elements of a 16-byte vector

template <class E> __device__ __forceinline__ void unpack16(uint4 w, float* z) {
  constexpr int P = VEC<E> / 4;
  E::unpack(w.x, z);
  E::unpack(w.y, z + P);
  E::unpack(w.z, z + 2 * P);
  E::unpack(w.w, z + 3 * P);
}
template <class E> __device__ __forceinline__ uint4 pack16(const float* z) {
  constexpr int P = VEC<E> / 4;
  return uint4{E::pack(z), E::pack(z + P), E::pack(z + 2 * P), E::pack(z + 3 * P)};
}
template <class E> __device__ __forceinline__ float load1(const typename E::raw* p) {
  float z[2];
  E::unpack(*p, z);
  return z[0];
}
template <class E> __device__ __forceinline__ void store1(typename E::raw* p, float x) {
  const float z[2] = {x, 0.f};
  *p = (typename E::raw)E::pack(z);
}

// The 16 bytes that start `bytes` (0..14, even) into the 32 bytes lo:hi.
__device__ __forceinline__ uint4 shift16(uint4 lo, uint4 hi, unsigned bytes) {
  const bool two = bytes & 8, one = bytes & 4;
  const unsigned bits = (bytes & 2) * 8;
  const uint32_t a0 = two ? lo.z : lo.x, a1 = two ? lo.w : lo.y, a2 = two ? hi.x : lo.z, a3 = two ? hi.y : lo.w,
                 a4 = two ? hi.z : hi.x, a5 = two ? hi.w : hi.y;
  const uint32_t b0 = one ? a1 : a0, b1 = one ? a2 : a1, b2 = one ? a3 : a2, b3 = one ? a4 : a3, b4 = one ? a5 : a4;
  return uint4{hw::funnel(b0, b1, bits), hw::funnel(b1, b2, bits), hw::funnel(b2, b3, bits), hw::funnel(b3, b4, bits)};
}

// ---- the mathematics of a row ----
// With v = z, or tanh(z / cap) under softcap, the logit after cap and temperature is v * k in units of log 2. What is
// scaled is the distance from the maximum, which is exact where it counts, however far from 0 all logits are.
__device__ __forceinline__ float exponent_scale(float logit_softcap, float temperature) {  // k; softcap 0: off
  return (logit_softcap != 0.f ? logit_softcap : 1.f) * LOG2E / temperature;
}
template <bool CAP> struct View {
  float k, twice;
  __device__ __forceinline__ View(float logit_softcap, float k_)
      : k(k_), twice(CAP ? 2.f * LOG2E / logit_softcap : 0.f) {}
  __device__ __forceinline__ float operator()(float z) const {
    if constexpr (CAP) return 1.f - 2.f * hw::rcp(1.f + hw::ex2(z * twice));
    return z;
  }
};

// Sums over a set of elements, with t = (v - ref) * k:  2^t,  2^t t,  (2^t)^2;  and v of the label if it is among them.
struct Stat {
  float ref = LOWEST, sum = 0.f, dot = 0.f, label = 0.f, square = 0.f;
};

template <int SUMS> __device__ __forceinline__ void rebase(Stat& s, float ref, float k) {
  const float d = fmaxf((s.ref - ref) * k, NEGLIGIBLE), r = hw::ex2(d);
  if constexpr (SUMS >= ENTROPY) s.dot = (s.dot + s.sum * d) * r;
  if constexpr (SUMS == SCORE_NORM) s.square *= r * r;
  s.sum *= r;
  s.ref = ref;
}

// One exponential per element; the reference moves at most once per call. Elements at or beyond `count` are ignored.
template <bool CAP, int SUMS, bool WHOLE, int M>
__device__ __forceinline__ void add(Stat& s, float (&z)[M], const View<CAP>& view, int count) {
  float top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < M; ++i) {
    z[i] = WHOLE || i < count ? view(z[i]) : -INFINITY;
    top[i & 3] = fmaxf(top[i & 3], z[i]);
  }
  rebase<SUMS>(s, fmaxf(s.ref, fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]))), view.k);
#pragma unroll
  for (int i = 0; i < M; i += 4) {
    float e[4], et[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float t = (z[i + j] - s.ref) * view.k;
      e[j] = hw::ex2(t);  // of t itself: fmaxf would drop a NaN
      if constexpr (SUMS >= ENTROPY) et[j] = e[j] * fmaxf(t, NEGLIGIBLE);
    }
    s.sum += (e[0] + e[1]) + (e[2] + e[3]);
    if constexpr (SUMS >= ENTROPY) s.dot += (et[0] + et[1]) + (et[2] + et[3]);
    if constexpr (SUMS == SCORE_NORM) s.square += fmaf(e[0], e[0], e[1] * e[1]) + fmaf(e[2], e[2], e[3] * e[3]);
  }
}

// All lanes get the same bits: maxima and a + b do not depend on the order of their two operands.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
template <int SUMS> __device__ __forceinline__ void warp_combine(Stat& s, float k) {  // each lane keeps its `label`
  rebase<SUMS>(s, hw::warp_max(s.ref), k);
  s.sum = warp_sum(s.sum);
  if constexpr (SUMS >= ENTROPY) s.dot = warp_sum(s.dot);
  if constexpr (SUMS == SCORE_NORM) s.square = warp_sum(s.square);
}
// The statistics of all warps: entries lane, lane + 32, ... of `part` (and `squares`) per lane, then over the lanes, in
// a fixed order.
template <int SUMS>
__device__ __forceinline__ Stat combine(const float4* part, const float* squares, int count, float k) {
  const int lane = threadIdx.x & 31;
  Stat s;
  for (int i = lane; i < count; i += 32) s.ref = fmaxf(s.ref, part[i].x);
  s.ref = hw::warp_max(s.ref);
  for (int i = lane; i < count; i += 32) {
    const float4 p = part[i];
    Stat o{p.x, p.y, p.z, p.w, SUMS == SCORE_NORM ? squares[i] : 0.f};
    rebase<SUMS>(o, s.ref, k);
    s.sum += o.sum;
    s.dot += o.dot;
    s.label += o.label;
    s.square += o.square;
  }
  s.sum = warp_sum(s.sum);
  s.label = warp_sum(s.label);
  if constexpr (SUMS >= ENTROPY) s.dot = warp_sum(s.dot);
  if constexpr (SUMS == SCORE_NORM) s.square = warp_sum(s.square);
  return s;
}

// dlogit = (at_label [v = label] + 2^t (c0 + c1 t)) * dv/dz;  zero() means that the whole row is zero.
struct Slope {
  float ref, c0, c1, at_label;
  __device__ __forceinline__ bool zero() const { return c0 == 0.f && c1 == 0.f && at_label == 0.f; }
};
template <bool CAP, bool ENT>
__device__ __forceinline__ float gradient(const Slope& s, const View<CAP>& view, float z, float at_label) {
  const float v = view(z), t = (v - s.ref) * view.k;
  const float d = fmaf(hw::ex2(t), ENT ? fmaf(s.c1, fmaxf(t, NEGLIGIBLE), s.c0) : s.c0, at_label);
  return CAP ? d * (1.f - v * v) : d;
}

// ---- loads and stores ----
template <class E> __device__ __forceinline__ typename E::raw* row_at(const Rows& rows, int64_t n) {
  const unsigned length = (unsigned)rows.length, b = (unsigned)n / length, l = (unsigned)n - b * length;  // N < 2^31
  return static_cast<typename E::raw*>(rows.data) + b * rows.batch_stride + l * rows.row_stride;
}
// Elements between p and the 16-byte boundary at or below it.
template <class E> __device__ __forceinline__ int offset16(const typename E::raw* p) {
  return (int)(reinterpret_cast<uintptr_t>(p) / sizeof(*p) % VEC<E>);
}

template <class E> __device__ __forceinline__ void zero_row(typename E::raw* out, int len, int tid, int threads) {
  const int head = min(len, (VEC<E> - offset16<E>(out)) % VEC<E>), vectors = (len - head) / VEC<E>;
  if (tid < head) out[tid] = 0;
  for (int i = tid; i < vectors; i += threads) hw::store16(out + head + i * VEC<E>, uint4{0, 0, 0, 0});
  for (int i = head + vectors * VEC<E> + tid; i < len; i += threads) out[i] = 0;
}

// Elements e .. e + VEC of a row of `len` that starts `pad` elements into an aligned vector, at any alignment of e: one
// 16-byte load where possible, else cut out of two inside the row, element by element at its ends. Nothing outside the
// row is read.
template <class E> __device__ __forceinline__ uint4 load_group(const typename E::raw* src, int pad, int e, int len) {
  const int over = (pad + e) % VEC<E>, below = e - over;
  if (over == 0 && e >= 0 && e + VEC<E> <= len) return hw::load16(src + e);
  if (over != 0 && below >= 0 && below + 2 * VEC<E> <= len)
    return shift16(hw::load16(src + below), hw::load16(src + below + VEC<E>), over * (int)sizeof(typename E::raw));
  float z[VEC<E>];
#pragma unroll
  for (int i = 0; i < VEC<E>; ++i) z[i] = e + i >= 0 && e + i < len ? load1<E>(src + e + i) : 0.f;
  return pack16<E>(z);
}

// One vector of the gradient without the label's term: elements e .. e + VEC of the row, those outside 0 .. len left
// alone. INSIDE: all are within.
template <class E, bool CAP, bool ENT, bool INSIDE>
__device__ __forceinline__ void store_vector(const Slope& slope, const View<CAP>& view, uint4 w, typename E::raw* out,
                                             int e, int len) {
  float z[VEC<E>], d[VEC<E>];
  unpack16<E>(w, z);
#pragma unroll
  for (int i = 0; i < VEC<E>; ++i) d[i] = gradient<CAP, ENT>(slope, view, z[i], 0.f);
  if (INSIDE || (e >= 0 && e + VEC<E> <= len)) {
    hw::store16(out + e, pack16<E>(d));
  } else {
#pragma unroll
    for (int i = 0; i < VEC<E>; ++i)
      if (e + i >= 0 && e + i < len) store1<E>(out + e + i, d[i]);
  }
}

// A whole gradient row from global memory, in place or not: a thread writes only elements that no other thread reads.
// Whoever writes the label's vector writes the label's element again, so that the others need not compare.
template <class E, bool CAP, bool ENT>
__device__ __forceinline__ void gradient_row(const Slope& slope, const View<CAP>& view, const typename E::raw* src,
                                             typename E::raw* out, int len, int64_t label64, int tid, int threads) {
  const int pad = offset16<E>(src), label = label64 < len ? (int)label64 : -1;
  if (offset16<E>(out) == pad) {
    const bool mine = label >= 0 && (pad + label) / VEC<E> % threads == tid;
    const float z = mine ? load1<E>(src + label) : 0.f;  // before it is overwritten
#pragma unroll 2
    for (int e = tid * VEC<E> - pad; e < len; e += threads * VEC<E>)
      store_vector<E, CAP, ENT, false>(slope, view, load_group<E>(src, pad, e, len), out, e, len);
    if (mine) store1<E>(out + label, gradient<CAP, ENT>(slope, view, z, slope.at_label));
  } else {  // another alignment: element by element, slow
    for (int e = tid; e < len; e += threads)
      store1<E>(out + e, gradient<CAP, ENT>(slope, view, load1<E>(src + e), e == label ? slope.at_label : 0.f));
  }
}

}  // namespace ppg
