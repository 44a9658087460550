"""Cache layers in transformers' interface, through which a model reads and writes a group of rows.

A layer keeps keys and values of every token, or carries a state of fixed size from token to token
(the last inputs of a convolution, the sum of a recurrence), or both. States are transformers' own
tensors. The model gets copies of them, so that a forward that fails changes nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from infuse.server.engine.errors import UnsupportedModel
from infuse.server.engine.native.attention import LayerShape

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
CacheMaker = Callable[[list[Any]], Cache]
States = list[torch.Tensor | None]
"""A layer's convolution states, then as many recurrent states, each `[rows, …]`.

None: the layer has no such state, or its rows have no tokens yet. Empty: the layer has no state.
"""

_KNOWN = {
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
}


@dataclass(frozen=True, slots=True)
class LayerStates:
    """The states that one layer carries for one row."""

    count: int
    """How many convolution states, and as many recurrent states."""
    nbytes: int


def states_nbytes(carried: Iterable[LayerStates], rows: int) -> int:
    """Bytes for the states of so many rows, twice: before and after a forward."""
    return 2 * rows * sum(each.nbytes for each in carried)


def empty_layer(shape: LayerShape, rows: int, columns: int, device: torch.device) -> KeysAndValues:
    """Allocate a layer's keys and values as zeros: padding is masked, but NaN times a weight of 0
    is NaN."""
    size = (rows, shape.kv_heads, columns)
    keys = torch.zeros(*size, shape.key_dim, dtype=shape.dtype, device=device)
    return keys, torch.zeros(*size, shape.value_dim, dtype=shape.dtype, device=device)


class Written(Protocol):
    """What a layer reads and writes of the group that it belongs to."""

    layers: list[KeysAndValues]
    crossed: list[KeysAndValues]
    end: int


class OwnLayer(CacheLayerMixin):
    """A cache layer with keys and values of the rows' own tokens."""

    def __init__(self, group: Written, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._group = group
        self._layer = layer
        self.is_initialized = True

    def lazy_initialization(self, *_: object) -> None:
        raise AssertionError("the layer is made initialised")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> KeysAndValues:
        keys, values = self._group.layers[self._layer]
        start, end = self._group.end, self._group.end + key_states.shape[-2]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        return self._group.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._group.end + query_length, 0

    def get_max_length(self) -> int:
        return -1


class CrossLayer(OwnLayer):  # type: ignore[no-untyped-call]
    """A cross-attention layer with keys and values of the sources. The first forward writes all of
    them, later ones read them."""

    def __init__(self, group: Written, layer: int) -> None:
        super().__init__(group, layer)
        if layer < len(group.crossed):
            self.keys, self.values = group.crossed[layer]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> KeysAndValues:
        self._group.crossed.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[-2])


class StateLayer(LinearAttentionLayer):
    """A cache layer with copies of a layer's states; none if its rows have no tokens yet."""

    def __init__(self, states: States) -> None:
        count = len(states) // 2
        LinearAttentionLayer.__init__(self, count)
        for index, (conv, recurrent) in enumerate(zip(states[:count], states[count:], strict=True)):
            if conv is not None:
                self.conv_states[index] = conv.clone()
                self.conv_kernel_size[index] = conv.shape[-1]
                self.is_conv_states_initialized[index] = True
            if recurrent is not None:
                self.recurrent_states[index] = recurrent.clone()
                self.is_recurrent_states_initialized[index] = True
            self.has_previous_state[index] = conv is not None or recurrent is not None


class AttendingStateLayer(StateLayer, OwnLayer):  # type: ignore[misc, no-untyped-call, override]
    """A cache layer with both states and keys and values."""

    def __init__(self, group: Written, layer: int, states: States) -> None:
        OwnLayer.__init__(self, group, layer)
        StateLayer.__init__(self, states)


def states_of(layer: object) -> States:
    """The states that a cache layer carries after a forward."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return []
    return [*layer.conv_states.values(), *layer.recurrent_states.values()]


def maker_of(model: PreTrainedModel) -> CacheMaker:
    """The function that makes a model's cache of its layers: MiniMax has a class of its own."""
    if model.config.model_type == "minimax":
        return _minimax_cache
    return Cache


def _minimax_cache(layers: list[Any]) -> Cache:
    """Make MiniMax's cache, with its states in the layers as in other models' caches."""
    # The module takes a while to import, and few serve MiniMax.
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class LayeredCache(MiniMaxCache):
        layers: list[Any]

        def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
            state: torch.Tensor | None = self.layers[layer_idx].recurrent_states[0]
            return state

        def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
            self.layers[layer_idx].update_recurrent_state(linear_cache)

    cache = LayeredCache()  # type: ignore[no-untyped-call]
    cache.layers = layers
    return cache


def kinds_of(cache: object, model: PreTrainedModel) -> tuple[list[LayerShape], list[LayerStates]]:
    """Describe each layer of a cache that a model filled with one row: the shape of its keys and
    values (no heads if it has none) and the states that it carries. Raises UnsupportedModel."""
    name = type(model).__name__
    if not isinstance(cache, Cache):
        raise UnsupportedModel(
            f"{name} keeps what it carries from token to token in a form of its own, which cannot "
            "be taken apart by rows"
        )
    shapes, carried = [], []
    for layer in cache.layers:
        if type(layer) not in _KNOWN:
            raise UnsupportedModel(
                f"{name} keeps more than keys, values and states of its tokens (a "
                f"{type(layer).__name__})"
            )
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        shape = LayerShape(0, 0, 0, model.dtype)
        if keys is not None and values is not None:
            shape = LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype)
        shapes.append(shape)
        states = states_of(layer)
        carried.append(
            LayerStates(len(states) // 2, sum(s.nbytes for s in states if s is not None))
        )
    return shapes, carried
