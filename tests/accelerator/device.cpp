// A device for tests: memory of its own kind, counted and bounded, and operations that the CPU computes.
// What a real accelerator refuses is refused: operands on two devices, more memory than there is.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>
#include <set>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
std::atomic<int64_t> used{0}, peak{0}, most{INT64_MAX};

struct Block {
  void* data;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  used -= block->bytes;
  c10::free_cpu(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const auto device = c10::Device(kDevice, 0);
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    const int64_t now = used += static_cast<int64_t>(bytes);
    if (now > most) {
      used -= static_cast<int64_t>(bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "emulated out of memory. Tried to allocate ", bytes, " bytes");
    }
    for (int64_t seen = peak; now > seen && !peak.compare_exchange_weak(seen, now);) {
    }
    auto* block = new Block{c10::alloc_cpu(bytes), static_cast<int64_t>(bytes)};
    return {block->data, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kDevice> {
  c10::Device exchangeDevice(c10::Device) const override { return {kDevice, 0}; }
  c10::Device getDevice() const override { return {kDevice, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, {kDevice, 0}); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, {kDevice, 0}); }
  void synchronizeDevice(c10::DeviceIndex) const override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return {kDevice, 0}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = memory.allocate(bytes);
    std::memcpy(fresh.mutable_get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(bytes);
  }
};

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys, c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> type,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           kKeys, c10::dtype_or_default(type));
}

// The same bytes as a tensor of the CPU. It lives no longer than the other.
at::Tensor on_cpu(const at::Tensor& x) {
  if (x.device().type() != kDevice) return x;
  auto plain = at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU).requires_grad(false));
  if (x.is_conj()) plain._set_conj(true);
  if (x.is_neg()) plain._set_neg(true);
  return plain;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar one_number(const at::Tensor& x) { return at::native::_local_scalar_dense_cpu(on_cpu(x)); }

const at::Tensor& resize(const at::Tensor& x, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (x.sizes() == sizes) return x;  // a view keeps its strides
  auto* impl = x.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  const size_t bytes = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (bytes > impl->storage().nbytes()) Hooks().resizePrivateUse1Bytes(impl->storage(), bytes);
  return x;
}

at::Tensor& set_storage(at::Tensor& x, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  x.unsafeGetTensorImpl()->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return x;
}

at::Tensor& set_whole_storage(at::Tensor& x, at::Storage storage) {
  const int64_t count = storage.nbytes() / x.itemsize();
  return set_storage(x, storage, 0, {c10::SymInt(count)}, {c10::SymInt(1)});
}

at::Tensor& set_tensor(at::Tensor& x, const at::Tensor& other) {
  return set_storage(x, other.storage(), other.sym_storage_offset(), other.sym_sizes(), other.sym_strides());
}

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                    c10::SymIntArrayRef more, c10::SymInt groups) {
  std::optional<at::Tensor> plain;
  if (bias) plain = on_cpu(*bias);
  return at::convolution_symint(on_cpu(x), on_cpu(weight), plain, stride, padding, dilation, transposed, more, groups)
      .to(x.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef more,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  const auto count = transposed ? weight.sym_size(1) * groups : weight.sym_size(0);
  const auto found = at::convolution_backward_symint(on_cpu(gradient), on_cpu(x), on_cpu(weight), c10::SymIntArrayRef(&count, 1),
                                                     stride, padding, dilation, transposed, more, groups, wanted);
  const auto back = [&](const at::Tensor& found) { return found.defined() ? found.to(x.device()) : found; };
  return {back(std::get<0>(found)), back(std::get<1>(found)), back(std::get<2>(found))};
}

// CUDA counts integers, the CPU floats alone.
at::Tensor histogram(const at::Tensor& x, int64_t bins, const at::Scalar& least, const at::Scalar& greatest) {
  return at::histc(on_cpu(x).to(at::kFloat), bins, least, greatest).to(x.scalar_type()).to(x.device());
}

// Indices may lie on the CPU, as for CUDA, and so may single numbers.
const std::set<std::string> kIndexed{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto name = op.schema().name();
  const auto count = op.schema().arguments().size();
  bool here = false, elsewhere = false;
  const auto look = [&](const at::Tensor& x) {
    if (!x.defined()) return;
    if (x.device().type() == kDevice) here = true;
    else if (x.dim() > 0) elsewhere = true;
  };
  for (const auto& value : torch::jit::last(*stack, count)) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const at::Tensor& x : value.toTensorVector()) look(x);
    else if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorVector()) if (x) look(*x);
  }
  TORCH_CHECK(!(here && elsewhere) || kIndexed.count(name),
              "Expected all tensors to be on the same device, but ", name, " got some on the CPU and some on emulated:0");
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &one_number);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("convolution_overrideable", &convolve);
  m.impl("convolution_backward_overrideable", &convolve_backward);
  m.impl("histc", &histogram);
  m.impl("view", &at::native::view_symint);
  m.impl("as_strided", &at::native::as_strided_tensorimpl_meta_symint);
  m.impl("unfold", &at::native::unfold);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kDevice, &memory);
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("used", [] { return used.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("forget", [] { peak = used.load(); });
  m.def("limit", [](int64_t bytes) { most = bytes; });
  m.def("whole", [] { return most.load(); });
  m.def("left", [] { return most.load() - used.load(); });
}
