"""The padded runner: runs a step as `[rows, tokens]` forwards on transformers' own attention.

It is for models that a flat batch would compute wrongly, because their attention bypasses
transformers' AttentionInterface, depends on the flat axis, or crosses to an encoder. Decoding rows
run together, aligned at the right. Prompts of similar length run together in their first chunk, and
alone in later ones.
"""

import inspect
from collections import abc, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine.errors import UnsupportedModel
from infuse.server.engine.native.cache.padded_cache import PaddedCache
from infuse.server.engine.native.cache.padded_group import Group
from infuse.server.engine.native.forward.runner import Logits, slot_of
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next tokens of one sequence."""

    seq_id: int
    start: int
    """How many tokens of the sequence have keys and values, without those of a source."""
    ids: list[int]
    slot: int
    source: list[int]
    """The tokens that the encoder of an encoder-decoder reads."""

    @classmethod
    def of(cls, sequence: Sequence, tokens: int) -> "Piece":
        source = sequence.source_tokens
        start, end = sequence.computed, sequence.computed + tokens
        return cls(
            seq_id=sequence.seq_id,
            start=max(0, start - source),
            ids=sequence.tokens[max(start, source) : end],
            slot=slot_of(sequence),
            source=sequence.tokens[:source],
        )

    def single_tokens(self) -> abc.Iterator["Piece"]:
        for number, token in enumerate(self.ids):
            yield replace(self, start=self.start + number, ids=[token])


class PaddedRunner:
    """Runs steps of rows that share padded batches."""

    def __init__(self, ia3: IA3Slots, cache: PaddedCache, can_continue: bool = True) -> None:
        """Without `can_continue`, the model continues a row's state by one token at a time only."""
        self._ia3 = ia3
        self._cache = cache
        self._device = ia3.base.device
        self._accepts = inspect.signature(ia3.base.forward).parameters.keys()
        self._positions = RowPositions(ia3.base)
        self._equal_beyond = _equal_beyond(ia3.base)
        self._carries = not cache.shares
        self._can_continue = can_continue

    @torch.inference_mode()
    def run(self, step: Step) -> Logits:
        work = [*((s, 1) for s in step.decode), *step.prefill]
        logits: dict[int, torch.Tensor] = {}
        for batch in self._batches(step):
            every = any(sequence.wants_prompt_logprobs for sequence, _ in batch)
            pieces = [Piece.of(sequence, tokens) for sequence, tokens in batch]
            scores = self.forward(pieces, every)
            logits |= {p.seq_id: scores[i, -len(p.ids) :] for i, p in enumerate(pieces)}
        taking = [sequence for sequence, tokens in work if tokens == sequence.uncomputed]
        prompts = []
        for sequence, tokens in step.prefill:
            unscored = sequence.unscored(tokens)
            if unscored:
                # The logits end with the row's last token; an encoder's tokens have none.
                at = slice(unscored.start - tokens, (unscored.stop - tokens) or None)
                prompts.append((sequence, logits[sequence.seq_id][at]))
        last = [logits[sequence.seq_id][-1] for sequence in taking]
        none = next(iter(logits.values()))[:0]
        return Logits(taking, torch.stack(last) if last else none, prompts)

    def _batches(self, step: Step) -> abc.Iterator[list[tuple[Sequence, int]]]:
        """Group the sequences that can run together: of one length, or with nothing computed."""
        batches: dict[tuple[object, ...], list[tuple[Sequence, int]]] = defaultdict(list)
        prefill = list(step.prefill)
        for sequence in step.decode:
            length = sequence.computed - sequence.source_tokens
            if self._carries and length == 0:
                prefill.append((sequence, 1))
                continue
            batches["decode", length if length >= self._equal_beyond else 0].append((sequence, 1))
        for sequence, tokens in prefill:
            if sequence.computed > sequence.source_tokens or tokens > self._equal_beyond:
                batches["alone", sequence.seq_id].append((sequence, tokens))
            else:
                # No row is twice as long as another, so that less than half of a batch is padding.
                # Models that carry a state get no padding, which would enter the state.
                kind = "encoded" if sequence.computed else "first"
                like = tokens if self._carries else tokens.bit_length()
                batches[kind, like].append((sequence, tokens))
        yield from batches.values()

    @torch.inference_mode()
    def forward(self, pieces: abc.Sequence[Piece], every: bool) -> torch.Tensor:
        """Run these pieces as one batch. Returns logits `[rows, tokens, vocab]`, aligned at the
        right. Without `every`, only the last token's are sure to be there."""
        tokens = max(len(piece.ids) for piece in pieces)
        if tokens > 1 and not self._can_continue and pieces[0].start > 0:
            [piece] = pieces
            return torch.cat([self.forward([each], every) for each in piece.single_tokens()], 1)
        sources = [len(piece.source) for piece in pieces if piece.source]
        seq_ids, lengths = [piece.seq_id for piece in pieces], [piece.start for piece in pieces]
        group = self._cache.gather(seq_ids, lengths, tokens, sources)
        with group.advancing([len(piece.ids) for piece in pieces]) as cache:
            return self._forward(pieces, every, group, cache)

    def _forward(
        self, pieces: abc.Sequence[Piece], every: bool, group: Group, cache: Cache
    ) -> torch.Tensor:
        tokens = max(len(piece.ids) for piece in pieces)
        starts = torch.tensor(group.starts, device=self._device)[:, None]
        columns = torch.arange(group.end + tokens, device=self._device)
        positions = (columns[group.end :] - starts).clamp(min=0)
        ids = [[0] * (tokens - len(piece.ids)) + piece.ids for piece in pieces]
        arguments = {
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 0 if every else 1,
        }
        mask = (columns >= starts).long()
        if "cache_params" in self._accepts:
            # Models without attention have nothing to mask, and another name for the cache.
            arguments["cache_params"] = cache
            arguments["input_ids"] = torch.tensor(ids, device=self._device)
        elif group.sources:
            arguments |= self._source(pieces, group) | {"decoder_attention_mask": mask}
            arguments["decoder_input_ids"] = torch.tensor(ids, device=self._device)
            # `position_ids` would be the encoder's positions, which it counts itself.
            arguments["decoder_position_ids"] = arguments.pop("position_ids")
        else:
            arguments["attention_mask"] = mask
            arguments["input_ids"] = torch.tensor(ids, device=self._device)
        self._ia3.set_rows([piece.slot for piece in pieces])
        with self._positions.set(positions):
            accepted = {k: v for k, v in arguments.items() if k in self._accepts}
            out = self._ia3.base(**accepted)
        logits: torch.Tensor = out.logits
        return logits

    def _source(self, pieces: abc.Sequence[Piece], group: Group) -> dict[str, Any]:
        """The arguments for the encoder: the sources, aligned at the left. Once they are encoded,
        only their mask."""
        longest = max(group.sources)
        lengths = torch.tensor(group.sources, device=self._device)[:, None]
        mask = (torch.arange(longest, device=self._device) < lengths).long()
        if group.crossed:
            # The decoder reads keys and values from the cache, and only the shape of this output.
            # Models with experts also read its router logits, which may be None.
            width = int(self._ia3.base.config.hidden_size)
            encoded = torch.empty(1, 1, 1, dtype=self._ia3.base.dtype, device=self._device)
            states = MoeModelOutputWithPast(encoded.expand(len(pieces), longest, width))
            return {"encoder_outputs": states, "attention_mask": mask}
        ids = [piece.source + [0] * (longest - len(piece.source)) for piece in pieces]
        return {"input_ids": torch.tensor(ids, device=self._device), "attention_mask": mask}


