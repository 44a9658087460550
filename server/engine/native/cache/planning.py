"""How much memory the keys and values get, and how long a row may be."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from server.engine.errors import DoesNotFit, UnsupportedModel
from server.engine.native.attention import LayerShape
from server.engine.native.cache.kv_cache import FlatCache, StripCache
from server.engine.native.cache.paged_cache import PagedCache
from server.engine.native.kernels.attention import Kernels

_CPU_SHARE = 0.25
_CUDA_SHARE = 0.85
"""Shares of the memory that is free once weights and bank are in place. Others use the CPU too."""
_ENCODER_WINDOW = 512
"""What T5 and mT5 were trained on; their configs need not say so."""
_POSITIONS_BY_LENGTH = {"dynamic", "longrope"}
"""Rotary kinds that read the longest row of a batch beyond the original window."""


def window_of(model: PreTrainedModel, asked: int | None) -> int:
    """The longest row in tokens: prompt and answer, or in an encoder-decoder each of them.

    Raises UnsupportedModel and DoesNotFit.
    """
    config = model.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _POSITIONS_BY_LENGTH:
        window = rope.get("original_max_position_embeddings", window)
    if window is None or window < 0:
        # Relative positions (T5) and ALiBi (Bloom) have no end: these fields are advice.
        advised = getattr(config, "n_positions", None) or getattr(config, "seq_length", None)
        if asked is None and advised is None and not config.is_encoder_decoder:
            raise UnsupportedModel("the model's config names no window; set max-model-len")
        return asked or advised or _ENCODER_WINDOW
    if asked is not None and asked > window:
        raise DoesNotFit(f"max-model-len {asked} is longer than the model's window of {window}")
    return asked or int(window)


def cache_tokens(
    shapes: Sequence[LayerShape],
    device: torch.device,
    max_tokens: int,
    max_rows: int,
    asked: int | None,
    set_aside: int = 0,
    states: int = 0,
) -> int:
    """How many tokens' keys and values to keep: `asked`, or what rows and memory allow.

    `set_aside`: bytes of a GPU's memory that are not for the cache. `states`: bytes of what all
    rows carry beside keys and values. Raises DoesNotFit.
    """
    # Models without attention keep nothing of a token.
    per_token = max(1, sum(shape.nbytes for shape in shapes))
    free = int(_free_bytes(device))
    if device.type == "cuda":
        free = max(0, free - set_aside)
    if states > free:
        raise DoesNotFit(
            f"the states of max-rows {max_rows} take {states / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free; set max-rows lower"
        )
    free -= states
    tokens = asked
    if tokens is None:
        share = _CUDA_SHARE if device.type == "cuda" else _CPU_SHARE
        tokens = int(free * share / per_token)
        # Strips are a power of two long, and a moving row holds two of them for a moment.
        tokens = min(tokens, (max_rows + 1) * 2 * max_tokens)
    if tokens * per_token > free:
        raise DoesNotFit(
            f"kv-cache-tokens {tokens} takes {tokens * per_token / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free; {int(free * 0.9 / per_token)} would fit"
        )
    return tokens


def make_flat_cache(
    shapes: Sequence[LayerShape],
    device: torch.device,
    max_tokens: int,
    tokens: int,
    kernels: Kernels,
) -> FlatCache:
    """`kernels` are for the CPU. Raises DoesNotFit where `tokens` are too few for `max_tokens`, the
    longest row."""
    if device.type == "cuda":
        return PagedCache(shapes, tokens, max_tokens, device)
    return StripCache(shapes, tokens, max_tokens, kernels)


def memory_table(parts: Mapping[str, int], device: torch.device) -> str:
    """What holds how much, and what is free now: the weights are in place, the rest is to come."""
    lines = {**parts, f"free on {device} now": int(_free_bytes(device))}
    return "\n".join(f"{size / 2**20:12,.0f} MiB  {what}" for what, size in lines.items())


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = float(psutil.virtual_memory().available)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(text) - used)
    return free
