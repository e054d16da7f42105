// What a CTA holds of a row, in a ring of slots in shared memory, and the two sweeps over it.
#pragma once
#include "lookup.cuh"

namespace ppg {

static_assert(sizeof(Row) == ROW_BYTES && sizeof(Slope) == 16, "plan.h lays out the shared memory");
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
  Slope* slope;
  uint64_t *full, *empty, *arrived, *read, *known, *used, *finished;
  float* squares;
  int slots, rank, size;
  int64_t first, step;
  __device__ __forceinline__ explicit Team(int slots_)
      : slots(slots_), rank(hw::cluster_rank()), size(hw::cluster_size()) {
    ring = hw::smem();
    exchange = reinterpret_cast<float4*>(ring + slots * CHUNK);  // [2][size * WARPS] in turn
    rows = reinterpret_cast<Row*>(exchange + 2 * size * WARPS);  // [2][BATCH]
    slope = reinterpret_cast<Slope*>(rows + 2 * BATCH);          // of the row between its sweeps
    full = reinterpret_cast<uint64_t*>(slope + 1);               // [slots] data has landed
    empty = full + slots;                                        // [slots] data has been used
    arrived = empty + slots;                                     // [2] the exchange is complete
    read = arrived + 2;                                          // [2] it has been read in every CTA
    known = read + 2;                                            // [2] a batch of rows has been looked up
    used = known + 2;                                            // [2] a batch of rows is no longer needed
    finished = used + 2;                                         // the slope is there
    squares = reinterpret_cast<float*>(finished + 1);            // SCORE_NORM: as exchange, which is full
    first = blockIdx.x / size;
    step = gridDim.x / size;
  }
  __device__ __forceinline__ float4* entries(int half) const { return exchange + half * size * WARPS; }
  __device__ __forceinline__ float* entry_squares(int half) const { return squares + half * size * WARPS; }
  // Row i of this team, as soon as its batch has been looked up.
  __device__ __forceinline__ const Row& row(unsigned i) const {
    if (i % BATCH == 0) hw::bar_wait(&known[i / BATCH % 2], i / BATCH / 2 & 1);
    return rows[i % (2 * BATCH)];
  }
  // Called by a warp that no longer needs row i.
  __device__ __forceinline__ void leave_row(unsigned i) const {
    if (i % BATCH != BATCH - 1) return;
    __syncwarp();
    if ((threadIdx.x & 31) == 0) hw::bar_arrive(&used[i / BATCH % 2]);
  }
  // Returns the half of the exchange for the row of this turn, as soon as all that was there has been read in every
  // CTA, two turns ago.
  __device__ __forceinline__ int free_half(unsigned turn) const {
    hw::bar_wait(&read[turn & 1], (turn >> 1 & 1) ^ 1);
    return turn & 1;
  }
  // Byte i of what begins in `slot`; i may lie in a later slot, for which the ring may begin again.
  __device__ __forceinline__ unsigned char* at(int slot, int i) const {
    const int at = slot * CHUNK + i, all = slots * CHUNK;
    return ring + (at < all ? at : at - all);
  }
};

// Chunks that sweep 1 takes at once: 32 elements of 2 bytes a thread. The tanh of a softcap needs the registers.
template <bool CAP, int CONSUMERS> constexpr int STEP = CAP || CONSUMERS <= 256 ? 1 : 2;

