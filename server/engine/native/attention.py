"""Routes the attention of an unmodified model to the engine's own KV cache.

transformers calls the function that is registered here for every attention layer. The function
passes the queries, keys and values of all rows, flat, to the plan of the running step, which the KV
cache has made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from infuse.server.engine.errors import UnsupportedModel

IMPLEMENTATION = "infuse"
_CONTEXT = "infuse_step_context"
_PADDING_WARNING = "warn_if_padding_and_no_attention_mask"
"""The method of transformers' models that looks for padding, of which a flat batch has none."""
_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that models pass to their attention and that need nothing here: queries and keys are
rotated already, and the step's plan knows positions and cache."""


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The parameters of one layer's attention."""

    layer: int
    scaling: float
    window: int | None = None
    """How many keys a query sees, its own included. None: all."""
    softcap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of a sequence that one step computes: `start` to `start + tokens`."""

    seq_id: int
    start: int
    tokens: int


class AttentionPlan(Protocol):
    """The attention of one step: it stores new keys and values and attends to all of a row's."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        """Attend in one layer. `query` is `[heads, tokens, head_dim]`, `key` and `value` are
        `[kv_heads, tokens, head_dim]`. Returns `[tokens, heads, head_dim]`.
        """
        ...


class StepContext:
    """Holds the plan of the running step, for the attention layers of one model."""

    def __init__(self) -> None:
        self.plan: AttentionPlan | None = None

    @contextmanager
    def step(self, plan: AttentionPlan) -> Iterator[None]:
        assert self.plan is None, "steps do not nest"
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None


def install(model: PreTrainedModel) -> StepContext:
    """Route the model's attention through `StepContext`. Raises UnsupportedModel."""
    context = StepContext()
    AttentionInterface.register(IMPLEMENTATION, _attention)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"{type(model).__name__} does not let its attention be replaced: {error}"
        ) from error
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _CONTEXT, context)
        if isinstance(module, PreTrainedModel):
            # It would read tokens back from the GPU, which a captured step cannot do.
            setattr(module, _PADDING_WARNING, lambda *_: None)
    return context


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, as transformers' `AttentionInterface`. Tensors are `[1, heads, tokens, head_dim]`.

    Raises UnsupportedModel for arguments that are not known.
    """
    name = type(module).__name__
    unknown = [each for each in others.keys() - _HARMLESS if others[each] is not None]
    if unknown:
        raise UnsupportedModel(
            f"{name} passes {', '.join(sorted(unknown))} to its attention, which a flat batch "
            "does not know"
        )
    if attention_mask is not None or query.shape[0] != 1:
        raise UnsupportedModel(f"{name} makes a mask of its own, which a flat batch cannot keep")
    if s_aux is not None:
        raise UnsupportedModel(f"{name} uses attention sinks")
    if not getattr(module, "is_causal", True) or is_causal is False:
        raise UnsupportedModel(f"{name} is not causal")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    context: StepContext = getattr(module, _CONTEXT)
    assert context.plan is not None, "a forward outside of a step"
    index = int(module.layer_idx)  # type: ignore[arg-type]
    layer = LayerAttention(index, scaling, sliding_window, softcap)
    return context.plan.attend(query[0], key[0], value[0], layer).unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape of one layer's keys and values per token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes for the keys and values of one token."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """The memory for all keys and values of one layer, which is cut into strips."""

    keys: torch.Tensor
    """`[total_tokens * kv_heads, key_dim]`. As strips of one length it is viewed as
    `[strips, kv_heads, length, key_dim]`."""
    values: torch.Tensor
    shape: LayerShape

    @property
    def kv_heads(self) -> int:
        return self.shape.kv_heads

    @classmethod
    def empty(cls, tokens: int, shape: LayerShape) -> Self:
        heads = tokens * shape.kv_heads
        return cls(
            torch.empty(heads, shape.key_dim, dtype=shape.dtype),
            torch.empty(heads, shape.value_dim, dtype=shape.dtype),
            shape,
        )


class Probe:
    """An attention plan that attends each token to itself and notes the shape of each layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        if layer.layer in self.shapes:
            raise UnsupportedModel(f"the model attends twice in layer {layer.layer}")
        self.shapes[layer.layer] = LayerShape(
            key.shape[0], key.shape[-1], value.shape[-1], key.dtype
        )
        groups = query.shape[0] // value.shape[0]
        return value.repeat_interleave(groups, dim=0).transpose(0, 1)


def probe(model: PreTrainedModel, context: StepContext) -> list[LayerShape]:
    """Learn the shape of each layer's keys and values by running one token.

    Raises UnsupportedModel if a layer bypasses the AttentionInterface: it would mix rows.
    """
    shapes = run_probe(model, context)
    layers = int(model.config.get_text_config().num_hidden_layers)
    if sorted(shapes) != list(range(layers)):
        raise UnsupportedModel(
            f"{type(model).__name__} runs only {len(shapes)} of its {layers} layers through "
            "transformers' AttentionInterface; a flat batch would mix its rows"
        )
    return [shapes[layer] for layer in range(layers)]


def run_probe(model: PreTrainedModel, context: StepContext) -> dict[int, LayerShape]:
    """Run one token and return the shape of each attention layer that it reached."""
    plan = Probe()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with context.step(plan), torch.inference_mode():
        model(input_ids=ids, position_ids=ids, use_cache=False)
    return plan.shapes


def causal_mask(chunk: Chunk, window: int | None, device: torch.device) -> torch.Tensor | None:
    """`[tokens, start + tokens]`: whether a token sees a key. None: the plain causal mask."""
    end = chunk.start + chunk.tokens
    if chunk.start == 0 and (window is None or window >= end):
        return None
    queries = torch.arange(chunk.start, end, device=device)[:, None]
    keys = torch.arange(end, device=device)
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return seen


def attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    layer: LayerAttention,
) -> torch.Tensor:
    """Attend with `query` `[heads, tokens, dim]` to `keys` `[kv_heads, time, dim]`. Returns
    `[heads, tokens, value_dim]`."""
    if layer.softcap is None:
        out: torch.Tensor = F.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=layer.scaling,
            enable_gqa=query.shape[0] != keys.shape[0],
        )[0]
        return out
    if mask is None:
        mask = torch.ones(query.shape[1], keys.shape[1], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = torch.bmm(query, keys.transpose(1, 2)) * layer.scaling
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values)
