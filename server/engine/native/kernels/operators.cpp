// The kernels as operators of torch, so that a compiled forward calls them without Python.
//
// What they need beside their tensors lies in `calls`: addresses of structures that linear.py and
// attention.py keep, one for each place in the forward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace {

using torch::stable::Tensor;

struct LinearCall {
  void (*function)(const void* weight, const void* x, int64_t tokens, void* y, const void* scales,
                   int gate, int threads);
  const void *weight, *scales;
};

// A tensor [heads, tokens, dim] whose last stride is 1.
struct Heads {
  const void* first;
  int64_t head_stride, token_stride;

  explicit Heads(const Tensor& heads)
      : first(heads.const_data_ptr()),
        head_stride(heads.stride(0)),
        token_stride(heads.stride(1)) {}
};

struct Chunks {
  const int64_t* first;
  int64_t count;
};

struct AttentionCall {
  void (*function)(const Heads* query, const Heads* new_keys, const Heads* new_values, void* keys,
                   void* values, const int64_t* chunks, void* out, int64_t count, int64_t heads,
                   int64_t kv_heads, float scaling, int64_t window, float softcap, int threads);
  void *keys, *values;
  const Chunks* chunks;  // Of the running step.
  int64_t kv_heads;
  float scaling;
  int64_t window;
  float softcap;
};

template <class Call>
const Call& call_at(const Tensor& calls, int64_t number) {
  return *(const Call*)calls.const_data_ptr<int64_t>()[number];
}

// An empty tensor of the same dtype.
Tensor empty_like(const Tensor& given, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t n = sizes.size() - 1; n > 0; --n) strides[n - 1] = strides[n] * sizes[n];
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(given.get(), &dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor kernel_linear(Tensor x, Tensor calls, int64_t number, int64_t outputs, bool gate) {
  const auto& call = call_at<LinearCall>(calls, number);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = outputs;
  Tensor y = empty_like(x, sizes);
  call.function(call.weight, x.const_data_ptr(), x.numel() / x.size(-1),
                y.mutable_data_ptr(), call.scales, gate, torch::stable::get_num_threads());
  return y;
}

Tensor kernel_attend(Tensor query, Tensor key, Tensor value, Tensor calls, int64_t number) {
  const auto& call = call_at<AttentionCall>(calls, number);
  for (Tensor* heads : {&query, &key, &value})
    if (heads->stride(2) != 1) *heads = torch::stable::contiguous(*heads);
  const Heads queries(query), keys(key), values(value);
  Tensor out = empty_like(query, {query.size(1), query.size(0), value.size(2)});
  call.function(&queries, &keys, &values, call.keys, call.values, call.chunks->first,
                out.mutable_data_ptr(), call.chunks->count, query.size(0), call.kv_heads,
                call.scaling, call.window, call.softcap, torch::stable::get_num_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(infuse, CPU, library) {
  library.impl("kernel_linear", TORCH_BOX(&kernel_linear));
  library.impl("kernel_attend", TORCH_BOX(&kernel_attend));
}
