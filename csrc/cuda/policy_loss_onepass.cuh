// Fused policy-gradient loss over logits: every row is read once from memory and its gradient written once (sm_90 and
// later).
//
// A cluster of 1, 2, 4 or 8 CTAs owns a row; each CTA holds a slice of it in a ring of 16 KB shared-memory slots. One
// producer warp keeps the ring full by bulk copies, running ahead into the next rows. The consumer warps sweep the
// slice twice in shared memory:
//   sweep 1  reference exponent, sum of exponentials, sum of exponential * exponent; one exchange combines them over
//            warps and CTAs
//   scalar   logprob, entropy -> policy_term -> (g, h), computed redundantly by every thread
//   sweep 2  gradient from shared memory to registers to global memory; each slot is handed back to the producer as it
//            is read
//
// There is no CTA-wide barrier and no cluster barrier in the loop over rows: only mbarriers.
#pragma once
#include "policy_loss_slice.cuh"

namespace ppg {

// Row n into the ring.
template <class E, int WARPS>
__device__ __forceinline__ void copy_row(const SweepArgs& a, const Team<WARPS>& team, int64_t n, Cursor& at) {
  using raw = typename E::raw;
  const int lane = threadIdx.x & 31;
  const Slice<E> s(a, n, team.rank, team.size);
  const int head = s.pad ? min(s.len, VEC<E> - s.pad) : 0, body = (s.len - head) / VEC<E> * VEC<E>,
            tail = s.len - head - body;
  // Bulk copies move multiples of 16 bytes: up to VEC - 1 elements at each end go through the registers of lanes
  // 0 to 7 and 8 to 15.
  const int mine = lane < 8 ? lane : head + body + lane - 8;
  const bool has = lane < 8 ? lane < head : lane - 8 < tail;
  const raw edge = has ? s.src[mine] : raw(0);
  for (int j = 0; j < s.chunks; ++j, at.next()) {
    hw::bar_wait(&team.empty[at.slot], at.parity ^ 1);
    raw* const slot = reinterpret_cast<raw*>(team.ring + at.slot * CHUNK);
    const int base = j * SLOT<E> - s.pad;  // slice element at the start of the slot
    if (has && mine >= base && mine < base + SLOT<E>) {
      slot[mine - base] = edge;
      hw::fence_async();
    }
    __syncwarp();
    if (lane == 0) {
      const int lo = max(base, head), hi = min(base + SLOT<E>, head + body), bytes = max(hi - lo, 0) * (int)sizeof(raw);
      hw::bar_expect(&team.full[at.slot], bytes);
      if (bytes) hw::copy_in(slot + (lo - base), s.src + lo, bytes, &team.full[at.slot]);
    }
  }
}

// The first row, while the launch that this one follows still runs: what it writes is not asked here, so a row that it
// may have skipped is left alone. True if the row is on its way; the ring has room for one.
template <class E, int WARPS>
__device__ __forceinline__ bool run_ahead(const SweepArgs& a, const Team<WARPS>& team, Cursor& at) {
  const int64_t n = team.first, b = n / a.tokens.length;
  if (a.skip_zero_advantages || !a.tokens.active(a.tokens.bits(b, n - b * a.tokens.length))) return false;
  copy_row<E>(a, team, n, at);
  return true;
}

template <class E, int WARPS>
__device__ void produce(const SweepArgs& a, const Team<WARPS>& team, float denominator, Cursor at, bool ahead) {
  const int lane = threadIdx.x & 31;
  unsigned i = 0;  // row of this team
  __syncwarp();    // every lane has read the counts: their memory may be overwritten by rows
  for (int64_t n = team.first; n < a.tokens.N; n += team.step, ++i) {
    Row* const batch = team.rows + i / BATCH % 2 * BATCH;
    if (i % BATCH == 0) {  // one lane per row: a batch waits for memory once, while earlier rows are computed
      const Row row = lane < BATCH ? look_up(a, n + lane * team.step, denominator) : Row{};
      hw::bar_wait(&team.used[i / BATCH % 2], (i / BATCH / 2 & 1) ^ 1);
      if (lane < BATCH) batch[lane] = row;
      __syncwarp();
      if (lane == 0) hw::bar_arrive(&team.known[i / BATCH % 2]);
    }
    if (batch[i % BATCH].label >= 0 && !(ahead && i == 0)) copy_row<E>(a, team, n, at);
  }
}

// Sweep 1 over the chunk at `slot`: statistics of elements j * SLOT .. of the slice. Which thread adds an element
// depends on the element's index only, so that a row gives the same bits at any alignment; an unaligned group is cut
// out of two vectors.
template <class E, bool CAP, int SUMS, bool ALIGNED, bool WHOLE, int CONSUMERS, int WARPS>
__device__ __forceinline__ void sweep_stats(Stat& stat, const Team<WARPS>& team, const Slice<E>& s,
                                            const View<CAP>& view, int j, int slot) {
  constexpr int U = CHUNK / 16 / CONSUMERS;
  const int first = j * SLOT<E> + (int)threadIdx.x * VEC<E>;
  const unsigned char *const p = team.ring + slot * CHUNK + threadIdx.x * 16, *const end =
                                                                                  team.ring + team.slots * CHUNK;
  if constexpr (WHOLE) {
    float z[U * VEC<E>];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const unsigned char* const q = p + u * CONSUMERS * 16;
      uint4 w = *reinterpret_cast<const uint4*>(q);
      if constexpr (!ALIGNED)
        w = shift16(w, *reinterpret_cast<const uint4*>(q + 16 == end ? team.ring : q + 16),
                    s.pad * (int)sizeof(typename E::raw));
      unpack16<E>(w, z + u * VEC<E>);
    }
    add<CAP, SUMS, true>(stat, z, view, 0);
  } else {
    for (int u = 0; u < U; ++u) {
      const int e = first + u * CONSUMERS * VEC<E>, count = s.len - e;
      if (count <= 0) break;
      const unsigned char* const q = p + u * CONSUMERS * 16;
      uint4 w = *reinterpret_cast<const uint4*>(q), hi{0, 0, 0, 0};
      if (s.pad) {
        if (count > VEC<E> - s.pad) hi = *reinterpret_cast<const uint4*>(q + 16 == end ? team.ring : q + 16);
        w = shift16(w, hi, s.pad * (int)sizeof(typename E::raw));
      }
      float z[VEC<E>];
      unpack16<E>(w, z);
      add<CAP, SUMS, false>(stat, z, view, count);
    }
  }
}

