"""Adjustments of some rows' logits before sampling: biases, allowed tokens and penalties."""

from collections import abc

import numpy as np
import torch

from infuse.server.engine.native.sequences.sequence import Sequence


def column(values: abc.Sequence[float], device: torch.device) -> torch.Tensor:
    """A tensor `[values, 1]`, which broadcasts over the vocabulary."""
    return torch.tensor([float(value) for value in values], device=device)[:, None]


class Bias:
    """The `logit_bias` of a batch's rows: for each entry a row, a token and a value."""

    def __init__(self, entries: list[tuple[int, int, float]], device: torch.device) -> None:
        rows, tokens, values = zip(*entries, strict=True)
        self.index = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
        self.values = torch.tensor(values, device=device)


class Allowed:
    """Restricts some rows to their allowed tokens."""

    def __init__(self, allowed: abc.Mapping[int, bytes], vocab: int, device: torch.device) -> None:
        """`allowed`: row -> its `token_mask`."""
        self._rows = torch.tensor(list(allowed), device=device)
        masks = np.zeros((len(allowed), vocab), dtype=np.bool_)
        for mask, tokens in zip(masks, allowed.values(), strict=True):
            mask[: len(tokens)] = np.frombuffer(tokens, dtype=np.bool_)
        self._forbidden = torch.from_numpy(~masks).to(device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the forbidden tokens of `[rows of the batch, vocab]` to minus infinity."""
        restricted = logits[self._rows].masked_fill(self._forbidden, -torch.inf)
        return logits.index_copy(0, self._rows, restricted)


class Penalties:
    """Counts the tokens of the penalised rows. The counts stay valid while other rows change."""

    def __init__(self, sequences: abc.Sequence[Sequence], vocab: int, device: torch.device) -> None:
        self._sequences = sequences
        self._lengths = [len(sequence.tokens) for sequence in sequences]
        params = [sequence.request.params for sequence in sequences]
        self._presence = column([p.presence_penalty for p in params], device)
        self._frequency = column([p.frequency_penalty for p in params], device)
        self._repetition = column([p.repetition_penalty for p in params], device)
        self._counts = torch.zeros(len(sequences), vocab, device=device)
        self._seen = torch.zeros_like(self._counts, dtype=torch.bool)
        for index, mine in enumerate(sequences):
            answer = torch.tensor(mine.answer, dtype=torch.long, device=device)
            self._counts[index] += torch.bincount(answer, minlength=vocab)
            self._seen[index, mine.tokens[mine.source_tokens :]] = True

    def fits(self, sequences: abc.Sequence[Sequence], vocab: int) -> bool:
        """Whether these are the counted sequences, and all of their tokens are counted."""
        if len(sequences) != len(self._sequences) or vocab != self._counts.shape[-1]:
            return False
        if any(a is not b for a, b in zip(sequences, self._sequences, strict=True)):
            return False
        return [len(sequence.tokens) for sequence in sequences] == self._lengths

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Penalise the logits `[penalised, vocab]`."""
        repeated = torch.where(rows > 0, rows / self._repetition, rows * self._repetition)
        rows = torch.where(self._seen, repeated, rows)
        return rows - self._frequency * self._counts - self._presence * (self._counts > 0)

    def count(self, tokens: torch.Tensor) -> None:
        """Count the next token of each penalised row, `[penalised]`."""
        index = torch.arange(len(tokens), device=tokens.device)
        self._counts[index, tokens] += 1
        self._seen[index, tokens] = True
        self._lengths = [length + 1 for length in self._lengths]
