// The only file that knows torch (with tensors.h), by its stable headers alone: checks tensors, fills the argument
// structs, shares rows out among torch's threads or launches on torch's current stream. Outputs are allocated by
// ppg_fast/native.py.
//   PPG_WITH_CUDA   the CUDA launchers are linked in
//   PPG_EMULATED    test build: the CUDA launchers compiled by g++ under an emulator, registered for CPU tensors
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>

#include "schemas.h"
#include "tensors.h"

namespace {
using namespace ppg;

Sweep sweep_of(const Tensor& logits, const Tensor& labels, const Optional& temperatures, double temperature,
               double logit_softcap) {
  Sweep s;
  s.logits = rows_of(logits, "logits");
  s.N = logits.size(0) * logits.size(1);
  s.V = logits.size(2);
  s.labels = per_row<int64_t>(labels, s.N, ScalarType::Long, "labels");
  s.temperatures = floats(temperatures, s.N, "temperatures");
  s.dtype = dtype_of(logits);
  s.temperature = float(temperature);
  s.logit_softcap = float(logit_softcap);
  return s;
}

#ifdef PPG_EMULATED
#define PPG_ON_CPU(op) nullptr
#else
#define PPG_ON_CPU(op) cpu::op
#endif
#if defined(PPG_WITH_CUDA) || defined(PPG_EMULATED)
#define PPG_ON_CUDA(op) cuda::op
void check_launch(int error) { STD_TORCH_CHECK(error == 0, "kernel launch failed: ", cuda::error_string(error)); }
#else
#define PPG_ON_CUDA(op) nullptr
void check_launch(int) {}
#endif

// In libtorch_cuda.so, which a CPU-only torch lacks: looked up at run time, so that one extension serves both.
void* current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == AOTI_TORCH_SUCCESS, "torch gave no stream of device ", device);
  return stream;
}

// Runs one op on the device of `like`. On a CPU the n rows are cut by index, a whole row by one thread, so that the
// bits do not depend on the number of threads.
template <class Args>
void run(std::type_identity_t<void (*)(const Args&, int64_t, int64_t)> on_cpu,
         std::type_identity_t<int (*)(const Args&, void*)> on_cuda, const Args& args, int64_t n, const Tensor& like) {
  if (n == 0) return;
  if (on_cpu && like.is_cpu()) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) { on_cpu(args, first, last); });
  } else if (on_cuda && like.is_cpu()) {
    check_launch(on_cuda(args, nullptr));  // emulated
  } else {
    STD_TORCH_CHECK(on_cuda, "ppg_fast was built without CUDA");
    const int device = like.get_device_index();
    torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(on_cuda(args, current_stream(device)));
  }
}

TermArgs term_of(int64_t loss_type, int64_t kl_estimator, double clip_low, double clip_high, double dual_clip,
                 double kl_coef, double entropy_coef, double importance_cap) {
  return {LossType(loss_type), KLEstimator(kl_estimator), float(clip_low),      float(clip_high), float(dual_clip),
          float(kl_coef),      float(entropy_coef),       float(importance_cap)};
}

void logprobs_fwd(const Tensor& logits, const Tensor& labels, const Optional& temperatures, double temperature,
                  double logit_softcap, const Tensor& logprob, const Optional& entropy, const Tensor& lse,
                  const Optional& score_norm) {
  LogprobsFwdArgs a{sweep_of(logits, labels, temperatures, temperature, logit_softcap)};
  a.logprob = floats(logprob, a.N, "logprob");
  a.entropy = floats(entropy, a.N, "entropy");
  a.lse = floats(lse, a.N, "lse");
  a.score_norm = score_norm_of(score_norm, a.entropy, a.N);
  run(PPG_ON_CPU(logprobs_fwd), PPG_ON_CUDA(logprobs_fwd), a, a.N, logits);
}