// Sweep 2 over one chunk: the gradient from shared to global memory, in 16-byte vectors of the image.
template <class E, bool CAP, bool ENT, int CONSUMERS, int WARPS>
__device__ __forceinline__ void sweep_gradient(const Slope& slope, const Team<WARPS>& team, const Slice<E>& s,
                                               const View<CAP>& view, typename E::raw* out, int label, int j,
                                               int slot) {
  using raw = typename E::raw;
  constexpr int U = CHUNK / 16 / CONSUMERS;
  const int base = j * SLOT<E> - s.pad;
  const unsigned char* const p = team.ring + slot * CHUNK;
  if (offset16<E>(out) == s.pad) {
    if (base >= 0 && base + SLOT<E> <= s.len) {  // a whole chunk: all loads first, then one vector at a time
      uint4 w[U];
#pragma unroll
      for (int u = 0; u < U; ++u) w[u] = *reinterpret_cast<const uint4*>(p + (u * CONSUMERS + threadIdx.x) * 16);
#pragma unroll
      for (int u = 0; u < U; ++u)
        store_vector<E, CAP, ENT, true>(slope, view, w[u], out, base + (u * CONSUMERS + (int)threadIdx.x) * VEC<E>,
                                        s.len, label);
    } else {
      for (int i = threadIdx.x; i < CHUNK / 16; i += CONSUMERS) {
        const int e = base + i * VEC<E>;
        if (e < s.len && e + VEC<E> > 0)
          store_vector<E, CAP, ENT, false>(slope, view, *reinterpret_cast<const uint4*>(p + i * 16), out, e, s.len,
                                           label);
      }
    }
  } else {  // the gradient row has another alignment: element by element, slow
    for (int i = threadIdx.x; i < SLOT<E>; i += CONSUMERS) {
      const int e = base + i;
      if (e >= 0 && e < s.len)
        store1<E>(out + e, gradient<CAP, ENT>(slope, view, load1<E>(reinterpret_cast<const raw*>(p) + i),
                                              e == label ? slope.at_label : 0.f));
    }
  }
}

