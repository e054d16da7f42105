// Rewards to what each turn is credited with, and the rules that the values of turns keep. Mirrors csrc/cuda/credit.cu
// and ppg_fast/functional/returns.py
#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <vector>

#include "../args.h"

namespace ppg::cpu {
namespace {

// Whether an id comes back after another one. A segment is one run of turns.
bool scattered(const int64_t* ids, int64_t turns) {
  std::vector<int64_t> runs;
  for (int64_t t = 0; t < turns; ++t)
    if (t == 0 || ids[t] != ids[t - 1]) runs.push_back(ids[t]);
  std::sort(runs.begin(), runs.end());
  return std::adjacent_find(runs.begin(), runs.end()) != runs.end();
}

// returns[b, t] = sum of gamma^(k-t) rewards[b, k] over the rewards k that row t of the mask keeps.
void masked_returns(const CreditArgs& a, const std::vector<int64_t>& turns) {
  for (size_t b = 0; b < turns.size(); ++b) {
    const float* const r = a.rewards + b * a.T;
    for (int64_t t = 0; t < a.T; ++t) {
      const uint8_t* const mask = a.reward_mask + t * a.T;
      double later = 0.0, earlier = 0.0;
      for (int64_t k = turns[b] - 1; k >= t; --k) later = a.gamma * later + (mask[k] ? double(r[k]) : 0.0);
      for (int64_t k = 0; k < std::min(t, turns[b]); ++k)
        if (mask[k] || earlier != 0.0) earlier = (earlier + (mask[k] ? double(r[k]) : 0.0)) / a.gamma;
      a.returns[b * a.T + t] = t < turns[b] ? float(later + earlier) : 0.f;
    }
  }
}

// The return of each turn minus the baseline of the same turn over its group, in float64 and in the order of the
// dialogues, so that equal returns give exact zeros.
void subtract_baseline(const CreditArgs& a, const std::vector<int64_t>& turns) {
  struct Group {
    int64_t count;
    double total, squares;
  };
  const int64_t S = int64_t(turns.size());
  std::unordered_map<int64_t, int64_t> numbers;
  std::vector<int64_t> group(S);
  for (int64_t b = 0; b < S; ++b) group[b] = numbers.emplace(a.group_ids[b], int64_t(numbers.size())).first->second;
  std::vector<Group> groups(numbers.size());
  for (int64_t t = 0; t < a.T; ++t) {
    std::fill(groups.begin(), groups.end(), Group{});
    const auto own = [&](int64_t b) { return double(a.returns[b * a.T + t]); };
    for (int64_t b = 0; b < S; ++b) {
      if (t >= turns[b]) continue;
      ++groups[group[b]].count;
      groups[group[b]].total += own(b);
    }
    const auto mean = [](const Group& g) { return g.total / double(std::max<int64_t>(g.count, 1)); };
    for (int64_t b = 0; b < S && a.baseline == Baseline::GROUP_STD; ++b) {
      Group& g = groups[group[b]];
      if (t < turns[b]) g.squares += (own(b) - mean(g)) * (own(b) - mean(g));
    }
    for (int64_t b = 0; b < S; ++b) {
      const Group& g = groups[group[b]];
      const double others = double(std::max<int64_t>(g.count - 1, 1));
      double advantage = own(b);
      if (g.count > 1 && a.baseline == Baseline::LEAVE_ONE_OUT) advantage -= (g.total - own(b)) / others;
      else if (g.count > 1)
        advantage =
            (own(b) - mean(g)) / (a.baseline == Baseline::GROUP_STD ? std::sqrt(g.squares / others) + a.std_eps : 1.0);
      a.advantages[b * a.T + t] = t < turns[b] ? float(advantage) : 0.f;
    }
  }
}

}  // namespace

bool turns_are_valid(const float* rewards, const int64_t* segment_ids, const Ints& turn_counts, int64_t B, int64_t T) {
  for (int64_t b = 0; b < B; ++b) {
    const int64_t turns = turn_counts.data ? turn_counts[b] : T;
    if (turns < 0 || turns > T) return false;
    for (int64_t t = 0; t < turns; ++t)
      if (!std::isfinite(rewards[b * T + t])) return false;
    if (segment_ids && scattered(segment_ids + b * T, turns)) return false;
  }
  return true;
}

void credit(const CreditArgs& a) {
  std::vector<int64_t> turns(a.tokens.sequences, a.T);
  if (a.turn_counts.data)
    for (int64_t b = 0; b < a.tokens.sequences; ++b) turns[b] = a.turn_counts[b];
  if (a.reward_mask) {
    masked_returns(a, turns);
  } else {
    const PartialReturnsArgs window{a.rewards, a.segment_ids, turns.data(),     a.returns, a.tokens.sequences,
                                    a.T,       a.lookahead,   a.segment_length, a.gamma};
    partial_returns(window, 0, a.tokens.sequences);
  }
  if (a.baseline != Baseline::NONE) subtract_baseline(a, turns);
}

}  // namespace ppg::cpu
