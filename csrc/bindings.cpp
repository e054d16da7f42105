// The only file that knows torch, by its stable headers alone: checks tensors, fills the argument structs, shares rows out among
// torch's threads or launches on torch's current stream. Outputs are allocated by ppg_fast/native.py.
//   PPG_WITH_CUDA   the CUDA launchers are linked in
//   PPG_EMULATED    test build: the CUDA launchers compiled by g++ under an emulator, registered for CPU tensors
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <type_traits>

#include "args.h"

namespace {
using namespace ppg;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::F32;
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16"); return DType::F32;
  }
}

Rows rows_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, name, " must be (B, L, V), got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(2) == 1 || t.stride(2) == 1, name, " must have unit stride along V, got ", t.stride(2));
  return {t.data_ptr(), t.size(1) ? t.size(1) : 1, t.stride(0), t.stride(1)};
}

template <class T> T* per_row(const Tensor& t, int64_t N, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == N, name, " must be contiguous of ", N, " elements, got ", t.numel());
  return static_cast<T*>(t.data_ptr());
}
float* floats(const Tensor& t, int64_t N, const char* name) { return per_row<float>(t, N, ScalarType::Float, name); }
float* floats(const Optional& t, int64_t N, const char* name) { return t ? floats(*t, N, name) : nullptr; }
const int64_t* longs(const Optional& t, int64_t N, const char* name) {
  return t ? per_row<int64_t>(*t, N, ScalarType::Long, name) : nullptr;
}

Sweep sweep_of(const Tensor& logits, const Tensor& labels, const Optional& temperatures, double temperature, double logit_softcap) {
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

Rows gradient_rows(const Optional& dlogits, const Tensor& logits) {
  if (!dlogits) return {nullptr, 1, 0, 0};
  STD_TORCH_CHECK(dlogits->numel() == logits.numel() && dlogits->scalar_type() == logits.scalar_type(), "dlogits must be like logits");
  return rows_of(*dlogits, "dlogits");
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

// Runs one op on the device of `like`. On a CPU the n rows are cut by index, a whole row by one thread, so that the bits do not depend
// on the number of threads.
template <class Args>
void run(std::type_identity_t<void (*)(const Args&, int64_t, int64_t)> on_cpu, std::type_identity_t<int (*)(const Args&, void*)> on_cuda,
         const Args& args, int64_t n, const Tensor& like) {
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

void logprobs_fwd(const Tensor& logits, const Tensor& labels, const Optional& temperatures, double temperature, double logit_softcap,
                  const Tensor& logprob, const Optional& entropy, const Tensor& lse) {
  LogprobsFwdArgs a{sweep_of(logits, labels, temperatures, temperature, logit_softcap)};
  a.logprob = floats(logprob, a.N, "logprob");
  a.entropy = floats(entropy, a.N, "entropy");
  a.lse = floats(lse, a.N, "lse");
  run(PPG_ON_CPU(logprobs_fwd), PPG_ON_CUDA(logprobs_fwd), a, a.N, logits);
}

void logprobs_bwd(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Optional& entropy, const Tensor& d_logprob,
                  const Optional& d_entropy, const Optional& temperatures, double temperature, double logit_softcap,
                  const Tensor& dlogits) {
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
                 const Optional& old_logprobs, const Optional& ref_logprobs, const Optional& rollout_logprobs, const Optional& temperatures,
                 int64_t loss_type, int64_t kl_estimator, double clip_low, double clip_high, double dual_clip, double kl_coef,
                 double entropy_coef, double importance_cap, double temperature, double logit_softcap, const Tensor& loss,
                 const Tensor& logprob, const Optional& entropy, const Optional& dlogits) {
  PolicyLossArgs a{sweep_of(logits, labels, temperatures, temperature, logit_softcap)};
  a.advantages = floats(advantages, a.N, "advantages");
  a.weights = floats(weights, a.N, "weights");
  a.old_logprobs = floats(old_logprobs, a.N, "old_logprobs");
  a.ref_logprobs = floats(ref_logprobs, a.N, "ref_logprobs");
  a.rollout_logprobs = floats(rollout_logprobs, a.N, "rollout_logprobs");
  a.term = {LossType(loss_type), KLEstimator(kl_estimator), float(clip_low),      float(clip_high), float(dual_clip),
            float(kl_coef),      float(entropy_coef),       float(importance_cap)};
  a.loss = floats(loss, a.N, "loss");
  a.logprob = floats(logprob, a.N, "logprob");
  a.entropy = floats(entropy, a.N, "entropy");
  STD_TORCH_CHECK(a.entropy || a.term.entropy_coef == 0.f, "an entropy term needs the entropy output");
  a.dlogits = gradient_rows(dlogits, logits);
  run(PPG_ON_CPU(policy_loss), PPG_ON_CUDA(policy_loss), a, a.N, logits);
}

void rescale_rows(const Tensor& dlogits, const Tensor& scale) {
  RescaleRowsArgs a{rows_of(dlogits, "dlogits")};
  a.N = dlogits.size(0) * dlogits.size(1);
  a.V = dlogits.size(2);
  a.scale = floats(scale, a.N, "scale");
  a.dtype = dtype_of(dlogits);
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

constexpr const char* kSchemas[] = {
    "logprobs_fwd(Tensor logits, Tensor labels, Tensor? temperatures, float temperature, float logit_softcap, Tensor(a!) logprob, "
    "Tensor(b!)? entropy, Tensor(c!) lse) -> ()",
    "logprobs_bwd(Tensor logits, Tensor labels, Tensor lse, Tensor? entropy, Tensor d_logprob, Tensor? d_entropy, Tensor? temperatures, "
    "float temperature, float logit_softcap, Tensor(a!) dlogits) -> ()",
    "policy_loss(Tensor logits, Tensor labels, Tensor advantages, Tensor? weights, Tensor? old_logprobs, Tensor? ref_logprobs, "
    "Tensor? rollout_logprobs, Tensor? temperatures, int loss_type, int kl_estimator, float clip_low, float clip_high, float dual_clip, "
    "float kl_coef, float entropy_coef, float importance_cap, float temperature, float logit_softcap, Tensor(a!) loss, "
    "Tensor(b!) logprob, Tensor(c!)? entropy, Tensor(d!)? dlogits) -> ()",
    "rescale_rows(Tensor(a!) dlogits, Tensor scale) -> ()",
    "partial_returns(Tensor rewards, Tensor? segment_ids, Tensor? turn_counts, int lookahead, int segment_length, float gamma, "
    "Tensor(a!) returns) -> ()",
    "want_huge_pages(Tensor(a!) memory) -> ()",
    "build() -> str",
    "use_isa(str name) -> bool",
};
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
