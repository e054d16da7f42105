// Two passes over global memory, one CTA a row: any row length, any architecture. The second read comes from L1 or L2,
// see plan.h.
#pragma once
#include "lookup.cuh"

namespace ppg {

template <class E, bool CAP, int SUMS>
__global__ void __launch_bounds__(LARGE_THREADS, 2) policy_loss_twopass(const __grid_constant__ SweepArgs a) {
  using raw = typename E::raw;
  Row* const rows = reinterpret_cast<Row*>(hw::smem());      // [2] of this row and the next
  float4* const part = reinterpret_cast<float4*>(rows + 2);  // one entry per warp
  const int V = (int)a.V, tid = threadIdx.x, threads = blockDim.x;
  float* const squares = reinterpret_cast<float*>(part + threads / 32);  // SCORE_NORM: the same
  int* const counted = reinterpret_cast<int*>(part);
  hw::wait_for_leader();
  count_outer(a, counted, threads);
  __syncthreads();
  const float denominator = outer(a, counted, threads);
  if (tid == 0) rows[0] = look_up(a, blockIdx.x, denominator);
  __syncthreads();  // part is free again
  unsigned i = 0;
  for (int64_t n = blockIdx.x; n < a.tokens.N; n += gridDim.x, ++i) {
    const Row& row = rows[i % 2];
    if (tid == threads - 1) rows[(i + 1) % 2] = look_up(a, n + gridDim.x, denominator);  // while the other warps sweep
    const Kind kind = row_kind(a, row);
    raw* const out = a.dlogits.data ? row_at<E>(a.dlogits, n) : nullptr;
    bool zero = true;
    if (kind == SKIP) {
      if (tid == 0) write_row<SUMS>(a, n, Finished{});
    } else {
      const raw* const src = row_at<E>(a.logits, n);
      const View<CAP> view(a.logit_softcap, row.k);
      const int pad = offset16<E>(src);
      Stat stat;
      // Which thread adds an element depends on the element's index only: the same bits at any alignment.
#pragma unroll(CAP ? 1 : 2)  // more would spill registers
      for (int e = tid * VEC<E>; e < V; e += threads * VEC<E>) {
        float z[VEC<E>];
        unpack16<E>(load_group<E>(src, pad, e, V), z);
        if (e + VEC<E> <= V) add<CAP, SUMS, true>(stat, z, view, 0);
        else add<CAP, SUMS, false>(stat, z, view, V - e);
      }
      if (tid == 0 && row.label < V) stat.label = view(load1<E>(src + row.label));
      warp_combine<SUMS>(stat, view.k);
      if ((tid & 31) == 0) {
        part[tid / 32] = make_float4(stat.ref, stat.sum, stat.dot, stat.label);
        if constexpr (SUMS == SCORE_NORM) squares[tid / 32] = stat.square;
      }
      __syncthreads();  // also: the whole row has been read
      const Finished f = finish_row<SUMS>(a, row, combine<SUMS>(part, squares, threads / 32, view.k));
      if (tid == 0) write_row<SUMS>(a, n, f);
      zero = kind != FULL || f.slope.zero();
      if (!zero) gradient_row<E, CAP, SUMS >= ENTROPY>(f.slope, view, src, out, V, row.label, tid, threads);
    }
    if (zero && out) zero_row<E>(out, V, tid, threads);
    __syncthreads();  // the next row is known, part and this row are free again
  }
  sum_losses(a, hw::smem(), gridDim.x, threads);
}

}  // namespace ppg
