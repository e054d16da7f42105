// The fused loss on a CPU: rows as the row kernel takes them, looked up in what the caller holds.
#pragma once
#include <vector>

#include "../args.h"

namespace ppg::cpu {

// Memory of the rows of one call, and the arguments that point into it.
class FusedRows {
 public:
  // False, having written nothing, where a value breaks a rule. `a.turn_advantages` are there already.
  bool look_up(const FusedPolicyLossArgs& a, const Ints& turn_counts);
  const PolicyLossArgs& arguments() const { return rows; }
  float total() const;  // of the losses, in the order of the rows

 private:
  const float* gather(const Column& column, const TokenArgs& tokens, std::vector<float>& memory);
  PolicyLossArgs rows;
  std::vector<int64_t> labels, sequences;
  std::vector<float> losses, advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures,
      nll_weights;
};

}  // namespace ppg::cpu
