// The only file that knows torch (with tensors.h), by its stable headers alone: checks tensors, fills the argument
// structs, shares rows out among torch's threads or launches on torch's current stream. Outputs are allocated by
// ppg_fast/native.py.
//   PPG_WITH_CUDA   the CUDA launchers are linked in
//   PPG_SOURCES     checksum of what the library is built from
//   PPG_EMULATED    test build: the CUDA launchers compiled by g++ under an emulator, registered for CPU tensors
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <type_traits>

#include "arguments.h"
#include "cpu/fused_policy_loss.h"
#include "schemas.h"

namespace {
using namespace ppg;

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
// bits do not depend on the number of threads; `least` rows are worth a thread.
template <class Args>
void run(std::type_identity_t<void (*)(const Args&, int64_t, int64_t)> on_cpu,
         std::type_identity_t<int (*)(const Args&, void*)> on_cuda, const Args& args, int64_t n, const Tensor& like,
         int64_t least = 1) {
  if (n == 0) return;
  if (on_cpu && like.is_cpu()) {
    torch::stable::parallel_for(0, n, least, [&](int64_t first, int64_t last) { on_cpu(args, first, last); });
  } else if (on_cuda && like.is_cpu()) {
    check_launch(on_cuda(args, nullptr));  // emulated
  } else {
    STD_TORCH_CHECK(on_cuda, "ppg_fast was built without CUDA");
    const int device = like.get_device_index();
    torch::stable::accelerator::DeviceGuard guard(device);
    check_launch(on_cuda(args, current_stream(device)));
  }
}

void logprobs_fwd(const Tensor& logits, const Tensor& labels, const Optional& temperatures, double temperature,
                  double logit_softcap, const Tensor& logprob, const Optional& entropy, const Tensor& lse,
                  const Optional& score_norm) {
  LogprobsFwdArgs a{sweep_of(logits, labels, temperatures, temperature, logit_softcap)};
  a.logprob = floats(logprob, a.N, "logprob");
  a.entropy = floats(entropy, a.N, "entropy");
  a.lse = floats(lse, 2 * a.N, "lse");
  a.score_norm = score_norm_of(score_norm, a.entropy, a.N);
  run(PPG_ON_CPU(logprobs_fwd), PPG_ON_CUDA(logprobs_fwd), a, a.N, logits);
}

// `upstream`: of log-prob, entropy and log-sum-exp.
void logprobs_bwd(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Optional& entropy,
                  const Tensors& upstream, const Optional& temperatures, double temperature, double logit_softcap,
                  const Tensor& dlogits) {
  LogprobsBwdArgs a{sweep_of(logits, labels, temperatures, temperature, logit_softcap)};
  a.lse = floats(lse, 2 * a.N, "lse");
  a.d_logprob = floats(upstream.at(0), a.N, "d_logprob");
  a.d_entropy = floats(upstream.at(1), a.N, "d_entropy");
  a.d_lse = floats(upstream.at(2), a.N, "d_lse");
  STD_TORCH_CHECK(a.d_logprob || a.N == 0, "the backward pass needs d_logprob");
  a.entropy = a.d_entropy ? floats(entropy, a.N, "entropy") : nullptr;
  STD_TORCH_CHECK(!a.d_entropy || a.entropy, "d_entropy needs the entropy of the forward pass");
  a.dlogits = gradient_rows(dlogits, logits);
  run(PPG_ON_CPU(logprobs_bwd), PPG_ON_CUDA(logprobs_bwd), a, a.N, logits);
}

void policy_loss(const Tensor& logits, const Tensor& labels, const Tensors& rows, const Numbers& numbers,
                 const Choices& choices, const Tensor& loss, const Tensor& logprob, const Optional& entropy,
                 const Optional& dlogits, const Optional& score_norm) {
  using namespace wire;
  STD_TORCH_CHECK(
      rows.size() == NLL_WEIGHTS + 1 && numbers.size() == LOGIT_SOFTCAP + 1 && choices.size() == IMPORTANCE_MODE + 1,
      "the lists must be as long as args.h says");
  PolicyLossArgs a{sweep_of(logits, labels, rows[TEMPERATURES], numbers[TEMPERATURE], numbers[LOGIT_SOFTCAP])};
  a.advantages = floats(rows[ADVANTAGES], a.N, "advantages");
  a.weights = floats(rows[WEIGHTS], a.N, "weights");
  a.old_logprobs = floats(rows[OLD_LOGPROBS], a.N, "old_logprobs");
  a.ref_logprobs = floats(rows[REF_LOGPROBS], a.N, "ref_logprobs");
  a.rollout_logprobs = floats(rows[ROLLOUT_LOGPROBS], a.N, "rollout_logprobs");
  a.nll_weights = floats(rows[NLL_WEIGHTS], a.N, "nll_weights");
  a.term = term_of(numbers.data(), choices.data());
  a.loss = floats(loss, a.N, "loss");
  a.logprob = floats(logprob, a.N, "logprob");
  a.entropy = floats(entropy, a.N, "entropy");
  STD_TORCH_CHECK(a.entropy || a.term.entropy_coef == 0.f, "an entropy term needs the entropy output");
  a.score_norm = score_norm_of(score_norm, a.entropy, a.N);
  a.dlogits = gradient_rows(dlogits, logits);
  run(PPG_ON_CPU(policy_loss), PPG_ON_CUDA(policy_loss), a, a.N, logits);
}

// `numbers`: temperature, softcap, the teacher's softcap, beta.
void distillation(const Tensor& logits, const Tensor& teacher_logits, const Tensor& labels, const Optional& weights,
                  const Optional& temperatures, const Numbers& numbers, const Tensor& divergence,
                  const Optional& dlogits) {
  DistillationArgs a{sweep_of(logits, labels, temperatures, numbers.at(0), numbers.at(1))};
  STD_TORCH_CHECK(teacher_logits.numel() == logits.numel() && teacher_logits.scalar_type() == logits.scalar_type(),
                  "teacher_logits must be like logits");
  a.teacher_logits = rows_of(teacher_logits, "teacher_logits");
  a.weights = floats(weights, a.N, "weights");
  a.teacher_softcap = float(numbers.at(2));
  a.beta = float(numbers.at(3));
  a.divergence = floats(divergence, a.N, "divergence");
  a.dlogits = gradient_rows(dlogits, logits);
  run(PPG_ON_CPU(distillation), PPG_ON_CUDA(distillation), a, a.N, logits);
}

// Under one scale, what has no gaps is cut into rows of equal length: a bias, or short rows, occupy the whole chip too.
void scale_rows(const Tensor& x, const Tensor& scale, const Tensor& out) {
  constexpr int64_t LENGTH = 16384;
  ScaleRowsArgs a{rows_of(x, "x"), rows_of(out, "out")};
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(1) == x.size(1) && out.size(2) == x.size(2),
                  "out must have the shape of x");
  a.N = x.size(0) * x.size(1);
  a.V = x.size(2);
  a.elements = a.N * a.V;
  a.one_scale = scale.numel() == 1;
  a.scale = floats(scale, a.one_scale ? 1 : a.N, "scale");
  a.dtype = dtype_of(x);
  a.out_dtype = dtype_of(out);
  STD_TORCH_CHECK(a.out_dtype == a.dtype || a.dtype == DType::F32, "out must have the dtype of x, or x be float32");
  if (a.one_scale && x.is_contiguous() && out.is_contiguous()) {
    a.V = LENGTH;
    a.N = (a.elements + LENGTH - 1) / LENGTH;
    a.x = {x.data_ptr(), a.N, 0, LENGTH};
    a.out = {out.data_ptr(), a.N, 0, LENGTH};
  }
  run(PPG_ON_CPU(scale_rows), PPG_ON_CUDA(scale_rows), a, a.N, x);
}

