// A fused policy loss: its sweep, and the launch before it, for the advantage of each turn and the number of active
// tokens. Mirrors kernels/triton/credit.py
#include <algorithm>

#include "lookup.cuh"
#include "partial_returns.cuh"

namespace ppg {
namespace {

constexpr int THREADS = 256;
constexpr int TOGETHER = 4;  // tokens of a thread whose loads are issued at once

// The return over any subset of the rewards, including those before the turn.
__device__ __forceinline__ float masked_return(const float* rewards, const uint8_t* mask, int64_t t, int64_t turns,
                                               double gamma) {
  if (t >= turns) return 0.f;
  double later = 0.0, earlier = 0.0;
  for (int64_t k = turns - 1; k >= t; --k) later = fma(gamma, later, mask[k] ? (double)rewards[k] : 0.0);
  for (int64_t k = 0; k < t; ++k)
    if (mask[k] || earlier != 0.0) earlier = (earlier + (mask[k] ? (double)rewards[k] : 0.0)) / gamma;
  return (float)(later + earlier);
}

struct Member {
  int64_t group;
  float value;
  int has_turn;
};

// Advantages of turn t of all dialogues, by one CTA: a baseline is over the same turn of other dialogues.
__device__ void credit_turn(const CreditArgs& a, int64_t t) {
  Member* const members = reinterpret_cast<Member*>(hw::smem());  // [THREADS]
  const int64_t S = a.tokens.sequences;
  const auto turns_of = [&](int64_t b) { return a.turn_counts.data ? min(a.turn_counts[b], a.T) : a.T; };
  for (int64_t b = threadIdx.x; b < S; b += THREADS) {
    const float* const rewards = a.rewards + b * a.T;
    const int64_t* const ids = a.segment_ids ? a.segment_ids + b * a.T : nullptr;
    a.returns[b * a.T + t] =
        a.reward_mask ? masked_return(rewards, a.reward_mask + t * a.T, t, turns_of(b), a.gamma)
                      : windowed_return(rewards, ids, t, turns_of(b), a.lookahead, a.segment_length, a.gamma);
  }
  if (a.baseline == Baseline::NONE) return;
  for (int64_t first = 0; first < S; first += THREADS) {  // one thread per dialogue
    const int64_t b = first + threadIdx.x, group = b < S ? a.group_ids[b] : 0;
    // In float64 and in the order of the dialogues, so that equal returns give exact zeros.
    const auto for_each_member = [&](auto&& use) {
      for (int64_t base = 0; base < S; base += THREADS) {
        const int64_t o = base + threadIdx.x;
        __syncthreads();
        if (o < S) members[threadIdx.x] = {a.group_ids[o], a.returns[o * a.T + t], t < turns_of(o)};
        __syncthreads();
#pragma unroll 8
        for (int i = 0; i < (int)min(S - base, (int64_t)THREADS); ++i) {
          const Member member = members[i];  // whole: no load waits for a comparison
          if (member.has_turn && member.group == group) use((double)member.value);
        }
      }
    };
    int64_t count = 0;
    double total = 0.0, squares = 0.0;
    for_each_member([&](double value) {
      ++count;
      total += value;
    });
    const double mean = total / (double)max(count, (int64_t)1), others = (double)max(count - 1, (int64_t)1);
    if (a.baseline == Baseline::GROUP_STD)
      for_each_member([&](double value) { squares += (value - mean) * (value - mean); });
    if (b >= S) continue;
    const double own = a.returns[b * a.T + t];
    double advantage = own;
    if (count > 1 && a.baseline == Baseline::LEAVE_ONE_OUT) advantage = own - (total - own) / others;
    else if (count > 1)
      advantage = (own - mean) / (a.baseline == Baseline::GROUP_STD ? sqrt(squares / others) + a.std_eps : 1.0);
    a.advantages[b * a.T + t] = t < turns_of(b) ? (float)advantage : 0.f;
  }
}

// Active tokens of slice k of sequence s, or of the whole batch.
__device__ void count_active(const CreditArgs& a, int64_t s, int64_t k) {
  int* const scratch = reinterpret_cast<int*>(hw::smem());
  const TokenArgs& t = a.tokens;
  int64_t begin = 0, end = t.N;
  if (a.counted > 1) {
    const bool packed = t.cu_seqlens.data;
    if (s > 0) begin = packed ? min(max(t.cu_seqlens[s], (int64_t)0), t.N) : s * (t.N / t.sequences);
    if (s < a.counted - 1) end = packed ? min(max(t.cu_seqlens[s + 1], begin), t.N) : (s + 1) * (t.N / t.sequences);
  }
  const int64_t part = (end - begin + a.slices - 1) / a.slices;
  begin = min(begin + k * part, end);
  end = min(begin + part, end);
  int count = 0;
  for (int64_t first = begin + threadIdx.x; first < end; first += TOGETHER * THREADS) {
    TokenArgs::Bits tokens[TOGETHER];  // all of them are on their way before the first is looked at
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const uint32_t n = (uint32_t)min(first + i * THREADS, end - 1), b = n / (uint32_t)t.length,
                     l = n - b * (uint32_t)t.length;
      tokens[i] = t.bits(b, l);
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) count += first + i * THREADS < end && t.active(tokens[i]);
  }
  count = warp_sum(count);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  count = 0;
  for (int w = 0; w < THREADS / 32; ++w) count += scratch[w];
  a.counts[s * a.slices + k] = count;
}

// One CTA per turn, then one per slice that is counted. Without the bound on resident CTAs ptxas spills for sm_80.
__global__ void __launch_bounds__(THREADS, 4) credit_kernel(const __grid_constant__ CreditArgs a) {
  hw::let_followers_start();
  if (blockIdx.x == 0 && threadIdx.x == 0 && a.ticket) *a.ticket = 0;
  const int64_t turns = a.rewards ? a.T : 0, i = blockIdx.x - turns;
  if (i < 0) credit_turn(a, blockIdx.x);
  else if (a.counts) count_active(a, i / a.slices, i % a.slices);
}

}  // namespace