void logprobs_bwd(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Optional& entropy,
                  const Tensor& d_logprob, const Optional& d_entropy, const Optional& temperatures, double temperature,
                  double logit_softcap, const Tensor& dlogits) {
  LogprobsBwdArgs a{sweep_of(logits, labels, temperatures, temperature, logit_softcap)};
  a.lse = floats(lse, a.N, "lse");
  a.d_logprob = floats(d_logprob, a.N, "d_logprob");
  a.d_entropy = floats(d_entropy, a.N, "d_entropy");
  a.entropy = d_entropy ? floats(entropy, a.N, "entropy") : nullptr;
  STD_TORCH_CHECK(!a.d_entropy || a.entropy, "d_entropy needs the entropy of the forward pass");
  a.dlogits = gradient_rows(dlogits, logits);
  run(PPG_ON_CPU(logprobs_bwd), PPG_ON_CUDA(logprobs_bwd), a, a.N, logits);
}

void policy_loss(const Tensor& logits, const Tensor& labels, const Tensor& advantages, const Optional& weights,
                 const Optional& old_logprobs, const Optional& ref_logprobs, const Optional& rollout_logprobs,
                 const Optional& temperatures, int64_t loss_type, int64_t kl_estimator, double clip_low,
                 double clip_high, double dual_clip, double kl_coef, double entropy_coef, double importance_cap,
                 double temperature, double logit_softcap, const Tensor& loss, const Tensor& logprob,
                 const Optional& entropy, const Optional& dlogits, const Optional& score_norm) {
  PolicyLossArgs a{sweep_of(logits, labels, temperatures, temperature, logit_softcap)};
  a.advantages = floats(advantages, a.N, "advantages");
  a.weights = floats(weights, a.N, "weights");
  a.old_logprobs = floats(old_logprobs, a.N, "old_logprobs");
  a.ref_logprobs = floats(ref_logprobs, a.N, "ref_logprobs");
  a.rollout_logprobs = floats(rollout_logprobs, a.N, "rollout_logprobs");
  a.term = term_of(loss_type, kl_estimator, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap);
  a.loss = floats(loss, a.N, "loss");
  a.logprob = floats(logprob, a.N, "logprob");
  a.entropy = floats(entropy, a.N, "entropy");
  STD_TORCH_CHECK(a.entropy || a.term.entropy_coef == 0.f, "an entropy term needs the entropy output");
  a.score_norm = score_norm_of(score_norm, a.entropy, a.N);
  a.dlogits = gradient_rows(dlogits, logits);
  run(PPG_ON_CPU(policy_loss), PPG_ON_CUDA(policy_loss), a, a.N, logits);
}

void rescale_rows(const Tensor& dlogits, const Tensor& scale) {
  RescaleRowsArgs a{rows_of(dlogits, "dlogits")};
  a.N = dlogits.size(0) * dlogits.size(1);
  a.V = dlogits.size(2);
  a.scale = floats(scale, scale.numel() == 1 ? 1 : a.N, "scale");
  a.dtype = dtype_of(dlogits);
  a.one_scale = scale.numel() == 1;
  run(PPG_ON_CPU(rescale_rows), PPG_ON_CUDA(rescale_rows), a, a.N, dlogits);
}

void partial_returns(const Tensor& rewards, const Optional& segment_ids, const Optional& turn_counts, int64_t lookahead,
                     int64_t segment_length, double gamma, const Tensor& returns) {
  STD_TORCH_CHECK(rewards.dim() == 2, "rewards must be (B, T), got ", rewards.dim(), " dimensions");
  PartialReturnsArgs a{};
  a.B = rewards.size(0);
  a.T = rewards.size(1);
  a.rewards = floats(rewards, a.B * a.T, "rewards");
  a.segment_ids = longs(segment_ids, a.B * a.T, "segment_ids");
  a.turn_counts = longs(turn_counts, a.B, "turn_counts");
  a.returns = floats(returns, a.B * a.T, "returns");
  a.lookahead = lookahead;
  a.segment_length = segment_length;
  a.gamma = gamma;
  run(PPG_ON_CPU(partial_returns), PPG_ON_CUDA(partial_returns), a, a.B, rewards);
}

