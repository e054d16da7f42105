// Rewards to per-turn returns in one launch: it decides which rows of the vocabulary sweep have a gradient, so it runs first.
#include <algorithm>

#include "../args.h"
#include "hw.cuh"

namespace ppg {
namespace {

constexpr int THREADS = 128;

// A thread a turn. Horner's rule from the end of the window: only products and sums of rewards, where differences of prefix sums would
// cancel. Threads of one dialogue read the same rewards, so the loops run from the first-level cache.
__global__ void __launch_bounds__(THREADS) partial_returns_kernel(const __grid_constant__ PartialReturnsArgs a) {
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.B * a.T; i += (int64_t)gridDim.x * THREADS) {
    const int64_t b = i / a.T, t = i - b * a.T, turns = a.turn_counts && a.turn_counts[b] < a.T ? a.turn_counts[b] : a.T;
    const float* const rewards = a.rewards + b * a.T;
    int64_t end = a.lookahead < turns - t ? t + a.lookahead : turns;
    if (a.segment_length && a.segment_length - t % a.segment_length < end - t) end = t + a.segment_length - t % a.segment_length;
    if (a.segment_ids && t < end) {
      const int64_t* const ids = a.segment_ids + b * a.T;
      int64_t k = t + 1;
      while (k < end && ids[k] == ids[t]) ++k;
      end = k;
    }
    float sum = 0.f;
    for (int64_t k = end - 1; k >= t; --k) sum = fmaf(a.gamma, sum, rewards[k]);
    a.returns[i] = sum;
  }
}

}  // namespace

namespace cuda {

int partial_returns(const PartialReturnsArgs& a, void* stream) {
  if (a.B * a.T == 0) return 0;
  if (a.B < 0 || a.T < 0 || a.lookahead < 1 || a.segment_length < 0) return hw::INVALID_VALUE;
  const int64_t blocks = (a.B * a.T + THREADS - 1) / THREADS;
  return hw::launch(partial_returns_kernel, (unsigned)std::min<int64_t>(blocks, 1 << 20), THREADS, 0, 0, stream, a);
}

}  // namespace cuda
}  // namespace ppg