namespace cuda {

// The sweep may begin while the launch before it runs (hw::Order). That is right because
//   * the first launch is an ordinary one: it begins once all before it on the stream is complete, so what the caller
//     gave (logits, labels, masks) is there for the sweep too;
//   * of what the first launch writes (returns, advantages, counts, ticket) the sweep reads nothing before it has
//     waited for its end, and what the sweep writes is written after that;
//   * every thread of the sweep waits, so the sweep ends after the first launch does, and whoever comes next on the
//     stream, by an ordinary launch, finds both complete.
// Without a first launch the one before is a stranger that may still be writing the logits: an ordinary launch then.
int fused_policy_loss(const FusedLaunchArgs& both, void* stream) {
  const CreditArgs& a = both.credit;
  if (a.tokens.N == 0) return 0;
  const int64_t blocks = (a.rewards ? a.T : 0) + (a.counts ? a.counted * a.slices : 0);
  const bool needs_groups = a.rewards && a.baseline != Baseline::NONE;
  if (a.tokens.N > INT32_MAX || blocks > INT32_MAX || (needs_groups && !a.group_ids.data)) return hw::INVALID_VALUE;
  if (blocks == 0 && !a.ticket) return sweep({both.sweep, nullptr, hw::Order::ALONE}, stream);
  const unsigned grid = (unsigned)std::max<int64_t>(blocks, 1);
  const bool overlap = hw::can_follow(credit_kernel);
  const int error = hw::launch(overlap ? hw::Order::LEADS : hw::Order::ALONE, credit_kernel, grid, THREADS, 0,
                               THREADS * sizeof(Member), stream, a);
  return error ? error : sweep({both.sweep, nullptr, overlap ? hw::Order::FOLLOWS : hw::Order::ALONE}, stream);
}

}  // namespace cuda
}  // namespace ppg
