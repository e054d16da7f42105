// How a row of the vocabulary is spread over the chip. Plain C++: no torch, no CUDA.
#pragma once
#include <algorithm>
#include <cstdint>

namespace ppg {

// cluster 0: two passes over global memory by CTAs of `threads`. Else one pass by clusters of `cluster` CTAs with
// `threads` consumers each, HELPERS beside them, and a ring of `slots` slots, of which a row takes at most `chunks`.
struct Plan {
  int cluster, threads, slots, chunks;
};

constexpr int CHUNK = 16384;  // bytes of one bulk copy and of one slot of the ring
constexpr int MAX_CLUSTER = 8;
constexpr int HELPERS = 64;         // threads: a warp that loads rows, a warp that finishes them
constexpr int64_t MAX_V = 1 << 30;  // indices inside a row are 32-bit

constexpr int BATCH = 8;       // rows that the producer looks up at once
constexpr int ROW_BYTES = 32;  // of the scalars of one row

constexpr int SMALL_THREADS = 128, LARGE_THREADS = 512;  // of the two-pass kernels

// Bytes that a warp sends to every CTA of its cluster; with a score norm the sum of squares too.
template <bool NORM> constexpr int ENTRY_BYTES = NORM ? 20 : 16;

// Ring, two exchange areas, two batches of rows, a slope, barriers.
constexpr int ring_bytes(int cluster, int consumers, int slots, int entry_bytes) {
  return slots * CHUNK + 2 * cluster * (consumers / 32) * entry_bytes + 2 * BATCH * ROW_BYTES + 16 +
         (2 * slots + 9) * 8;
}

// The slots that a row can touch in the worst alignment.
inline int64_t row_chunks(int64_t V, int elem_bytes, int cluster) {
  const int vec = 16 / elem_bytes;
  const int64_t slice = ((V + cluster - 1) / cluster + vec - 1) / vec * vec;
  return ((slice + vec - 1) * elem_bytes + CHUNK - 1) / CHUNK;
}

// The smallest cluster whose shared memory holds a row and leaves >= 32 KB per SM for the next ones. Depends on V,
// never on N, so that a row gives the same bits in every batch. A row of one chunk stays in L1 between two passes:
// small CTAs, many per SM. max_per_sm 1: the kernel exists for 512 consumers only. A score norm does not change the
// plan but for one slot fewer at times, so that it changes no other bits.
// Where a chip then says that such clusters do not fit, policy_loss.cu takes two passes by LARGE_THREADS: the same
// bits in every batch again, but not those of one pass, as other threads add up the row.
inline Plan plan_row(int64_t V, int elem_bytes, bool has_clusters, int max_per_sm, int smem_block, int smem_sm,
                     int entry_bytes) {
  if (V * elem_bytes <= CHUNK) return {0, SMALL_THREADS, 0, 0};
  for (int cluster = 1; has_clusters && cluster <= MAX_CLUSTER; cluster *= 2)
    for (int per_sm = max_per_sm; per_sm >= 1; --per_sm) {
      const int consumers = 512 / per_sm,
                room = per_sm == 1 ? smem_block : smem_sm / 2 - 1024;  // 1 KB of each block is the system's
      const int64_t chunks = row_chunks(V, elem_bytes, cluster);
      int slots = room / CHUNK;
      while (slots > 0 && ring_bytes(cluster, consumers, slots, ENTRY_BYTES<false>) > room) --slots;
      if (slots < chunks + (per_sm == 1 ? 3 : 2)) continue;
      if (ring_bytes(cluster, consumers, slots, entry_bytes) > room) --slots;
      return {cluster, consumers, slots, static_cast<int>(chunks)};
    }
  return {0, LARGE_THREADS, 0, 0};
}

// CTAs per SM for two passes: few enough that the second pass finds its row in L2 (about 370 KB per SM on A100 and
// H100), at most 8 small or 2 large ones.
inline int two_pass_ctas_per_sm(int64_t V, int elem_bytes, int threads) {
  return static_cast<int>(std::clamp<int64_t>((256 << 10) / (V * elem_bytes), 1, threads == SMALL_THREADS ? 8 : 2));
}

}  // namespace ppg