// False, having computed nothing, where a value breaks a rule; a CPU alone looks.
bool partial_returns(const Tensor& rewards, const Optional& segment_ids, const Optional& turn_counts, int64_t lookahead,
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
#ifndef PPG_EMULATED
  if (rewards.is_cpu() && !cpu::turns_are_valid(a.rewards, a.segment_ids, {a.turn_counts, true}, a.B, a.T))
    return false;
#endif
  const int64_t least = 1 + 8192 / (a.T + 1);
  run(PPG_ON_CPU(partial_returns), PPG_ON_CUDA(partial_returns), a, a.B, rewards, least);
  return true;
}

#ifndef PPG_EMULATED
// False, having computed nothing, where a value breaks a rule.
bool fused_on_cpu(const CreditArgs& c, const FusedPolicyLossArgs& a, const Tensor& logits, bool with_turns) {
  if (with_turns) {
    if (!cpu::turns_are_valid(c.rewards, c.segment_ids, c.turn_counts, c.tokens.sequences, c.T)) return false;
    cpu::credit(c);
  }
  static thread_local cpu::FusedRows rows;
  if (!rows.look_up(a, c.turn_counts)) return false;
  run(cpu::policy_loss, nullptr, rows.arguments(), a.tokens.N, logits);
  if (a.total) *a.total = rows.total();
  return true;
}
#endif

