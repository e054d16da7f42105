// The ring of the one-pass kernel and the warp that keeps it full: a CTA's slice of each of its rows, by bulk copies
// that run ahead into the next rows, and the scalars of those rows.
#pragma once
#include "lookup.cuh"

namespace ppg {

static_assert(sizeof(Row) == ROW_BYTES, "plan.h lays out the shared memory");
template <class E> constexpr int SLOT = CHUNK / (int)sizeof(typename E::raw);

// The part of a row that one CTA owns. Its copy in shared memory keeps its offset from the 16-byte boundary below it:
// slice element i is element pad + i of the image, which fills the slots of the ring in order. Rows are cut by element
// index, never by address.
template <class E> struct Slice {
  int begin, len, pad, chunks;
  const typename E::raw* src;
  __device__ __forceinline__ Slice(const SweepArgs& a, int64_t n, int rank, int size) {
    const int V = (int)a.V, each = ((V + size - 1) / size + VEC<E> - 1) / VEC<E> * VEC<E>;
    begin = min(rank * each, V);
    len = min(each, V - begin);
    src = row_at<E>(a.logits, n) + begin;
    pad = offset16<E>(src);
    chunks = len ? (pad + len + SLOT<E> - 1) / SLOT<E> : 0;
  }
};

struct Cursor {  // a slot of the ring and the parity of its current phase
  int slot, slots;
  unsigned parity;
  __device__ __forceinline__ void next() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <int WARPS> struct Team {  // what the threads of a CTA share
  unsigned char* ring;
  float4* exchange;
  Row* rows;
  uint64_t *full, *empty, *arrived, *known, *used;
  float* squares;
  int slots, rank, size;
  int64_t first, step;
  __device__ __forceinline__ explicit Team(int slots_)
      : slots(slots_), rank(hw::cluster_rank()), size(hw::cluster_size()) {
    ring = hw::smem();
    exchange = reinterpret_cast<float4*>(ring + slots * CHUNK);  // [2][size * WARPS]
    rows = reinterpret_cast<Row*>(exchange + 2 * size * WARPS);  // [2][BATCH]
    full = reinterpret_cast<uint64_t*>(rows + 2 * BATCH);        // [slots] data has landed
    empty = full + slots;                                        // [slots] data has been used
    arrived = empty + slots;                                     // [2] the exchange is complete
    known = arrived + 2;                                         // [2] a batch of rows has been looked up
    used = known + 2;                                            // [2] a batch of rows is no longer needed
    squares = reinterpret_cast<float*>(used + 2);                // SCORE_NORM: as exchange, which is full
    first = blockIdx.x / size;
    step = gridDim.x / size;
  }
};

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

}  // namespace ppg
