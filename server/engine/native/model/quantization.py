"""Loads bases in 8 and 4 bits, by the libraries that transformers uses.

int8 is torchao's: one scale for each output feature. int4 is bitsandbytes' NF4: one for every 64
weights. Both round weights only. So no row depends on the rows beside it, and IA3's vectors are
applied to activations in the base's own dtype (decision 17).
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.utils.import_utils import is_bitsandbytes_available, is_torchao_available

from infuse.server.engine.errors import UnsupportedModel

Quantization = Literal["none", "int8", "int4"]

_PACKED_OUTPUTS = 32
"""The layout of bitsandbytes' 4-bit layers for AVX512-BF16 has groups of this many outputs."""

LIBRARIES = {"torchao": is_torchao_available, "bitsandbytes": is_bitsandbytes_available}
"""Each supported library, and whether it is installed."""


def loading_arguments(
    source: str, quantization: Quantization, device: str, dtype: str
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load `source` quantised, or as it was saved.

    Raises UnsupportedModel if it cannot be quantised again, or its library is unknown or missing.
    """
    config = AutoConfig.from_pretrained(source)
    saved = _library_of(config)
    if saved is not None and quantization != "none":
        raise UnsupportedModel(
            f"'{source}' is quantised already, by {saved}; leave out --quantization {quantization}"
        )
    library = {"none": saved, "int8": "torchao", "int4": "bitsandbytes"}[quantization]
    if library is None:
        return {"device_map": None}
    if library not in LIBRARIES:
        raise UnsupportedModel(
            f"'{source}' is quantised by {library}, on which IA3 is not supported: use the "
            f"original checkpoint, or one by {' or '.join(LIBRARIES)}"
        )
    missing = [name for name, is_available in LIBRARIES.items() if not is_available()]
    if missing:
        raise UnsupportedModel(
            f"a quantised base needs {' and '.join(missing)}: "
            'pip install "infuse-server[quantization]"'
        )
    if saved is not None:
        return {"device_map": {"": device}}
    computing = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return {"device_map": {"": device}, "quantization_config": _recipe(quantization, computing)}


def _library_of(config: PreTrainedConfig) -> str | None:
    """The library that a checkpoint was quantised with. None: it is not quantised."""
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    if saved.get("load_in_8bit") or saved.get("load_in_4bit"):
        return "bitsandbytes"
    return str(saved.get("quant_method"))


def _recipe(quantization: Quantization, dtype: torch.dtype) -> TorchAoConfig | BitsAndBytesConfig:
    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def settle(model: PreTrainedModel, device: str) -> None:
    """Make a quantised model run exactly on `device`, or raise UnsupportedModel.

    No row of a batch may depend on the rows beside it.
    """
    _use_weights_only(model)
    _avoid_avx512_bf16(model)
    kinds = {
        # torchao's layers that round their activations have these arguments.
        (type(module.weight), str(getattr(module.weight, "act_quant_kwargs", ""))): module
        for module in model.modules()
        if isinstance(module, nn.Linear) and is_quantized(module)
    }
    if not kinds:
        raise UnsupportedModel(
            f"{type(model).__name__} has no layer that could be quantised so (int8 takes nn.Linear "
            "only, int4 also GPT-2's Conv1D): try --quantization int4, or none"
        )
    for (weight, _), module in kinds.items():
        try:
            alone = rows_are_independent(module, device, model.dtype)
        except (RuntimeError, AssertionError, ImportError, TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"layers of {weight.__name__} do not run on {device}: {error}"
            ) from error
        if not alone:
            raise UnsupportedModel(
                f"layers of {weight.__name__} round a row's activations by those of the rows "
                "beside it, so an answer would depend on the batch: quantise weights only"
            )


def is_quantized(linear: nn.Linear) -> bool:
    """Whether the weight is quantised: a tensor subclass, or packed."""
    return type(linear.weight) is not nn.Parameter


def _use_weights_only(model: PreTrainedModel) -> None:
    """Replace bitsandbytes' 8-bit layers (LLM.int8) by torchao's, which do not round activations.

    The weights stay the same bit for bit. LLM.int8 computes a column that holds an outlier of any
    row in higher precision for all rows, so that a row would depend on the others.
    """
    if not getattr(model, "is_loaded_in_8bit", False):
        return
    from bitsandbytes.nn.modules import Linear8bitLt
    from torchao.quantization import Int8Tensor

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear8bitLt):
            old: Any = module.weight
            size = (module.in_features, module.out_features)
            linear = nn.Linear(*size, bias=False, device="meta")
            new = Int8Tensor(old.data, old.SCB[:, None] / 127, [1, size[0]], model.dtype)
            linear.weight = nn.Parameter(new, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)


def _avoid_avx512_bf16(model: PreTrainedModel) -> None:
    """Turn off bitsandbytes' AVX512-BF16 path for 4-bit layers in other dtypes, which it would
    compute in bfloat16, and for widths that its layout does not fit."""
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        block = module.weight.quant_state.blocksize  # type: ignore[union-attr]
        fits = module.in_features % block == module.out_features % _PACKED_OUTPUTS == 0  # type: ignore[operator]
        if model.dtype is not torch.bfloat16 or not fits:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.inference_mode()
def rows_are_independent(linear: nn.Linear, device: str, dtype: torch.dtype) -> bool:
    """Whether a row gives the same result beside a row of values a thousand times as large."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, linear.in_features, generator=generator).to(device, dtype)
    x[:, 1] *= 1000
    alone, beside = linear(x[:, :1]), linear(x)[:, :1]
    tolerance = 16 * torch.finfo(dtype).eps * float(alone.abs().max())
    return torch.allclose(alone, beside, rtol=0, atol=tolerance)


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, each counted once, with the scales of quantised ones."""
    return sum(_nbytes(parameter) for parameter in model.parameters())


def _nbytes(tensor: torch.Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        return sum(int(getattr(tensor, name).nbytes) for name in inner)
    state = getattr(tensor, "quant_state", None)
    # bitsandbytes can quantise the scales too, which then have scales of their own.
    states = [] if state is None else [state, state.state2 if state.nested else None]
    scales = sum(int(each.absmax.nbytes) for each in states if each is not None)
    return tensor.nbytes + scales
