"""vLLM's linear layers with IA3: each token's input and output are rescaled by the vectors of its
slot.

The layers of a loaded model are changed in place, before vLLM compiles it. Only the planned targets
cost anything. Runs in vLLM's worker processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from infuse.adapters.checkpoint.targets import Side, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The part of a layer's output, on this worker, that a module of the base computes."""

    layer: LinearBase
    places: torch.Tensor
    """Their places in the layer's output."""
    numbers: torch.Tensor
    """Their numbers in the module's own output."""


class IA3Linear(nn.Module):
    """Mixed into the class of a layer that a planned target belongs to.

    Output side: `l * (W x + b)`. Input side: `W (l * x) + b` (T-Few, section 3.3). As in PEFT's
    `ia3.layer.Linear.forward` the vectors are float32, and a product is rounded to the dtype of the
    layer.
    """

    return_bias: bool
    ia3_slots: torch.Tensor
    """`[tokens]`: the slot of each token of the step."""
    ia3_output: torch.Tensor
    """`[slots, out]`: the output's vectors, where `ia3_has_output`."""
    ia3_has_output = False
    ia3_inputs = 0
    """How many parts of the layer have input vectors: `ia3_input_0` `[slots, in]` and so on, and in
    `ia3_part_0` `[out]` which rows of the output they are for."""
    ia3_shares_input = True
    """Whether some rows of the output are of no such part."""
    ia3_gathers = False
    """Whether the layer gathers its output from all workers: after it was rescaled."""

    def forward(self, x: torch.Tensor) -> Any:
        # Code of transformers has `[1, tokens, in]`.
        slots = self.ia3_slots[: x.shape[-2]]
        y, bias = self._product(x, slots)
        if self.ia3_has_output:
            scale = self.ia3_output[slots]
            y = (y * scale).to(y.dtype)
            bias = None if bias is None else (bias * scale).to(y.dtype)
        if self.ia3_gathers:
            y = tensor_model_parallel_all_gather(y)
        return (y, bias) if self.return_bias else y

    def _product(
        self, x: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's own result. A part whose input is rescaled is a product of its own."""
        y, bias = self._base(x) if self.ia3_shares_input else (None, None)
        for number in range(self.ia3_inputs):
            bank = getattr(self, f"ia3_input_{number}")
            part, bias = self._base((x * bank[slots]).to(x.dtype))
            y = part if y is None else torch.where(getattr(self, f"ia3_part_{number}"), part, y)
        assert y is not None
        return y, bias

    def _base(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        result = super().forward(x)
        return result if self.return_bias else (result, None)


class FiniteAttention(nn.Module):
    """Mixed into the class of vLLM's attention layers: only finite keys and values are cached.

    An adapter may overflow. What is not finite would stay in the blocks of the KV cache, and reach
    the requests that get them next: on CPUs, vLLM multiplies what a block holds past the end of a
    sequence by 0.
    """

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(query, _finite(key), _finite(value), *args, **kwargs)


def _finite(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else torch.nan_to_num(x, 0.0, 0.0, 0.0)


class IA3Layers:
    """The rescaled layers of one worker's model, and their banks. Slot 0 is the base."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        sizes: Mapping[str, tuple[int, int]],
        slots: int,
        tokens: int,
        device: torch.device,
    ) -> None:
        """`targets`: those that adapters may have. `sizes`: (in, out) features of their modules.
        `slots`: how many there are with the base's. `tokens`: the most in a step."""
        self.slots = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._slot_count = slots
        self._device = device
        self._banks: dict[tuple[LinearBase, str], torch.Tensor] = {}
        self._writes: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        """Number of a target -> bank, places in it, and the vector's values that go there."""
        for module in model.modules():
            if isinstance(module, Attention):
                _mix_in(module, FiniteAttention)
        rows = _rows_of(model, {target.module: sizes[target.module] for target in targets})
        for number, target in enumerate(targets):
            if target.module in rows:
                self._writes[number] = [self._plan(target, part) for part in rows[target.module]]

    @property
    def held(self) -> list[int]:
        """The numbers of the targets that this worker rescales."""
        return sorted(self._writes)

    @property
    def nbytes(self) -> int:
        return sum(bank.nbytes for bank in self._banks.values())

    def fill(self, slot: int, vectors: Mapping[int, torch.Tensor]) -> None:
        """Fill a slot with vectors by number of their target; the slot does nothing to others."""
        for bank in self._banks.values():
            bank[slot] = 1
        for number, vector in vectors.items():
            on_device = vector.to(self._device)
            for bank, places, values in self._writes.get(number, ()):
                bank[slot, places] = on_device[values]

    def _plan(self, target: Target, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = rows.layer
        if not isinstance(layer, IA3Linear):
            _mix_in(layer, IA3Linear)
            layer.register_buffer("ia3_slots", self.slots, persistent=False)
            if layer.tp_size > 1 and getattr(layer, "gather_output", False):
                layer.gather_output, layer.ia3_gathers = False, True
        if target.side is Side.OUTPUT:
            bank = self._bank(layer, "ia3_output", _outputs(layer))
            layer.ia3_has_output = True
            return bank, rows.places, rows.numbers
        inputs = _inputs(layer)
        first = layer.tp_rank * inputs if _is_split(layer) else 0
        bank = self._bank(layer, self._part(layer, rows), inputs)
        places = torch.arange(inputs, device=self._device)
        return bank, places, places + first

    def _part(self, layer: Any, rows: _Rows) -> str:
        """The name of the input bank of these rows of a layer; a new one where they have none."""
        is_mine = torch.zeros(_outputs(layer), dtype=torch.bool, device=self._device)
        is_mine[rows.places] = True
        number = layer.ia3_inputs
        layer.register_buffer(f"ia3_part_{number}", is_mine, persistent=False)
        layer.ia3_inputs += 1
        parts = [getattr(layer, f"ia3_part_{each}") for each in range(layer.ia3_inputs)]
        layer.ia3_shares_input = not bool(torch.stack(parts).any(0).all())
        return f"ia3_input_{number}"

    def _bank(self, layer: LinearBase, name: str, size: int) -> torch.Tensor:
        key = (layer, name)
        if key not in self._banks:
            bank = torch.ones(self._slot_count, size, device=self._device)
            layer.register_buffer(name, bank, persistent=False)
            self._banks[key] = bank
        return self._banks[key]


def _mix_in(layer: nn.Module, mixin: type[nn.Module]) -> None:
    kind = type(layer)
    layer.__class__ = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def _outputs(layer: Any) -> int:
    """The size of a layer's output on this worker, before it is gathered from all."""
    return int(sum(layer.output_partition_sizes))


def _inputs(layer: Any) -> int:
    """The size of the input that a layer is called with on this worker."""
    return int(layer.input_size_per_partition if _is_split(layer) else layer.input_size)


def _is_split(layer: Any) -> bool:
    """Whether each worker is called with a part of the input."""
    return isinstance(layer, RowParallelLinear) and layer.input_is_parallel


def _rows_of(model: Any, sizes: Mapping[str, tuple[int, int]]) -> dict[str, list[_Rows]]:
    """Find the layers that compute the modules of the base, by the modules' names in transformers.

    vLLM fuses, renames, permutes and shards modules as it loads their weights. So each module's
    weight is loaded once more by vLLM's own loader, into stand-ins for the weights, and each row of
    it holds the row's number. Modules that vLLM does not know, or that it computes otherwise than
    by calling their layer, are left out.
    """
    found: dict[str, list[_Rows]] = {}
    unknown = _unknown(model)
    with _stand_ins(model) as layers:
        columns = max(layer.tp_size for layer in layers)
        for module, (inputs, outputs) in sizes.items():
            if inputs == columns:
                continue  # The shape of a weight, so that it might be loaded as one.
            numbers = torch.arange(1.0, outputs + 1, dtype=torch.float64)
            weight = numbers[:, None].expand(outputs, columns)
            # As checkpoints have the weight of a Linear, or of transformers' Conv1D.
            rows = _load(model, layers, module, weight) or _load(model, layers, module, weight.t())
            known = [each for each in rows if each.layer not in unknown]
            if known:
                found[module] = known
    return found


def _load(model: Any, layers: Sequence[Any], module: str, weight: torch.Tensor) -> list[_Rows]:
    """Load a weight into the stand-ins, which are empty again afterwards. Returns the rows that it
    was loaded into; none where the model does not take it."""
    is_loaded = False
    # Loaders raise whatever they like for a name that they do not know.
    with suppress(Exception):
        model.load_weights([(f"{module}.weight", weight.contiguous())])
        is_loaded = True
    rows = [_taken(layer) for layer in layers]
    return [each for each in rows if len(each.places)] if is_loaded else []


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[list[Any]]:
    """Within: the linear layers have a small tensor of zeros instead of their parameters."""
    layers: list[Any] = [each for each in model.modules() if isinstance(each, LinearBase)]
    parameters = [layer._parameters for layer in layers]
    try:
        for layer in layers:
            columns = 1 if isinstance(layer, RowParallelLinear) else layer.tp_size
            zeros = torch.zeros(_outputs(layer), columns, dtype=torch.float64, device="cpu")
            weight = nn.Parameter(zeros, requires_grad=False)
            weight.output_dim, weight.input_dim = 0, 1  # type: ignore[attr-defined]
            weight.weight_loader = layer.weight_loader  # type: ignore[attr-defined]
            layer._parameters = {"weight": weight}
        yield layers
    finally:
        for layer, own in zip(layers, parameters, strict=True):
            layer._parameters = own


def _taken(layer: Any) -> _Rows:
    """The rows that were loaded into a stand-in, which is empty again afterwards."""
    numbers = layer.weight.data[:, 0].clone()
    layer.weight.data.zero_()
    places = numbers.nonzero().flatten()
    return _Rows(layer=layer, places=places, numbers=(numbers[places] - 1).long())


def _unknown(model: nn.Module) -> set[nn.Module]:
    """The layers that cannot be rescaled, or whose rows the stand-ins do not show."""
    unknown: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, MLAAttention):
            # Latent attention computes with their weights, rather than by calling them.
            unknown |= {*module.modules()}
        elif isinstance(module, MambaMixer2) and type(module.in_proj) is ColumnParallelLinear:
            # Workers that share a group load it with a loader of the parameter's own.
            unknown.add(module.in_proj)
    return unknown
