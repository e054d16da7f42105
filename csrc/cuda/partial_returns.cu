// Windowed discounted returns. Mirrors ppg_fast/reference/partial_returns.py and csrc/cpu/partial_returns.cpp
#include <algorithm>

#include "partial_returns.cuh"

namespace ppg {
namespace {

constexpr int THREADS = 128;

// One thread per turn, grid-stride loop.
__global__ void __launch_bounds__(THREADS) partial_returns_kernel(const __grid_constant__ PartialReturnsArgs a) {
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < a.B * a.T; i += (int64_t)gridDim.x * THREADS) {
    const int64_t b = i / a.T, t = i - b * a.T,
                  turns = a.turn_counts && a.turn_counts[b] < a.T ? a.turn_counts[b] : a.T;
    const int64_t* const ids = a.segment_ids ? a.segment_ids + b * a.T : nullptr;
    a.returns[i] = windowed_return(a.rewards + b * a.T, ids, t, turns, a.lookahead, a.segment_length, a.gamma);
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
