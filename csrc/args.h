// The arguments of every launcher, in the order of ppg_fast/reference/*.py. Raw pointers only: no torch, no CUDA here.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PPG_HD __host__ __device__ __forceinline__
#else
#define PPG_HD inline
#endif

namespace ppg {

enum class DType : int { F32 = 0, BF16 = 1, F16 = 2 };
enum class LossType : int { REINFORCE = 0, PPO = 1, CISPO = 2, GSPO = 3, GSPO_TURN = 4 };
enum class KLEstimator : int { K1 = 1, K2 = 2, K3 = 3 };

// A (B, L, V) tensor with unit stride along V, seen as B * L rows, so that a view such as logits[:, :-1] needs no copy.
struct Rows {
  void* data;
  int64_t length;                    // L
  int64_t batch_stride, row_stride;  // in elements
  PPG_HD int64_t offset(int64_t n) const { return n / length * batch_stride + n % length * row_stride; }
};

// What every sweep over the vocabulary reads. A row whose label is negative is masked: it is not read.
struct Sweep {
  Rows logits;
  const int64_t* labels;      // (N,)
  const float* temperatures;  // (N,) or null: `temperature` for every row
  int64_t N, V;
  DType dtype;
  float temperature, logit_softcap;  // softcap 0: off
};

struct LogprobsFwdArgs : Sweep {
  float *logprob, *entropy, *lse;  // (N,) out; entropy may be null; masked rows get 0
};

// dlogits = g (1[v = label] - p) - h p (log p + H), through temperature and softcap. Rows with g = h = 0 are not read and get zeros.
struct LogprobsBwdArgs : Sweep {
  const float *lse, *entropy, *d_logprob, *d_entropy;  // (N,); d_entropy (then also entropy) may be null
  Rows dlogits;                                        // may be the logits themselves
};

// The numbers of the scalar loss, see policy_term.h.
struct TermArgs {
  LossType loss_type;
  KLEstimator kl_estimator;
  float clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap;
  PPG_HD bool needs_every_row() const { return kl_coef != 0.f || entropy_coef != 0.f; }
};

// One read of the logits, one write of dlogits. A row is
//   SKIP          label < 0: not read, zeros out
//   FULL          a gradient is wanted and advantage != 0 or a KL or entropy term is on
//   FORWARD-ONLY  else: loss, log-prob and entropy; its gradient row is zero
struct PolicyLossArgs : Sweep {
  const float *advantages, *weights;                            // (N,); weights may be null: 1
  const float *old_logprobs, *ref_logprobs, *rollout_logprobs;  // (N,) or null: on-policy, no reference, no sampler mismatch
  TermArgs term;
  float *loss, *logprob, *entropy;  // (N,) out; loss already weighted; entropy may be null unless entropy_coef != 0
  Rows dlogits;                     // data null: no gradient wanted; may be the logits themselves
};

// Multiplies row n of dlogits by scale[n]; rows whose scale is 1 are not touched.
struct RescaleRowsArgs {
  Rows dlogits;
  const float* scale;  // (N,)
  int64_t N, V;
  DType dtype;
};

// returns[b, t] = sum of gamma^(k-t) rewards[b, k] over k = t .. end - 1; end = the smallest of t + lookahead, the end of t's segment
// and the end of the dialogue. Zero beyond the dialogue, whatever the rewards hold there.
struct PartialReturnsArgs {
  const float* rewards;                     // (B, T)
  const int64_t* segment_ids;               // (B, T) or null
  const int64_t* turn_counts;               // (B,) or null: T
  float* returns;                           // (B, T) out
  int64_t B, T, lookahead, segment_length;  // segment_length 0: segments, if any, by ids
  double gamma;
};

// Every launcher returns 0 or an error code of its platform.
namespace cpu {  // rows first .. last - 1 only, so that the caller shares them out among its threads
void logprobs_fwd(const LogprobsFwdArgs&, int64_t first, int64_t last);
void logprobs_bwd(const LogprobsBwdArgs&, int64_t first, int64_t last);
void policy_loss(const PolicyLossArgs&, int64_t first, int64_t last);
void rescale_rows(const RescaleRowsArgs&, int64_t first, int64_t last);
void partial_returns(const PartialReturnsArgs&, int64_t first, int64_t last);
void want_huge_pages(void* data, int64_t bytes);
const char* isa();               // "avx512", "avx2" or "baseline": what the run-time dispatch chose
bool use_isa(const char* name);  // chooses another one; false if the processor lacks it
}  // namespace cpu
namespace cuda {
int logprobs_fwd(const LogprobsFwdArgs&, void* stream);
int logprobs_bwd(const LogprobsBwdArgs&, void* stream);
int policy_loss(const PolicyLossArgs&, void* stream);
int rescale_rows(const RescaleRowsArgs&, void* stream);
int partial_returns(const PartialReturnsArgs&, void* stream);
const char* error_string(int);
}  // namespace cuda

}  // namespace ppg
