"""The next token of every row, with that row's own parameters, for a whole batch at once.

What only a change of the batch can change (temperatures, biases, token counts) is kept as tensors
between changes; a step updates the counts by its own tokens. The filters follow transformers'
logits processors, in their order: penalties, temperature, top-k, top-p, min-p. A grammar's mask
comes before the temperature: the filters choose among what it allows.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.engine.constraints import Constraint, MaskMaker
from server.engine.request import SamplingParams, TokenLogprob
from server.engine.sequence import Sequence

_CANDIDATES = 512
"""The best tokens, sorted; top-p rows that need more of them are sorted whole."""


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprob: TokenLogprob | None
    finite: bool
    """False where the model's output held NaN or infinity: the token means nothing."""
    grammar_error: str = ""
    """Why the row's grammar cannot go on: the token means nothing then."""


class Sampler:
    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids
        self._batch: _Batch | None = None
        self._masks = MaskMaker()

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """`logits` `[rows, vocab]`, a row for each sequence, which it does not change."""
        if self._batch is None or not self._batch.fits(sequences, logits.shape[-1]):
            self._batch = _Batch(sequences, logits.shape[-1], logits.device)
        batch = self._batch
        raw = logits.float()
        constrained = [(i, s.constraint) for i, s in enumerate(sequences) if s.constraint]
        adjusted = _apply_masks(batch.adjust(raw), constrained)
        adjusted = self._ban_ends(adjusted, sequences)
        best, tokens = adjusted.max(dim=-1)
        finite = torch.isfinite(best).tolist()
        for group in batch.random:
            tokens[group.rows] = group.draw(adjusted[group.rows])
        chosen = tokens.tolist()
        errors = {row: constraint.error for row, constraint in constrained}
        if constrained:
            self._masks.advance([(constraint, chosen[row]) for row, constraint in constrained])
        batch.count(tokens)
        logprobs = _logprobs(raw, chosen, [s.request.params.logprobs for s in sequences])
        return [
            Sampled(*sampled, errors.get(row, ""))
            for row, sampled in enumerate(zip(chosen, logprobs, finite, strict=True))
        ]

    def close(self) -> None:
        self._masks.close()

    def _ban_ends(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Rows below their `min_tokens` may not end, unless their grammar says that they must."""
        banned: list[tuple[int, int]] = []
        for row, sequence in enumerate(sequences):
            ends = self._banned_ends(sequence)
            constraint = sequence.constraint
            if ends and (constraint is None or constraint.allows_others_than(ends)):
                banned += [(row, token) for token in ends]
        if banned:
            rows, tokens = zip(*banned, strict=True)
            logits = logits.clone()
            logits[list(rows), list(tokens)] = -torch.inf
        return logits

    def _banned_ends(self, sequence: Sequence) -> frozenset[int]:
        params = sequence.request.params
        if sequence.answer_tokens < params.min_tokens:
            return self._eos | params.stop_token_ids
        if params.ignore_eos and sequence.constraint is not None:
            return self._eos
        return frozenset()


def _apply_masks(logits: torch.Tensor, constrained: Rows[tuple[int, Constraint]]) -> torch.Tensor:
    """`logits` with the given rows' forbidden tokens at minus infinity: those that an adapter adds
    to the base's vocabulary, too."""
    if not constrained:
        return logits
    index = torch.tensor([row for row, _ in constrained], device=logits.device)
    allowed = torch.stack([constraint.allowed for _, constraint in constrained])
    allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]))
    if logits.is_cuda:
        allowed = allowed.pin_memory().to(logits.device, non_blocking=True)
    return logits.index_copy(0, index, logits[index].masked_fill(~allowed, -torch.inf))