// Sweep 1 over the chunks j .. of a step, which begin at `slot`: statistics of elements j * SLOT .. of the slice. Which
// thread adds an element depends on the element's index only, so that a row gives the same bits at any alignment; an
// unaligned group is cut out of two vectors.
template <class E, bool CAP, int SUMS, bool ALIGNED, int CONSUMERS, int WARPS>
__device__ __forceinline__ void sweep_stats(Stat& stat, const Team<WARPS>& team, const Slice<E>& s,
                                            const View<CAP>& view, int slot) {
  constexpr int U = CHUNK / 16 / CONSUMERS;
  float z[STEP<CAP, CONSUMERS> * U * VEC<E>];
#pragma unroll
  for (int k = 0; k < STEP<CAP, CONSUMERS>; ++k) {
    const unsigned char *const p = team.at(slot, k * CHUNK) + threadIdx.x * 16, *const end =
                                                                                    team.ring + team.slots * CHUNK;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const unsigned char* const q = p + u * CONSUMERS * 16;
      uint4 w = *reinterpret_cast<const uint4*>(q);
      if constexpr (!ALIGNED)
        w = shift16(w, *reinterpret_cast<const uint4*>(q + 16 == end ? team.ring : q + 16),
                    s.pad * (int)sizeof(typename E::raw));
      unpack16<E>(w, z + (k * U + u) * VEC<E>);
    }
  }
  add<CAP, SUMS, true>(stat, z, view, 0);
}
// The same for the last step of a slice, which need not be whole, one group at a time.
template <class E, bool CAP, int SUMS, int CONSUMERS, int WARPS>
__device__ __forceinline__ void sweep_rest(Stat& stat, const Team<WARPS>& team, const Slice<E>& s,
                                           const View<CAP>& view, int j, int slot) {
  for (int i = threadIdx.x;; i += CONSUMERS) {
    const int count = s.len - (j * SLOT<E> + i * VEC<E>);
    if (count <= 0) break;
    uint4 w = *reinterpret_cast<const uint4*>(team.at(slot, i * 16)), hi{0, 0, 0, 0};
    if (s.pad) {
      if (count > VEC<E> - s.pad) hi = *reinterpret_cast<const uint4*>(team.at(slot, i * 16 + 16));
      w = shift16(w, hi, s.pad * (int)sizeof(typename E::raw));
    }
    float z[VEC<E>];
    unpack16<E>(w, z);
    if (count >= VEC<E>) add<CAP, SUMS, true>(stat, z, view, 0);
    else add<CAP, SUMS, false>(stat, z, view, count);
  }
}

// Sweep 2 over the same chunks: the gradient from shared to global memory, in 16-byte vectors of the image.
template <class E, bool CAP, bool ENT, int CONSUMERS, int WARPS>
__device__ __forceinline__ void sweep_gradient(const Slope& slope, const Team<WARPS>& team, const Slice<E>& s,
                                               const View<CAP>& view, typename E::raw* out, int label, int j,
                                               int slot) {
  using raw = typename E::raw;
  constexpr int U = CHUNK / 16 / CONSUMERS, CHUNKS = STEP<CAP, CONSUMERS>, LEN = CHUNKS * SLOT<E>;
  const int base = j * SLOT<E> - s.pad, first = base + (int)threadIdx.x * VEC<E>;
  const auto logit = [&](int i) { return load1<E>(reinterpret_cast<const raw*>(team.at(slot, i * (int)sizeof(raw)))); };
  if (offset16<E>(out) != s.pad) {  // the gradient row has another alignment: element by element, slow
    for (int i = threadIdx.x; i < LEN; i += CONSUMERS) {
      const int e = base + i;
      if (e >= 0 && e < s.len)
        store1<E>(out + e, gradient<CAP, ENT>(slope, view, logit(i), e == label ? slope.at_label : 0.f));
    }
    return;
  }
  if (base >= 0 && base + LEN <= s.len) {  // whole: all loads first, then one vector at a time
    uint4 w[CHUNKS * U];
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k)
#pragma unroll
      for (int u = 0; u < U; ++u)
        w[k * U + u] = *reinterpret_cast<const uint4*>(team.at(slot, k * CHUNK) + (u * CONSUMERS + threadIdx.x) * 16);
#pragma unroll
    for (int i = 0; i < CHUNKS * U; ++i)
      store_vector<E, CAP, ENT, true>(slope, view, w[i], out, first + i * CONSUMERS * VEC<E>, s.len);
  } else {
    for (int e = first; e < min(base + LEN, s.len); e += CONSUMERS * VEC<E>)
      if (e + VEC<E> > 0)
        store_vector<E, CAP, ENT, false>(
            slope, view, *reinterpret_cast<const uint4*>(team.at(slot, (e - base) * (int)sizeof(raw))), out, e, s.len);
  }
  const int at = label - base;  // whoever wrote the label's vector writes the label's element again
  if ((unsigned)at < (unsigned)LEN && (int)threadIdx.x == at / VEC<E> % CONSUMERS)
    store1<E>(out + label, gradient<CAP, ENT>(slope, view, logit(at), slope.at_label));
}

}  // namespace ppg
