"""Planning: how much memory the KV cache gets, and how long a row may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from infuse.server.engine.errors import DoesNotFit, UnsupportedModel
from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.kv_cache import FlatCache, StripCache
from infuse.server.engine.native.cache.paged_cache import PagedCache
from infuse.server.engine.native.kernels.attention import Kernels

_CPU_SHARE = 0.25
_CUDA_SHARE = 0.85
"""The KV cache's share of the memory that is free once weights and bank are allocated. On the CPU
other processes need memory too."""
_ENCODER_WINDOW = 512
"""Tokens that T5 and mT5 were trained on. Their configs need not name it."""
_POSITIONS_BY_LENGTH = {"dynamic", "longrope"}
"""Rotary embeddings that depend on the longest row of a batch beyond the original window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest batch that the engine runs."""

    max_rows: int
    max_tokens: int
    """Tokens of the longest row, with those that an encoder reads."""


def window_of(model: PreTrainedModel, asked: int | None) -> int:
    """The length of the longest row in tokens. It covers prompt and answer together; in an
    encoder-decoder it covers each of them.

    Raises UnsupportedModel and DoesNotFit.
    """
    config = model.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _POSITIONS_BY_LENGTH:
        window = rope.get("original_max_position_embeddings", window)
    if window is None or window < 0:
        # Relative positions (T5) and ALiBi (Bloom) have no limit: these fields are advice.
        advised = getattr(config, "n_positions", None) or getattr(config, "seq_length", None)
        if asked is None and advised is None and not config.is_encoder_decoder:
            raise UnsupportedModel("the model's config names no window; set --max-model-len")
        return asked or advised or _ENCODER_WINDOW
    if asked is not None and asked > window:
        raise DoesNotFit(f"--max-model-len {asked} is longer than the model's window of {window}")
    return asked or int(window)


def cache_tokens(
    shapes: Sequence[LayerShape],
    device: torch.device,
    limits: Limits,
    *,
    asked: int | None,
    set_aside: int = 0,
    states: int = 0,
) -> int:
    """The KV cache's budget in tokens: `asked`, or (None) what the rows need and memory allows.

    `set_aside`: bytes of a GPU's memory that are not for the cache. `states`: bytes of the states
    that all rows carry beside keys and values. Raises DoesNotFit.
    """
    # Models without attention have no keys and values.
    per_token = max(1, sum(shape.nbytes for shape in shapes))
    free = int(_free_bytes(device))
    if device.type == "cuda":
        free = max(0, free - set_aside)
    if states > free:
        raise DoesNotFit(
            f"the states of --max-batch-rows {limits.max_rows} take {states / 2**30:.1f} GiB, "
            f"but only {free / 2**30:.1f} GiB are free; set --max-batch-rows lower"
        )
    free -= states
    tokens = asked
    if tokens is None:
        share = _CUDA_SHARE if device.type == "cuda" else _CPU_SHARE
        tokens = int(free * share / per_token)
        # A strip is a power of two long, and a sequence that moves holds two strips for a moment.
        tokens = min(tokens, (limits.max_rows + 1) * 2 * limits.max_tokens)
    if tokens * per_token > free:
        raise DoesNotFit(
            f"--kv-cache-tokens {tokens} takes {tokens * per_token / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free; {int(free * 0.9 / per_token)} would fit"
        )
    return tokens


def make_flat_cache(
    shapes: Sequence[LayerShape],
    device: torch.device,
    *,
    total_tokens: int,
    max_tokens: int,
    kernels: Kernels,
) -> FlatCache:
    """Make a device's KV cache for the flat runner. `max_tokens`: the longest row. `kernels` are
    for the CPU. Raises DoesNotFit if the longest row does not fit."""
    if device.type == "cuda":
        return PagedCache(shapes, device, total_tokens=total_tokens, max_tokens=max_tokens)
    return StripCache(shapes, total_tokens=total_tokens, max_tokens=max_tokens, kernels=kernels)


def memory_table(parts: Mapping[str, int], device: torch.device) -> str:
    """Format a table of planned sizes in bytes, and of what is free on the device now."""
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
