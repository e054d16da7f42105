// Checked tensors as the pointers and strides of args.h. Included by bindings.cpp alone.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "args.h"

namespace ppg {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Optional>;
using Numbers = std::vector<double>;
using Choices = std::vector<int64_t>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::F32;
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16"); return DType::F32;
  }
}

inline Rows rows_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3, name, " must be (B, L, V), got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(2) == 1 || t.stride(2) == 1, name, " must have unit stride along V, got ", t.stride(2));
  return {t.data_ptr(), t.size(1) ? t.size(1) : 1, t.stride(0), t.stride(1)};
}

template <class T> T* per_row(const Tensor& t, int64_t N, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == N, name, " must be contiguous of ", N, " elements, got ",
                  t.numel());
  return static_cast<T*>(t.data_ptr());
}
inline float* floats(const Tensor& t, int64_t N, const char* name) {
  return per_row<float>(t, N, ScalarType::Float, name);
}
inline float* floats(const Optional& t, int64_t N, const char* name) { return t ? floats(*t, N, name) : nullptr; }
inline float* score_norm_of(const Optional& score_norm, const float* entropy, int64_t N) {
  STD_TORCH_CHECK(!score_norm || entropy || N == 0, "a score norm needs the entropy output");
  return floats(score_norm, N, "score_norm");
}
inline const int64_t* longs(const Optional& t, int64_t N, const char* name) {
  return t ? per_row<int64_t>(*t, N, ScalarType::Long, name) : nullptr;
}

inline Rows gradient_rows(const Optional& dlogits, const Tensor& logits) {
  if (!dlogits) return {nullptr, 1, 0, 0};
  STD_TORCH_CHECK(dlogits->numel() == logits.numel() && dlogits->scalar_type() == logits.scalar_type(),
                  "dlogits must be like logits");
  return rows_of(*dlogits, "dlogits");
}

inline Ints ints(const Optional& t, int64_t N, const char* name) {
  if (!t) return {nullptr, false};
  const bool wide = t->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || t->scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  STD_TORCH_CHECK(t->is_contiguous() && t->numel() == N, name, " must be contiguous of ", N, " elements, got ",
                  t->numel());
  return {t->data_ptr(), wide};
}

// A value a token, (B, L), or (L,) where B is 1, in any strides, of the dtype asked for where one is.
inline Column column(const Optional& t, const Tensor& logits, std::optional<ScalarType> type, const char* name) {
  if (!t) return {nullptr, 0, 0, 4, false};
  STD_TORCH_CHECK(!type || t->scalar_type() == *type, name, " has the wrong dtype");
  const bool flat = t->dim() == 1 && logits.size(0) == 1;
  STD_TORCH_CHECK(flat ? t->size(0) == logits.size(1)
                       : t->dim() == 2 && t->size(0) == logits.size(0) && t->size(1) == logits.size(1),
                  name, " must be (B, L)");
  const ScalarType s = t->scalar_type();
  const bool floating =
      s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half || s == ScalarType::Double;
  return {t->data_ptr(), flat ? 0 : t->stride(0), t->stride(flat ? 0 : 1), int(t->element_size()), floating};
}

}  // namespace ppg
