// Fused policy-gradient loss over logits: every row is read once from memory and its gradient written once (sm_90 and
// later).
//
// A cluster of 1, 2, 4 or 8 CTAs owns a row; each CTA holds a slice of it in a ring of 16 KB shared-memory slots. One
// producer warp keeps the ring full by bulk copies, running ahead into the next rows. The consumer warps sweep the
// slice in shared memory, once or twice:
//   sweep 1  reference exponent, sum of exponentials, sum of exponential * exponent; every warp sends its own to all
//            CTAs if the row has a gradient, else to rank 0 only, and goes on to the next row
//   sweep 2  gradient from shared memory to registers to global memory; each slot is handed back to the producer as it
//            is read
// Between them one finisher warp combines what all warps of all CTAs have sent: logprob, entropy -> policy_term ->
// slope of the gradient, for the consumers of its CTA. Rank 0's writes the outputs.
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

template <class E, bool CAP, int SUMS, int CONSUMERS>
__device__ void consume(const SweepArgs& a, const Team<CONSUMERS / 32>& team) {
  using raw = typename E::raw;
  constexpr int WARPS = CONSUMERS / 32, CHUNKS = STEP<CAP, CONSUMERS>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const auto landed = [&](const Cursor& c) { hw::bar_wait(&team.full[c.slot], c.parity); };
  const auto release = [&](Cursor c, int chunks) {
    __syncwarp();
    for (int k = 0; k < CHUNKS && k < chunks; ++k, c.next())
      if (lane == 0) hw::bar_arrive(&team.empty[c.slot]);
    return c;
  };
  View<CAP> view(a.logit_softcap, 1.f);
  Cursor at{0, team.slots, 0};
  unsigned turn = 0, gradients = 0, i = 0;
  for (int64_t n = team.first; n < a.tokens.N; n += team.step, ++i) {
    const Row& row = team.row(i);
    const Kind kind = row_kind(a, row);
    const Slice<E> s(a, n, team.rank, team.size);
    raw* const out = a.dlogits.data ? row_at<E>(a.dlogits, n) + s.begin : nullptr;
    bool zero = true;
    if (kind != SKIP) {
      view.k = row.k;
      const int label = row.label - s.begin < s.len && row.label >= s.begin ? row.label - s.begin : -VEC<E>;
      const int swept = min((s.len + CHUNKS * SLOT<E> - 1) / (CHUNKS * SLOT<E>)*CHUNKS, s.chunks);
      const int half = team.free_half(turn++);
      Stat stat;
      Cursor c = at;
      for (int j = 0; j < swept; j += CHUNKS) {
        const Cursor begin = c;
        for (int k = 0; k < CHUNKS && j + k < swept; ++k, c.next()) landed(c);
        if (s.pad && j + CHUNKS < s.chunks) landed(c);  // an unaligned group may reach into the next slot
        if ((j + CHUNKS) * SLOT<E> > s.len) sweep_rest<E, CAP, SUMS, CONSUMERS>(stat, team, s, view, j, begin.slot);
        else if (s.pad) sweep_stats<E, CAP, SUMS, false, CONSUMERS>(stat, team, s, view, begin.slot);
        else sweep_stats<E, CAP, SUMS, true, CONSUMERS>(stat, team, s, view, begin.slot);
        const int there = label - j * SLOT<E>;
        if (warp == 0 && there >= 0 && there < CHUNKS * SLOT<E>)
          stat.label =
              view(load1<E>(reinterpret_cast<const raw*>(team.at(begin.slot, (s.pad + there) * (int)sizeof(raw)))));
        if (kind != FULL) release(begin, min(CHUNKS, swept - j));
      }
      warp_combine<SUMS>(stat, view.k);
      if (lane < (kind == FULL ? team.size : 1)) {
        const int entry = team.rank * WARPS + warp;
        uint64_t* const arrived = &team.arrived[half];
        hw::send(make_float4(stat.ref, stat.sum, stat.dot, stat.label), team.entries(half) + entry, arrived, lane);
        if constexpr (SUMS == SCORE_NORM) hw::send(stat.square, team.entry_squares(half) + entry, arrived, lane);
      }
      Slope slope{};
      if (kind == FULL) {
        hw::bar_wait(team.finished, gradients++ & 1);
        slope = *team.slope;
        zero = slope.zero();
        c = at;
      }
      for (int j = kind == FULL ? 0 : swept; j < s.chunks; j += CHUNKS) {
        if (!zero) sweep_gradient<E, CAP, SUMS >= ENTROPY, CONSUMERS>(slope, team, s, view, out, label, j, c.slot);
        c = release(c, min(CHUNKS, s.chunks - j));
      }
      at = c;
    }
    if (zero && out) zero_row<E>(out, s.len, threadIdx.x, CONSUMERS);
    team.leave_row(i);
  }
}

