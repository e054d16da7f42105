// The arguments of every launcher, in the order of ppg_fast/reference/*.py. Raw pointers only: no torch, no CUDA here.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PPG_HD __host__ __device__ __forceinline__
#define PPG_APART inline __host__ __device__ __noinline__  // so that its registers are not those of its caller
#else
#define PPG_HD inline
#define PPG_APART inline
#endif

namespace ppg {

enum class DType : int { F32 = 0, BF16 = 1, F16 = 2 };
// clang-format off
enum class LossType : int {
  REINFORCE = 0, PPO = 1, CISPO = 2, GSPO = 3, GSPO_TURN = 4, IPO = 5, ICEPOP = 6, DPPO_TV = 7, DPPO_KL = 8, SAPO = 9,
  TOPR = 10, GMPO = 11, GMPO_TURN = 12, VESPO = 13
};
// clang-format on
enum class KLEstimator : int { K1 = 1, K2 = 2, K3 = 3, K3_UNBIASED = 4, K3_PLUS = 5, ABS = 6 };
enum class ImportanceMode : int { TRUNCATE = 0, MASK = 1 };
enum class NanRollout : int { KEEP = 0, ERROR = 1, ONE = 2, DROP = 3 };  // the kernels know ONE, else NaN is kept
enum class Baseline : int { NONE = 0, LEAVE_ONE_OUT = 1, GROUP_MEAN = 2, GROUP_STD = 3 };
enum class Reduction : int { TOKEN_MEAN = 0, SEQUENCE_MEAN = 1, SEQUENCE_SUM = 2, SUM = 3, NONE = 4 };
// The lists that a policy loss travels as, in the order of ppg_fast/contract.py. The spec's numbers and choices come
// last among the fused loss's, and are all there is of the row kernel's.
namespace wire {
enum PerRow { ADVANTAGES, WEIGHTS, OLD_LOGPROBS, REF_LOGPROBS, ROLLOUT_LOGPROBS, TEMPERATURES, NLL_WEIGHTS };
// clang-format off
enum Number {
  CLIP_LOW, CLIP_HIGH, DUAL_CLIP, RATIO_CAP, TAU_POSITIVE, TAU_NEGATIVE, LOG_RATIO_COEF, KL_COEF, KL_CAP, ENTROPY_COEF,
  Z_COEF, IMPORTANCE_FLOOR, IMPORTANCE_CAP, MAX_LOG_RATIO, TEMPERATURE, LOGIT_SOFTCAP
};
// clang-format on
enum Choice { LOSS_TYPE, KL_ESTIMATOR, NAN_ROLLOUT, IMPORTANCE_MODE };
namespace fused {
// clang-format off
enum Tensor {
  LABELS, LOSS_MASK, TURN_IDS, ADVANTAGES, OLD_LOGPROBS, REF_LOGPROBS, ROLLOUT_LOGPROBS, TEMPERATURES,
  NLL_WEIGHTS, REWARDS, TURN_COUNTS, SEGMENT_IDS, REWARD_MASK, GROUP_IDS, NORMALIZER_AT, CU_SEQLENS
};
enum Number { GAMMA, STD_EPS, NORMALIZER, SPEC_NUMBERS };
enum Choice { LOOKAHEAD, SEGMENT_LENGTH, BASELINE, REDUCTION, SEQUENCES, SKIP_ZERO_ADVANTAGES, SPEC_CHOICES };
enum Output { TURNS, LOSS, TOTAL, LOGPROB, ENTROPY, SCORE_NORM, DLOGITS };
// clang-format on
}  // namespace fused
}  // namespace wire

enum Sums {
  PLAIN,
  ENTROPY,
  SCORE_NORM
};  // what is added up over a row beside the exponentials; each has the one before too

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
  float *logprob, *entropy;  // (N,) out; entropy may be null; masked rows get 0
  // (N, 2) out, what the backward pass starts from: the row's maximum before the temperature and sum exp(z - max z);
  // apart, because log-sum-exp in one float has no digits left for p where all logits are far from 0
  float* lse;
  float* score_norm;  // (N,) out or null, then entropy is not: |d logprob / d z|^2 = sum p^2 - 2 p_label + 1
};

// dlogits = g (1[v = label] - p) - h p (log p + H) + d_lse p, through temperature and softcap. Rows with g = h = d_lse
// = 0 are not read and get zeros.
struct LogprobsBwdArgs : Sweep {
  const float *lse, *entropy, *d_logprob, *d_entropy;  // (N, 2), else (N,); d_entropy (then also entropy) may be null
  const float* d_lse;                                  // (N,) of the log-sum-exp, or null: 0
  Rows dlogits;                                        // may be the logits themselves
};