template <class E, bool CAP, int SUMS, int CONSUMERS>
__device__ void consume(const SweepArgs& a, const Team<CONSUMERS / 32>& team) {
  using raw = typename E::raw;
  constexpr int WARPS = CONSUMERS / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, entries = team.size * WARPS;
  const bool writer = team.rank == 0 && threadIdx.x == 0;
  const auto release = [&](int slot) {
    __syncwarp();
    if (lane == 0) hw::bar_arrive(&team.empty[slot]);
  };
  Cursor at{0, team.slots, 0};
  unsigned turn = 0, i = 0;
  for (int64_t n = team.first; n < a.tokens.N; n += team.step, ++i) {
    if (i % BATCH == 0) hw::bar_wait(&team.known[i / BATCH % 2], i / BATCH / 2 & 1);
    const Row& row = team.rows[i % (2 * BATCH)];
    const Kind kind = row_kind(a, row);
    const Slice<E> s(a, n, team.rank, team.size);
    raw* const out = a.dlogits.data ? row_at<E>(a.dlogits, n) + s.begin : nullptr;
    bool zero = true;
    if (kind == SKIP) {
      if (writer) finish_skipped<SUMS>(a, n);
    } else {
      const View<CAP> view(a.logit_softcap, row.temperature);
      const int label = row.label - s.begin < s.len && row.label >= s.begin ? row.label - s.begin : -VEC<E>;
      const int steps = (s.len + SLOT<E> - 1) / SLOT<E>;
      Stat stat;
      Cursor c = at;
      for (int j = 0; j < steps; ++j) {
        const int slot = c.slot;
        hw::bar_wait(&team.full[slot], c.parity);
        c.next();
        if (s.pad && j + 1 < s.chunks)
          hw::bar_wait(&team.full[c.slot], c.parity);  // an unaligned group may reach into the next slot
        const bool whole = (j + 1) * SLOT<E> <= s.len;
        if (whole && !s.pad) sweep_stats<E, CAP, SUMS, true, true, CONSUMERS>(stat, team, s, view, j, slot);
        else if (whole) sweep_stats<E, CAP, SUMS, false, true, CONSUMERS>(stat, team, s, view, j, slot);
        else sweep_stats<E, CAP, SUMS, false, false, CONSUMERS>(stat, team, s, view, j, slot);
        if (warp == 0 && label >= j * SLOT<E> && label < (j + 1) * SLOT<E>) {  // one lane adds the label's logit
          const int i = slot * SLOT<E> + s.pad + label - j * SLOT<E>, all = team.slots * SLOT<E>;
          if (lane == 0) stat.label = view(load1<E>(reinterpret_cast<const raw*>(team.ring) + (i < all ? i : i - all)));
        }
        if (kind != FULL) release(slot);
      }
      // Every warp of every CTA pushes its part to every CTA. Two areas in turn: a peer can only send for row i + 2
      // after it has received row i + 1 from every warp here, and those were sent after row i was read.
      warp_combine<SUMS>(stat, view.k);
      float4* const area = team.exchange + (turn & 1) * entries;
      uint64_t* const arrived = &team.arrived[turn & 1];
      float* const squares = team.squares + (turn & 1) * entries;
      const int mine = team.rank * WARPS + warp;
      if (threadIdx.x == 0) hw::bar_expect(arrived, entries * ENTRY_BYTES<SUMS == SCORE_NORM>);
      if (lane < team.size) {
        hw::send(make_float4(stat.ref, stat.sum, stat.dot, stat.label), area + mine, arrived, lane);
        if constexpr (SUMS == SCORE_NORM) hw::send(stat.square, squares + mine, arrived, lane);
      }
      hw::bar_wait<true>(arrived, (turn >> 1) & 1);
      ++turn;
      const Slope slope = finish_row<SUMS>(a, n, row, combine<SUMS>(area, squares, entries, view.k), view.k, writer);
      zero = kind != FULL || slope.zero();
      c = at;
      for (int j = 0; j < s.chunks; ++j, c.next()) {
        if (!zero) sweep_gradient<E, CAP, SUMS >= ENTROPY, CONSUMERS>(slope, team, s, view, out, label, j, c.slot);
        if (kind == FULL || j >= steps) release(c.slot);
      }
      at = c;
    }
    if (zero && out) zero_row<E>(out, s.len, threadIdx.x, CONSUMERS);
    if (i % BATCH == BATCH - 1) {
      __syncwarp();
      if (lane == 0) hw::bar_arrive(&team.used[i / BATCH % 2]);
    }
  }
}

template <class E, bool CAP, int SUMS, int CONSUMERS>
__global__ void __launch_bounds__(CONSUMERS + 32, CONSUMERS > 256 ? 1 : 2)
    policy_loss_onepass(const __grid_constant__ SweepArgs a, int slots) {
#if defined(PPG_EMULATED) || __CUDA_ARCH__ >= 900
  const Team<CONSUMERS / 32> team(slots);
  if (threadIdx.x == 0) {
    for (int i = 0; i < slots; ++i) {
      hw::bar_init(&team.full[i], 1);
      hw::bar_init(&team.empty[i], CONSUMERS / 32);
    }
    for (int i = 0; i < 2; ++i) {
      hw::bar_init(&team.arrived[i], 1);
      hw::bar_init(&team.known[i], 1);
      hw::bar_init(&team.used[i], CONSUMERS / 32);
    }
    hw::fence_bar_init();
  }
  hw::cluster_sync();  // no peer may send before the barriers here exist
  const bool producer = threadIdx.x >= CONSUMERS;
  Cursor at{0, slots, 0};
  const bool ahead = producer && run_ahead<E>(a, team, at);
  int* const counted = reinterpret_cast<int*>(team.rows);  // not written before the producer has read it
  hw::wait_for_leader();
  count_outer(a, counted, CONSUMERS + 32);
  __syncthreads();
  if (producer) produce<E>(a, team, outer(a, counted, CONSUMERS + 32), at, ahead);
  else consume<E, CAP, SUMS, CONSUMERS>(a, team);
  hw::cluster_sync();  // no CTA leaves while a peer may still send to it
  if (team.rank == 0) sum_losses(a, team.ring, gridDim.x / team.size, CONSUMERS + 32);
#endif
}

}  // namespace ppg