class _Batch:
    """The sampling state of one composition of the batch."""

    def __init__(self, sequences: Rows[Sequence], vocab: int, device: torch.device) -> None:
        self._sequences = list(sequences)
        self._vocab = vocab
        self._lengths = [len(sequence.tokens) for sequence in sequences]
        params = [sequence.request.params for sequence in sequences]
        random = [row for row, p in enumerate(params) if p.temperature > 0]
        truncated = [row for row in random if params[row].top_k > 0 or params[row].top_p < 1]
        plain = [row for row in random if row not in truncated]
        self.random = [
            _RandomRows(rows, sequences, truncates, device)
            for rows, truncates in ((plain, False), (truncated, True))
            if rows
        ]
        bias = [(row, t, b) for row, p in enumerate(params) for t, b in p.logit_bias.items()]
        self._bias = _Bias(bias, device) if bias else None
        self._penalised = [row for row, p in enumerate(params) if _is_penalised(p)]
        if self._penalised:
            self._rows = torch.tensor(self._penalised, device=device)
            penalties = [params[row] for row in self._penalised]
            self._presence = _column([p.presence_penalty for p in penalties], device)
            self._frequency = _column([p.frequency_penalty for p in penalties], device)
            self._repetition = _column([p.repetition_penalty for p in penalties], device)
            self._counts = torch.zeros(len(self._penalised), vocab, device=device)
            self._seen = torch.zeros_like(self._counts, dtype=torch.bool)
            for index, row in enumerate(self._penalised):
                answer = torch.tensor(sequences[row].answer, dtype=torch.long, device=device)
                self._counts[index] += torch.bincount(answer, minlength=vocab)
                mine = sequences[row]
                self._seen[index, mine.tokens[mine.source_tokens :]] = True

    def fits(self, sequences: Rows[Sequence], vocab: int) -> bool:
        """Whether these are the rows that this state was made for, one token on."""
        if len(sequences) != len(self._sequences) or vocab != self._vocab:
            return False
        if any(a is not b for a, b in zip(sequences, self._sequences, strict=True)):
            return False
        if [len(sequence.tokens) for sequence in sequences] != [n + 1 for n in self._lengths]:
            return False
        self._lengths = [n + 1 for n in self._lengths]
        return True

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Penalties (OpenAI's on the answer, repetition on prompt and answer), then biases."""
        if self._penalised:
            rows = logits[self._rows]
            repeated = torch.where(rows > 0, rows / self._repetition, rows * self._repetition)
            rows = torch.where(self._seen, repeated, rows)
            rows = rows - self._frequency * self._counts - self._presence * (self._counts > 0)
            logits = logits.clone()
            logits[self._rows] = rows
        if self._bias is not None:
            logits = logits.index_put(self._bias.index, self._bias.values, accumulate=True)
        return logits

    def count(self, tokens: torch.Tensor) -> None:
        """Take note of this step's `[rows]` tokens."""
        if self._penalised:
            mine = tokens[self._rows]
            index = torch.arange(len(mine), device=mine.device)
            self._counts[index, mine] += 1
            self._seen[index, mine] = True


class _RandomRows:
    """Rows of a batch that draw at random: either all of them truncate (top-k, top-p), or none."""

    def __init__(
        self, rows: list[int], sequences: Rows[Sequence], truncates: bool, device: torch.device
    ) -> None:
        self.rows = torch.tensor(rows, device=device)
        self._rngs = [sequences[row].rng for row in rows]
        self._truncates = truncates
        params = [sequences[row].request.params for row in rows]
        self._temperature = _column([p.temperature for p in params], device)
        self._top_k = _column([p.top_k for p in params], device)
        self._top_p = _column([p.top_p for p in params], device)
        self._min_p = _column([p.min_p for p in params], device)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """`[rows]` tokens for `[rows, vocab]`, by one number of each row's own generator."""
        drawn = [rng.random() for rng in self._rngs]
        uniform = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None]
        scaled = logits / self._temperature
        if not self._truncates:
            return _inverse_cdf(self._keep_min_p(scaled.softmax(dim=-1)), uniform)
        values, tokens = scaled.topk(min(_CANDIDATES, scaled.shape[-1]), dim=-1)
        total = scaled.logsumexp(dim=-1, keepdim=True)
        if self._needs_more(values, total):
            values, tokens = scaled.sort(dim=-1, descending=True)
        rank = torch.arange(values.shape[-1], device=values.device)
        limited = self._top_k > 0
        values = values.masked_fill(limited & (rank >= self._top_k), -torch.inf)
        total = torch.where(limited, values.logsumexp(dim=-1, keepdim=True), total)
        probabilities = (values - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill((before >= self._top_p) & (rank > 0), 0.0)
        ranks = _inverse_cdf(self._keep_min_p(probabilities), uniform)
        return tokens.gather(-1, ranks[:, None])[:, 0]

    def _needs_more(self, values: torch.Tensor, total: torch.Tensor) -> bool:
        """Whether some row's choice reaches past the sorted candidates."""
        if values.shape[-1] < _CANDIDATES:
            return False
        mass = (values - total).exp().sum(dim=-1, keepdim=True)
        few = torch.where(self._top_k > 0, self._top_k > values.shape[-1], mass < self._top_p)
        return bool(few.any())

    def _keep_min_p(self, probabilities: torch.Tensor) -> torch.Tensor:
        floor = self._min_p * probabilities.amax(dim=-1, keepdim=True)
        return probabilities.masked_fill(probabilities < floor, 0.0)


def _column(values: Rows[float], device: torch.device) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], device=device)[:, None]


class _Bias:
    def __init__(self, entries: list[tuple[int, int, float]], device: torch.device) -> None:
        rows, tokens, values = zip(*entries, strict=True)
        self.index = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
        self.values = torch.tensor(values, device=device)


def _is_penalised(params: SamplingParams) -> bool:
    return (
        params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
    )


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of `[rows, n]` weights passes `uniform` of the total."""
    running = weights.double().cumsum(dim=-1)
    index = torch.searchsorted(running, uniform * running[:, -1:], right=True)
    return index[:, 0].clamp(max=weights.shape[-1] - 1)


def _logprobs(
    logits: torch.Tensor, tokens: Rows[int], wanted: Rows[int | None]
) -> list[TokenLogprob | None]:
    """For each row that wants them: its token's logprob and the `wanted` best."""
    rows = [row for row, count in enumerate(wanted) if count is not None]
    found: list[TokenLogprob | None] = [None] * len(wanted)
    if rows:
        scored = score_tokens(
            logits[rows], [tokens[row] for row in rows], max(wanted[row] or 0 for row in rows)
        )
        for row, entry in zip(rows, scored, strict=True):
            found[row] = TokenLogprob(entry.token_id, entry.logprob, entry.top[: wanted[row]])
    return found


def score_tokens(logits: torch.Tensor, tokens: Rows[int], best: int) -> list[TokenLogprob]:
    """Logprob of `tokens[i]` under `logits[i]` (`[n, vocab]`), and the `best` alternatives."""
    logprobs = logits.float().log_softmax(dim=-1)
    index = torch.tensor(list(tokens), device=logits.device)[:, None]
    chosen = logprobs.gather(-1, index)[:, 0].tolist()
    top_values, top_tokens = logprobs.topk(best, dim=-1)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, chosen, top_tokens.tolist(), top_values.tolist(), strict=True
        )
    ]