// The numbers of the scalar loss, see policy_term.h.
struct TermArgs {
  LossType loss_type;
  KLEstimator kl_estimator;
  NanRollout nan_rollout;
  ImportanceMode importance_mode;
  float clip_low, clip_high, dual_clip, ratio_cap, tau_positive, tau_negative;
  float log_ratio_coef, kl_coef, kl_cap, entropy_coef, z_coef;
  float importance_floor, importance_cap, max_log_ratio;
  PPG_HD bool needs_every_row() const {
    return kl_coef != 0.f || entropy_coef != 0.f || log_ratio_coef != 0.f || z_coef != 0.f;
  }
  PPG_HD bool weighs_importance() const { return importance_floor != 0.f || importance_cap != 0.f; }
};

// One read of the logits, one write of dlogits. A row is
//   SKIP          label < 0: not read, zeros out
//   FULL          a gradient is wanted and its advantage or nll weight is not 0, or a term is on that every row has
//   FORWARD-ONLY  else: loss, log-prob and entropy; its gradient row is zero
struct PolicyLossArgs : Sweep {
  const float *advantages, *weights;  // (N,); weights may be null: 1
  const float *old_logprobs, *ref_logprobs,
      *rollout_logprobs;     // (N,) or null: on-policy, no reference, no sampler mismatch
  const float* nll_weights;  // (N,) of -logprob, beside `weights`, or null: 0
  TermArgs term;
  float *loss, *logprob, *entropy;  // (N,) out; loss already weighted; entropy may be null unless entropy_coef != 0
  float* score_norm;  // (N,) out or null, then entropy is not: |d logprob / d z|^2 = sum p^2 - 2 p_label + 1
  Rows dlogits;       // data null: no gradient wanted; may be the logits themselves
  // Whether row n has a gradient, if one is wanted and it is not masked.
  PPG_HD bool live(int64_t n) const {
    return advantages[n] != 0.f || (nll_weights && nll_weights[n] != 0.f) || term.needs_every_row();
  }
};

// How far a teacher's distribution q is from the student's p, by `beta`: 0 KL(q, p), 1 KL(p, q), between beta KL(q, m)
// + (1 - beta) KL(p, m). Rows that are masked or have weight 0 are not read, of neither side, and get zeros.
struct DistillationArgs : Sweep {
  Rows teacher_logits;
  const float* weights;  // (N,) or null: 1
  float beta, teacher_softcap;
  float* divergence;  // (N,) out, not weighted
  Rows dlogits;       // data null: no gradient wanted; may be the logits or the teacher's
};

// out = x times scale[n] in row n, rounded once. In place, rows whose scale is 1 are not touched.
struct ScaleRowsArgs {
  Rows x, out;         // out may be x itself
  const float* scale;  // (N,), or (1,) for all rows
  int64_t N, V;
  int64_t elements;        // N V, or less where the last row is shorter
  DType dtype, out_dtype;  // the same, or from F32
  bool one_scale;
  PPG_HD bool in_place() const { return x.data == out.data; }
  PPG_HD int64_t length(int64_t n) const {
    const int64_t left = elements - n * V;
    return left < V ? left : V;
  }
};

// returns[b, t] = sum of gamma^(k-t) rewards[b, k] over k = t .. end - 1; end = the smallest of t + lookahead, the end
// of t's segment and the end of the dialogue. Zero beyond the dialogue, whatever the rewards hold there.
struct PartialReturnsArgs {
  const float* rewards;                     // (B, T)
  const int64_t* segment_ids;               // (B, T) or null
  const int64_t* turn_counts;               // (B,) or null: T
  float* returns;                           // (B, T) out
  int64_t B, T, lookahead, segment_length;  // segment_length 0: segments, if any, by ids
  double gamma;
};

