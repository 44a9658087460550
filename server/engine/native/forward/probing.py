"""Probes whether a model runs padded: a few tokens of two rows, before the engine is set up."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from infuse.adapters.model.bank import BASE_SLOT
from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine.errors import UnsupportedModel
from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.padded_cache import PaddedCache
from infuse.server.engine.native.cache.padded_layers import LayerStates, kinds_of, maker_of
from infuse.server.engine.native.forward.padded_runner import PaddedRunner, Piece

_PROBED = (3, 7)
"""Tokens of the two rows."""
_PROBED_CACHE = 1024
"""Tokens of the cache that the rows run in."""


@torch.inference_mode()
def probe_padded(ia3: IA3Slots) -> tuple[list[LayerShape], list[LayerStates]]:
    """Learn each layer's shape and states from a few tokens, and check that two rows of unequal
    length, padded to a batch, give the same logits as each does alone.

    Raises UnsupportedModel.
    """
    base = ia3.base
    name = type(base).__name__
    crosses = bool(base.config.is_encoder_decoder)
    rows = [[token % 50 + 3 for token in range(5 * n, 6 * n)] for n in _PROBED]
    try:
        alone = [_alone(base, row, crosses) for row in rows]
        shapes, carried = _layers_of(base, rows[0], crosses)
        cache = PaddedCache(
            shapes,
            base.device,
            total_tokens=_PROBED_CACHE,
            max_tokens=max(_PROBED),
            crosses=crosses,
            carried=carried,
            make_cache=maker_of(base),
        )
        runner = PaddedRunner(ia3, cache)
        for done, until in ((0, -1), (-1, None)):
            pieces = [
                Piece(
                    seq_id=seq_id,
                    start=len(row[:done]) if done else 0,
                    ids=row[done:until],
                    slot=BASE_SLOT,
                    source=row * crosses,
                )
                for seq_id, row in enumerate(rows)
            ]
            batches = [pieces] if cache.shares or done else [[piece] for piece in pieces]
            parts = [runner.forward(batch, every=False)[:, -1] for batch in batches]
        together = torch.cat(parts)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UnsupportedModel(f"{name} cannot be run padded: it fails there: {reason}") from error
    if not _close(together, torch.stack(alone)):
        raise UnsupportedModel(
            f"{name} cannot be run padded: its rows do not come out of a batch as they do alone"
        )
    return shapes, carried


@torch.inference_mode()
def continues_states(
    ia3: IA3Slots, shapes: Sequence[LayerShape], carried: Sequence[LayerStates]
) -> bool:
    """Whether the model can continue a row's state by several tokens at once. Mamba's scan cannot:
    it starts from an empty state."""
    row = [token % 50 + 3 for token in range(35, 42)]
    cache = PaddedCache(
        shapes,
        ia3.base.device,
        total_tokens=_PROBED_CACHE,
        max_tokens=len(row),
        carried=carried,
        make_cache=maker_of(ia3.base),
    )
    runner = PaddedRunner(ia3, cache)
    for start, end in ((0, 4), (4, len(row))):
        piece = Piece(seq_id=0, start=start, ids=row[start:end], slot=BASE_SLOT, source=[])
        found = runner.forward([piece], every=False)[0, -1]
    return _close(found, _alone(ia3.base, row, crosses=False))


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = 64 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return torch.allclose(found.float(), wanted.float(), rtol=0, atol=max(tolerance, 1e-5))


def _alone(model: PreTrainedModel, row: list[int], crosses: bool) -> torch.Tensor:
    """`[vocab]`: the logits after a row's last token, by one plain forward."""
    ids = torch.tensor([row], device=model.device)
    given = {"decoder_input_ids": ids} if crosses else {}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **given).logits
    return logits[0, -1]


def _layers_of(
    model: PreTrainedModel, row: list[int], crosses: bool
) -> tuple[list[LayerShape], list[LayerStates]]:
    ids = torch.tensor([row], device=model.device)
    given: dict[str, Any] = {"decoder_input_ids": ids} if crosses else {}
    make_cache = maker_of(model)
    if make_cache is not Cache:
        given["past_key_values"] = make_cache(DynamicCache(config=model.config).layers)
    out = model(input_ids=ids, use_cache=True, **given)
    cache = out.get("past_key_values", out.get("cache_params"))
    if isinstance(cache, EncoderDecoderCache):
        # Some decoders use this class without an encoder too.
        cache = cache.self_attention_cache
    return kinds_of(cache, model)