// `work`: counts (counted, slices) and behind them the ticket. `turns`: returns and advantages (1 or 2, S, T). `total`
// without: loss per row.
void fused_policy_loss(const Tensor& logits, const Tensor& labels, const Optional& loss_mask, const Optional& turn_ids,
                       const Optional& advantages, const Optional& old_logprobs, const Optional& ref_logprobs,
                       const Optional& rollout_logprobs, const Optional& temperatures, const Optional& rewards,
                       const Optional& turn_counts, const Optional& segment_ids, const Optional& reward_mask,
                       const Optional& group_ids, int64_t lookahead, int64_t segment_length, double gamma,
                       int64_t baseline, double std_eps, int64_t reduction, double normalizer,
                       const Optional& normalizer_at, int64_t sequences, const Optional& cu_seqlens, int64_t counted,
                       int64_t slices, bool skip_zero_advantages, int64_t loss_type, int64_t kl_estimator,
                       double clip_low, double clip_high, double dual_clip, double kl_coef, double entropy_coef,
                       double importance_cap, double temperature, double logit_softcap, const Optional& turns,
                       const Tensor& work, const Tensor& loss, const Optional& total, const Tensor& logprob,
                       const Optional& entropy, const Optional& dlogits, const Optional& score_norm) {
  CreditArgs c{};
  TokenArgs& t = c.tokens;
  const Rows rows = rows_of(logits, "logits");
  t.labels = column(labels, logits, ScalarType::Long, "labels");
  t.loss_mask = column(loss_mask, logits, {}, "loss_mask");
  t.turn_ids = column(turn_ids, logits, {}, "turn_ids");
  STD_TORCH_CHECK(!turn_ids || ((t.turn_ids.bytes == 4 || t.turn_ids.bytes == 8) && !t.turn_ids.floating),
                  "turn_ids must be int32 or int64");
  t.N = logits.size(0) * logits.size(1);
  t.length = rows.length;
  t.sequences = sequences;
  t.cu_seqlens = ints(cu_seqlens, sequences + 1, "cu_seqlens");
  STD_TORCH_CHECK(t.N == 0 || (sequences >= 1 && (cu_seqlens || t.N % sequences == 0)), "rows do not make ", sequences,
                  " sequences");
  STD_TORCH_CHECK(work.scalar_type() == ScalarType::Int && work.is_contiguous() && work.numel() == counted * slices + 1,
                  "work is amiss");
  c.ticket = static_cast<uint32_t*>(work.data_ptr()) + counted * slices;
  c.counts = counted ? static_cast<int32_t*>(work.data_ptr()) : nullptr;
  c.counted = counted;
  c.slices = slices;
  if (rewards) {
    STD_TORCH_CHECK(turn_ids && turns && rewards->dim() == 2 && rewards->size(0) == sequences,
                    "rewards (S, T) go with turn_ids and turns");
    c.T = rewards->size(1);
    c.baseline = Baseline(baseline);
    const int64_t size = sequences * c.T;
    c.rewards = floats(rewards, size, "rewards");
    c.segment_ids = longs(segment_ids, size, "segment_ids");
    c.reward_mask = reward_mask ? per_row<uint8_t>(*reward_mask, c.T * c.T, ScalarType::Bool, "reward_mask") : nullptr;
    c.turn_counts = ints(turn_counts, sequences, "turn_counts");
    c.group_ids = ints(group_ids, sequences, "group_ids");
    c.returns = floats(turns, size * (c.baseline == Baseline::NONE ? 1 : 2), "turns");
    c.advantages = c.baseline == Baseline::NONE ? c.returns : c.returns + size;
    c.lookahead = lookahead;
    c.segment_length = segment_length;
    c.gamma = gamma;
    c.std_eps = std_eps;
  }
  FusedPolicyLossArgs a{};
  a.tokens = t;
  a.logits = rows;
  a.dlogits = gradient_rows(dlogits, logits);
  a.V = logits.size(2);
  a.dtype = dtype_of(logits);
  a.temperature = float(temperature);
  a.logit_softcap = float(logit_softcap);
  a.advantages = column(advantages, logits, ScalarType::Float, "advantages");
  a.old_logprobs = column(old_logprobs, logits, ScalarType::Float, "old_logprobs");
  a.ref_logprobs = column(ref_logprobs, logits, ScalarType::Float, "ref_logprobs");
  a.rollout_logprobs = column(rollout_logprobs, logits, ScalarType::Float, "rollout_logprobs");
  a.temperatures = column(temperatures, logits, ScalarType::Float, "temperatures");
  a.turn_advantages = rewards ? c.advantages : nullptr;
  a.T = c.T;
  a.term = term_of(loss_type, kl_estimator, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap);
  a.reduction = Reduction(reduction);
  a.skip_zero_advantages = skip_zero_advantages;
  a.normalizer = float(normalizer);
  a.normalizer_at = floats(normalizer_at, 1, "normalizer");
  a.counts = c.counts;
  a.counted = counted;
  a.slices = slices;
  a.loss = floats(loss, t.N, "loss");
  a.logprob = floats(logprob, t.N, "logprob");
  a.entropy = floats(entropy, t.N, "entropy");
  STD_TORCH_CHECK(a.entropy || a.term.entropy_coef == 0.f, "an entropy term needs the entropy output");
  a.score_norm = score_norm_of(score_norm, a.entropy, t.N);
  a.total = floats(total, 1, "total");
  a.ticket = c.ticket;
  if (!a.total) c.ticket = nullptr;
  run(nullptr, PPG_ON_CUDA(credit), c, t.N, logits);
  run(nullptr, PPG_ON_CUDA(fused_policy_loss), a, t.N, logits);
}