// Integers as the caller holds them: int32 or int64, null where absent.
struct Ints {
  const void* data;
  bool wide;
  PPG_HD int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// One value a token as the caller holds it: (B, L) of any strides, null where absent.
struct Column {
  const void* data;
  int64_t batch_stride, row_stride;  // in elements
  int bytes;                         // of an element
  bool floating;
  PPG_HD int64_t at(int64_t b, int64_t l) const { return b * batch_stride + l * row_stride; }
  PPG_HD float number(int64_t b, int64_t l) const { return static_cast<const float*>(data)[at(b, l)]; }
  PPG_HD int64_t integer(int64_t b, int64_t l) const { return Ints{data, bytes == 8}[at(b, l)]; }
  PPG_HD uint64_t bits(int64_t b, int64_t l) const {  // of any dtype
    const int64_t i = at(b, l);
    switch (bytes) {
      case 1: return static_cast<const uint8_t*>(data)[i];
      case 2: return static_cast<const uint16_t*>(data)[i];
      case 4: return static_cast<const uint32_t*>(data)[i];
      default: return static_cast<const uint64_t*>(data)[i];
    }
  }
  PPG_HD bool negative(uint64_t bits) const { return int64_t(bits << (64 - 8 * bytes)) < 0; }
  PPG_HD bool nonzero(uint64_t bits) const {  // the sign of a floating zero is shifted out
    return bits << (64 - 8 * bytes + floating) != 0;
  }
  PPG_HD bool nonzero(int64_t b, int64_t l) const { return nonzero(bits(b, l)); }
};

// Which tokens take part and which sequence each belongs to, from what the caller holds. Row n = b * length + l of N <
// 2^31.
struct TokenArgs {
  Column labels, loss_mask,
      turn_ids;  // int64; any dtype or null; int32, int64 or null. Negative labels and turn ids, mask 0: masked
  int64_t N, length;
  Ints cu_seqlens;    // (sequences + 1,), or null: sequences of N / sequences rows
  int64_t sequences;  // S
  struct Bits {
    uint64_t label, loss_mask, turn_id;
  };
  // All that `active` asks of a token, apart from the answer, so that no load waits for the value of another.
  PPG_HD Bits bits(int64_t b, int64_t l) const {
    return {labels.bits(b, l), loss_mask.data ? loss_mask.bits(b, l) : 0, turn_ids.data ? turn_ids.bits(b, l) : 0};
  }
  PPG_HD bool active(const Bits& token) const {
    return !labels.negative(token.label) && (!loss_mask.data || loss_mask.nonzero(token.loss_mask)) &&
           (!turn_ids.data || !turn_ids.negative(token.turn_id));
  }
};

// What the sweep of the fused loss needs to know of other rows, in one launch before it: the advantage of every turn,
// and how many active tokens there are. Counts are of whole sequences under the sequence reductions, else of the batch
// as one; each in `slices` parts.
struct CreditArgs {
  TokenArgs tokens;
  const float* rewards;         // (S, T), or null: no turns
  const int64_t* segment_ids;   // (S, T) or null
  const uint8_t* reward_mask;   // (T, T) or null: the window
  Ints turn_counts, group_ids;  // (S,) or null
  int64_t T, lookahead, segment_length;
  double gamma, std_eps;
  Baseline baseline;
  float *returns, *advantages;  // (S, T) out, one and the same for Baseline::NONE
  int32_t* counts;              // (counted, slices) out, or null
  int64_t counted, slices;      // `counted` sequences: S, or 1 for the batch as one
  uint32_t* ticket;             // out: 0, for the sweep
};

// The sweep of the fused loss: rows are looked up in what the caller holds, weighted by the reduction, and their losses
// summed.
struct FusedPolicyLossArgs {
  TokenArgs tokens;
  Rows logits, dlogits;  // dlogits: data null: no gradient wanted; may be the logits themselves
  int64_t V;
  DType dtype;
  float temperature, logit_softcap;
  Column advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures,
      nll_weights;               // float32 or null
  const float* turn_advantages;  // (S, T), in place of `advantages` where given
  int64_t T;
  TermArgs term;
  Reduction reduction;
  bool skip_zero_advantages;
  float normalizer;            // the outer denominator, or 0: `normalizer_at`, else counted
  const float* normalizer_at;  // or null
  const int32_t* counts;       // as CreditArgs left them; null where they are not needed
  int64_t counted, slices;
  float *loss, *logprob, *entropy;  // (N,) out; loss already weighted; entropy may be null unless entropy_coef != 0
  float* score_norm;                // (N,) out or null, as above
  float* total;                     // out: sum of the losses in an order of their own, or null
  uint32_t* ticket;                 // 0; who draws the last one sums
};

// Both launches of the fused loss on a GPU.
struct FusedLaunchArgs {
  CreditArgs credit;
  FusedPolicyLossArgs sweep;
};

// Every launcher returns 0 or an error code of its platform.
namespace cpu {  // rows first .. last - 1 only, so that the caller shares them out among its threads
void logprobs_fwd(const LogprobsFwdArgs&, int64_t first, int64_t last);
void logprobs_bwd(const LogprobsBwdArgs&, int64_t first, int64_t last);
void policy_loss(const PolicyLossArgs&, int64_t first, int64_t last);
void distillation(const DistillationArgs&, int64_t first, int64_t last);
void scale_rows(const ScaleRowsArgs&, int64_t first, int64_t last);
void partial_returns(const PartialReturnsArgs&, int64_t first, int64_t last);
void credit(const CreditArgs&);  // all turns at once; of the tokens only the number of sequences is read
bool turns_are_valid(const float* rewards, const int64_t* segment_ids, const Ints& turn_counts, int64_t B, int64_t T);
void want_huge_pages(void* data, int64_t bytes);
const char* isa();               // "avx512", "avx2" or "baseline": what the run-time dispatch chose
bool use_isa(const char* name);  // chooses another one; false if the processor lacks it
}  // namespace cpu
namespace cuda {
int logprobs_fwd(const LogprobsFwdArgs&, void* stream);
int logprobs_bwd(const LogprobsBwdArgs&, void* stream);
int policy_loss(const PolicyLossArgs&, void* stream);
int distillation(const DistillationArgs&, void* stream);
int scale_rows(const ScaleRowsArgs&, void* stream);
int partial_returns(const PartialReturnsArgs&, void* stream);
int fused_policy_loss(const FusedLaunchArgs&, void* stream);
const char* error_string(int);
}  // namespace cuda

}  // namespace ppg
