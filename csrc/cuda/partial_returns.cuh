// The return of one turn inside its window, for the kernels of partial_returns.cu and credit.cu.
#pragma once
#include "../args.h"
#include "hw.cuh"

namespace ppg {

// Horner's rule from the end of the window: only products and sums, since differences of prefix sums would cancel. The
// threads of one dialogue read the same rewards, mostly from L1.
__device__ __forceinline__ float windowed_return(const float* rewards, const int64_t* ids, int64_t t, int64_t turns,
                                                 int64_t lookahead, int64_t segment_length, double gamma) {
  int64_t end = lookahead < turns - t ? t + lookahead : turns;
  if (segment_length && segment_length - t % segment_length < end - t) end = t + segment_length - t % segment_length;
  if (ids && t < end) {
    int64_t k = t + 1;
    while (k < end && ids[k] == ids[t]) ++k;
    end = k;
  }
  double sum = 0.0;
  for (int64_t k = end - 1; k >= t; --k) sum = fma(gamma, sum, (double)rewards[k]);
  return (float)sum;
}

}  // namespace ppg