void want_huge_pages(const Tensor& memory) {
#ifndef PPG_EMULATED
  cpu::want_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size());
#else
  (void)memory;
#endif
}

std::string build() {
  std::string text;
#ifndef PPG_EMULATED
  text = std::string("isa=") + cpu::isa();
#endif
#ifdef PPG_WITH_CUDA
  text += " cuda";
#endif
  return text;
}

bool use_isa(std::string name) {
#ifdef PPG_EMULATED
  return name.empty();
#else
  return cpu::use_isa(name.c_str());
#endif
}

}  // namespace

#ifdef PPG_EMULATED
#define PPG_LIBRARY ppg_fast_emulated
#else
#define PPG_LIBRARY ppg_fast_native
#endif
#define PPG_EXPAND(macro, ...) macro(__VA_ARGS__)

#define PPG_IMPLEMENT(m)                            \
  m.impl("logprobs_fwd", TORCH_BOX(&logprobs_fwd)); \
  m.impl("logprobs_bwd", TORCH_BOX(&logprobs_bwd)); \
  m.impl("policy_loss", TORCH_BOX(&policy_loss));   \
  m.impl("rescale_rows", TORCH_BOX(&rescale_rows)); \
  m.impl("partial_returns", TORCH_BOX(&partial_returns))

PPG_EXPAND(STABLE_TORCH_LIBRARY, PPG_LIBRARY, m) {
  for (const char* schema : kSchemas) m.def(schema);
}
PPG_EXPAND(STABLE_TORCH_LIBRARY_IMPL, PPG_LIBRARY, CPU, m) {
  PPG_IMPLEMENT(m);
#ifdef PPG_EMULATED
  m.impl("fused_policy_loss", TORCH_BOX(&fused_policy_loss));
#endif
  m.impl("want_huge_pages", TORCH_BOX(&want_huge_pages));
}
PPG_EXPAND(STABLE_TORCH_LIBRARY_IMPL, PPG_LIBRARY, CUDA, m) {
  PPG_IMPLEMENT(m);
  m.impl("fused_policy_loss", TORCH_BOX(&fused_policy_loss));
}
PPG_EXPAND(STABLE_TORCH_LIBRARY_IMPL, PPG_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("build", TORCH_BOX(&build));
  m.impl("use_isa", TORCH_BOX(&use_isa));
}

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
