"""A GPU that is not there: tensors on "cuda" whose numbers are computed on the CPU.

For each operation torch's own FakeTensorMode says where its result lies, and refuses operands on
different devices as a GPU does; the CPU computes the numbers. Captured graphs record operations and
run them again, and a capture refuses what makes the CPU wait for the GPU.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from infuse.server.engine.native.kernels.build import load_kernel

GPU = torch.device("cuda", 0)
_VARLEN = torch.ops.torch_attn._varlen_attn.default


class GpuTensor(torch.Tensor):
    """A tensor on the simulated GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    numbers: torch.Tensor
    """The same tensor on the CPU. Views of one tensor share their memory here too."""

    def __new__(cls, numbers: torch.Tensor) -> "GpuTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=GPU,
        )

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} runs outside of the simulation")


@dataclass
class Graph:
    """A captured graph: the operations, with the tensors that they read and write."""

    operations: list[tuple[Any, Any, Any, list[Any]]] = field(default_factory=list)

    def replay(self) -> None:
        for func, args, kwargs, results in self.operations:
            again = tree_flatten(_compute(func, args, kwargs))[0]
            for old, new in zip(results, again, strict=True):
                # A view, and what an operation changes in place, have the same memory again.
                if _is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class SimulatedCuda(TorchDispatchMode):
    """Within: torch has a GPU, for this thread."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: list[torch.Tensor] = []
        self._devices: dict[Any, torch.device] = {}
        """An operation and the devices of its operands -> the device of its results."""
        self.capturing: Graph | None = None
        self.ran: Counter[str] = Counter()
        """How often each operation ran, and how often graphs were replayed."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.device, _with_index, (args, kwargs or {}))
        if func in (torch.ops.aten.pin_memory.default, torch.ops.aten._pin_memory.default):
            return self._pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        operands = tree_flatten((args, kwargs))[0]
        if not any(isinstance(each, GpuTensor) or each == GPU for each in operands):
            return func(*args, **kwargs)
        self.ran[func.name()] += 1
        device = self._device_of_results(func, args, kwargs, operands)
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        results, shape = tree_flatten(_compute(func, args, kwargs))
        if self.capturing is not None:
            self._check_capture(func, operands, device)
            self.capturing.operations.append((func, args, kwargs, results))
        return tree_unflatten([_place(each, device, operands) for each in results], shape)

    def _device_of_results(
        self, func: Any, args: Any, kwargs: Any, operands: list[Any]
    ) -> torch.device | None:
        """None: the results are no tensors. Raises what FakeTensorMode does for operands on
        different devices."""
        tensors = [(each.device, each.dim() == 0) for each in operands if _is_tensor(each)]
        others = [each for each in operands if isinstance(each, torch.device)]
        key = func, tuple(tensors), tuple(others)
        if key not in self._devices:
            device = self._find_device(func, args, kwargs)
            if device is None:
                return None
            self._devices[key] = device
        return self._devices[key]

    def _find_device(self, func: Any, args: Any, kwargs: Any) -> torch.device | None:
        args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        try:
            with self._fake:
                results = tree_flatten(func(*args, **kwargs))[0]
        except FakeTensorDeviceMismatchError:
            raise
        except RuntimeError:
            # The result depends on the operands' numbers, or torch knows no fake of the operation.
            return FakeTensor._find_common_device(func, tree_flatten((args, kwargs))[0])[0]
        devices = {each.device for each in results if _is_tensor(each)}
        assert len(devices) <= 1, func
        return next(iter(devices), None)

    def _faked(self, tensor: torch.Tensor) -> FakeTensor:
        if not isinstance(tensor, GpuTensor):
            return self._fake.from_tensor(tensor)
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self._fake, meta, GPU)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.append(tensor)
        return tensor

    def _check_capture(self, func: Any, operands: list[Any], device: torch.device | None) -> None:
        """A captured operation may not wait: nothing is read back, and only pinned memory is
        copied to the GPU."""
        hosts = [each for each in operands if _is_tensor(each) and each.device != GPU]
        pageable = [t for t in hosts if t.dim() and not any(t is each for each in self._pinned)]
        if pageable or device != GPU or func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")

    @contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


def _is_tensor(operand: Any) -> bool:
    return isinstance(operand, torch.Tensor)


def _with_index(device: torch.device) -> torch.device:
    return GPU if device.type == "cuda" else device


def _on_cpu(operand: Any) -> Any:
    if isinstance(operand, GpuTensor):
        return operand.numbers
    return torch.device("cpu") if operand == GPU else operand


def _place(result: Any, device: torch.device | None, operands: list[Any]) -> Any:
    """Put a result where it belongs. What an operation changed in place is its operand."""
    if not _is_tensor(result):
        return result
    for operand in operands:
        if _is_tensor(operand) and _on_cpu(operand) is result:
            if operand.device == device:
                return operand
            result = result.clone()
    if device != GPU:
        return result
    # A view of a tensor that was made outside of inference mode must be one, too.
    with torch.inference_mode(False):
        return GpuTensor(result)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on the CPU, also the two operations that only a GPU has."""
    if func is _VARLEN:
        return _varlen(*args, **kwargs)
    if func is torch.ops.aten.histc.default and not args[0].is_floating_point():
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative: torch.Tensor,
    _cumulative_keys: None,
    longest_chunk: int,
    longest_row: int,
    _is_causal: bool,
    scale: float | None,
    window: list[int],
    enable_gqa: bool,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernel computes, row by row: causal from the right end, within a window."""
    out = torch.empty_like(query)
    for row, (start, end) in enumerate(pairwise(cumulative.tolist())):
        tokens, length = end - start, int(lengths[row])
        assert tokens <= longest_chunk
        assert length <= longest_row
        keys, values = (pool[tables[row]].flatten(0, 1)[:length] for pool in (key, value))
        behind = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
        seen = behind >= 0 if window[0] < 0 else (behind >= 0) & (behind <= window[0])
        out[start:end] = F.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=seen,
            scale=scale,
            enable_gqa=enable_gqa,
        )[0].transpose(0, 1)
    scores = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return out, scores, torch.zeros(2, dtype=torch.uint64)


class _Stream:
    """The one stream: operations run at once, in order."""

    def wait_stream(self, _: "_Stream") -> None:
        pass


@contextmanager
def simulated_cuda(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    """Within: torch has a GPU, for this thread. `cache`: a folder for what is compiled."""
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10"]
    headers = f"-I{Path(torch.__file__).parent / 'include'}"
    load_kernel(
        Path(__file__).with_name("cuda_guard.cpp"), ["-std=c++20", headers], cache, libraries
    )
    simulated = SimulatedCuda()

    class CudaGraph(Graph):
        def replay(self) -> None:
            simulated.ran["replay"] += 1
            super().replay()

    @contextmanager
    def stream(_: _Stream) -> Iterator[None]:
        yield

    one = _Stream()
    for name, value in {
        "_lazy_init": lambda: None,
        "mem_get_info": lambda _: (1 << 30, 1 << 30),
        "get_device_name": lambda _: "a simulated GPU",
        "get_device_capability": lambda _: (9, 0),
        "empty_cache": lambda: None,
        "Stream": lambda: one,
        "current_stream": lambda: one,
        "stream": stream,
        "CUDAGraph": CudaGraph,
        "graph": simulated.capture,
    }.items():
        patch.setattr(torch.cuda, name, value)
    # `torch.tensor` makes a tensor on the CPU and moves it; `Module.cuda` makes new parameters.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with simulated:
            yield simulated
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
