// Windowed discounted returns. Mirrors ppg_fast/reference/partial_returns.py and csrc/cuda/partial_returns.cu
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../args.h"

namespace ppg::cpu {

// Linear in the number of turns whatever the window, and without a subtraction: turns are visited last to first, and
// the window [t, end) is held in two parts at a split point. Its front [t, split) is one running sum (Horner); its back
// [split, end) is looked up among prefix sums from the split. `end` never grows on the way; once it has come down to
// the split, the whole window becomes the new back. A turn enters the front once and the back once.
void partial_returns(const PartialReturnsArgs& a, int64_t first, int64_t last) {
  static thread_local std::vector<double> prefix, power;
  prefix.resize(a.T + 1);
  power.resize(a.T + 1);
  prefix[0] = 0;
  power[0] = 1;
  for (int64_t k = 1; k <= a.T; ++k) power[k] = power[k - 1] * a.gamma;
  for (int64_t b = first; b < last; ++b) {
    const float* r = a.rewards + b * a.T;
    const int64_t* segment = a.segment_ids ? a.segment_ids + b * a.T : nullptr;
    float* out = a.returns + b * a.T;
    const int64_t count = a.turn_counts ? std::min(a.turn_counts[b], a.T) : a.T;
    std::fill(out + std::max<int64_t>(count, 0), out + a.T, 0.f);
    double front = 0;  // of [t, split)
    int64_t split = count, segment_end = count;
    for (int64_t t = count - 1; t >= 0; --t) {
      if (segment && t + 1 < count && segment[t] != segment[t + 1]) segment_end = t + 1;
      int64_t end = std::min(segment_end, a.lookahead < count - t ? t + a.lookahead : count);
      if (a.segment_length) end = std::min(end, (t / a.segment_length + 1) * a.segment_length);
      if (end <= split) {  // the back is used up: the whole window becomes the new back
        split = t;
        front = 0;
        double sum = 0;
        for (int64_t k = t; k < end; ++k) prefix[k + 1 - t] = sum += power[k - t] * r[k];
      } else {
        front = r[t] + a.gamma * front;
      }
      out[t] = float(front + power[split - t] * prefix[end - split]);
    }
  }
}

}  // namespace ppg::cpu