class RowPositions:
    """Gives each row its own learned positions in models that count them for the whole batch.

    BART's decoder is an example: it takes the length of the cache as the position of every row.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModel if all rows must have the same positions."""
        self._positions: torch.Tensor | None = None
        decoder: PreTrainedModel = model
        if model.config.is_encoder_decoder:
            decoder = model.get_decoder()  # type: ignore[no-untyped-call]
        for module in decoder.modules():
            if isinstance(module, nn.Embedding) and "past_key_values_length" in (
                inspect.signature(module.forward).parameters
            ):
                if module.embedding_dim < decoder.config.hidden_size:
                    # RoFormer's rotary table has no axis of rows. Other models' positions are
                    # added to the embeddings of tokens.
                    name = type(model).__name__
                    raise UnsupportedModel(
                        f"{name} cannot be run padded: it rotates all rows by the same positions"
                    )
                module.register_forward_hook(self._embed)

    @contextmanager
    def set(self, positions: torch.Tensor) -> abc.Iterator[None]:
        """Within this context, a forward uses these positions `[rows, tokens]`."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _embed(self, module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        if self._positions is None:
            return output
        weight, offset = module.weight, getattr(module, "offset", 0)
        assert isinstance(weight, torch.Tensor)
        return F.embedding(self._positions + offset, weight)


def _equal_beyond(model: PreTrainedModel) -> int:
    """The length from which on only rows of equal length may run together.

    Llama 4 scales its queries by a position that it counts for the whole batch. Below `floor_scale`
    the scale is 1 for all rows.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False):
        return int(config.floor_scale) - 1
    return 1 << 62
