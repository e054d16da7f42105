// What a CTA holds of a row, in a ring of slots in shared memory.
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

}  // namespace ppg