// The finisher warp: what lies between the two sweeps.
template <int SUMS, int WARPS> __device__ void finish(const SweepArgs& a, const Team<WARPS>& team) {
  const int lane = threadIdx.x & 31, entries = team.size * WARPS;
  const bool writer = team.rank == 0 && lane == 0;
  unsigned turn = 0, i = 0;
  for (int64_t n = team.first; n < a.tokens.N; n += team.step, ++i) {
    const Row& row = team.row(i);
    const Kind kind = row_kind(a, row);
    Finished f{};
    if (kind != SKIP) {
      const bool mine = kind == FULL || team.rank == 0;  // else nothing is sent here
      const int half = team.free_half(turn);             // no rank runs ahead of the others
      if (lane == 0) hw::bar_expect(&team.arrived[half], mine ? entries * ENTRY_BYTES<SUMS == SCORE_NORM> : 0);
      if (mine) {
        hw::bar_wait<true>(&team.arrived[half], turn >> 1 & 1);
        const Stat stat = combine<SUMS>(team.entries(half), team.entry_squares(half), entries, row.k);
        f = finish_row<SUMS>(a, row, stat);
      }
      if (lane == 0 && kind == FULL) {  // every warp here has read the slope before this one: it has sent since
        *team.slope = f.slope;
        hw::bar_arrive(team.finished);
      }
      __syncwarp();
      if (lane < team.size) hw::bar_arrive(&team.read[half], lane);
      ++turn;
    }
    if (writer) write_row<SUMS>(a, n, f);
    team.leave_row(i);
  }
}

template <class E, bool CAP, int SUMS, int CONSUMERS>
__global__ void __launch_bounds__(CONSUMERS + HELPERS, CONSUMERS > 256 ? 1 : 2)
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
      hw::bar_init(&team.read[i], team.size);
      hw::bar_init(&team.known[i], 1);
      hw::bar_init(&team.used[i], CONSUMERS / 32 + 1);
    }
    hw::bar_init(team.finished, 1);
    hw::fence_bar_init();
  }
  hw::cluster_sync();                                         // no peer may send before the barriers here exist
  const int helper = (int)threadIdx.x / 32 - CONSUMERS / 32;  // 0 the producer, 1 the finisher
  Cursor at{0, slots, 0};
  const bool ahead = helper == 0 && run_ahead<E>(a, team, at);
  int* const counted = reinterpret_cast<int*>(team.rows);  // not written before the producer has read it
  hw::wait_for_leader();
  count_outer(a, counted, CONSUMERS + HELPERS);
  __syncthreads();
  if (helper == 0) produce<E>(a, team, outer(a, counted, CONSUMERS + HELPERS), at, ahead);
  else if (helper == 1) finish<SUMS>(a, team);
  else consume<E, CAP, SUMS, CONSUMERS>(a, team);
  hw::cluster_sync();  // no CTA leaves while a peer may still send to it
  if (team.rank == 0) sum_losses(a, team.ring, gridDim.x / team.size, CONSUMERS + HELPERS);
#endif
}

}  // namespace ppg