// `counts` (counted, slices) and one more, the ticket, where a GPU works. `turns`: returns and advantages (1 or 2, S,
// T). Without `total`: loss per row.
bool fused_policy_loss(const Tensor& logits, const Tensors& tensors, const Numbers& numbers, const Choices& choices,
                       const Optional& counts, int64_t counted, const Tensors& outputs) {
  using namespace wire::fused;
  STD_TORCH_CHECK(numbers.size() == SPEC_NUMBERS + int(wire::LOGIT_SOFTCAP) + 1 && outputs.size() == DLOGITS + 1 &&
                      choices.size() == SPEC_CHOICES + int(wire::IMPORTANCE_MODE) + 1,
                  "the lists must be as long as args.h says");
  const TokenArgs tokens = tokens_of(logits, tensors, choices[SEQUENCES]);
  FusedLaunchArgs both{credit_of(tokens, tensors, numbers, choices, outputs.at(TURNS)),
                       fused_of(logits, tokens, tensors, numbers, choices)};
  auto& [c, a] = both;
  a.turn_advantages = c.rewards ? c.advantages : nullptr;
  a.T = c.T;
  a.dlogits = gradient_rows(outputs[DLOGITS], logits);
  a.loss = floats(outputs[LOSS], tokens.N, "loss");
  a.logprob = floats(outputs[LOGPROB], tokens.N, "logprob");
  a.entropy = floats(outputs[Output::ENTROPY], tokens.N, "entropy");
  STD_TORCH_CHECK(a.entropy || a.term.entropy_coef == 0.f, "an entropy term needs the entropy output");
  a.score_norm = score_norm_of(outputs[Output::SCORE_NORM], a.entropy, tokens.N);
  a.total = floats(outputs[TOTAL], 1, "total");
#ifndef PPG_EMULATED
  if (logits.is_cpu()) return fused_on_cpu(c, a, logits, tensors[REWARDS].has_value());
#endif
  STD_TORCH_CHECK(counts && counts->scalar_type() == ScalarType::Int && counts->is_contiguous() &&
                      counts->numel() > counted && (counted == 0 || (counts->numel() - 1) % counted == 0),
                  "counts must be (counted * slices + 1,) int32, contiguous, for ", counted, " counted sequences");
  c.slices = a.slices = counted ? (counts->numel() - 1) / counted : 1;
  c.counted = a.counted = counted;
  c.counts = counted ? static_cast<int32_t*>(counts->data_ptr()) : nullptr;
  c.ticket = a.ticket = static_cast<uint32_t*>(counts->data_ptr()) + counts->numel() - 1;
  a.counts = c.counts;
  if (!a.total) c.ticket = nullptr;
  run(nullptr, PPG_ON_CUDA(fused_policy_loss), both, tokens.N, logits);
  return true;
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
#ifdef PPG_BUILT
  text += " " PPG_BUILT;  // csrc/sources.py reads it from the file
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

#define PPG_IMPLEMENT(m)                                      \
  m.impl("logprobs_fwd", TORCH_BOX(&logprobs_fwd));           \
  m.impl("logprobs_bwd", TORCH_BOX(&logprobs_bwd));           \
  m.impl("policy_loss", TORCH_BOX(&policy_loss));             \
  m.impl("distillation", TORCH_BOX(&distillation));           \
  m.impl("scale_rows", TORCH_BOX(&scale_rows));               \
  m.impl("fused_policy_loss", TORCH_BOX(&fused_policy_loss)); \
  m.impl("partial_returns", TORCH_BOX(&partial_returns))

PPG_EXPAND(STABLE_TORCH_LIBRARY, PPG_LIBRARY, m) {
  for (const char* schema : kSchemas) m.def(schema);
}
PPG_EXPAND(STABLE_TORCH_LIBRARY_IMPL, PPG_LIBRARY, CPU, m) {
  PPG_IMPLEMENT(m);
  m.impl("want_huge_pages", TORCH_BOX(&want_huge_pages));
}
PPG_EXPAND(STABLE_TORCH_LIBRARY_IMPL, PPG_LIBRARY, CUDA, m) { PPG_IMPLEMENT(m); }
PPG_EXPAND(STABLE_TORCH_LIBRARY_IMPL, PPG_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("build", TORCH_BOX(&build));
  m.impl("use_isa", TORCH_BOX(&use_isa));
}

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
