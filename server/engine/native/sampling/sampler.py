"""The sampler: chooses the next token of every row by that row's parameters, for a whole batch.

Tensors that depend on the composition of the batch only (temperatures, biases, token counts) are
kept until it changes; each step adds its tokens to the counts. The filters follow transformers'
logits processors, in their order: penalties, temperature, top-k, top-p, min-p. A grammar's mask is
applied before the temperature, so that the filters choose among the tokens that it allows.

Drafted tokens are verified by sampling: at each position with the random number that the sequence
uses for that token in any case. So a sequence gets the same tokens as without drafts.
"""

from collections import abc
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infuse.server.engine.native.sampling.adjustments import Allowed, Bias, Penalties, column
from infuse.server.engine.native.sequences.constraint import Constraint, MaskMaker
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Draft
from infuse.server.engine.request import TokenLogprob

_CANDIDATES = 512
"""How many of the best tokens are sorted. If a row needs more for its top-k or top-p, all are."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that was sampled for a row."""

    token: int
    logprob: TokenLogprob | None
    finite: bool
    """False if the row's logits held NaN or infinity, so that the token is meaningless."""
    grammar_error: str = ""
    """Why the row's grammar cannot continue, so that the token is meaningless. Empty: it can."""


@dataclass(frozen=True, slots=True)
class _Position:
    """A row of the logits: the position after a sequence's tokens and `ahead` drafted ones."""

    sequence: Sequence
    ahead: int = 0

    @property
    def length(self) -> int:
        return len(self.sequence.tokens) + self.ahead


class Sampler:
    """Samples next tokens and verifies drafts."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids
        self._batch: _Batch | None = None
        self._masks = MaskMaker()

    def sample(self, logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> list[Sampled]:
        """Sample a token for each sequence from `logits` `[rows, vocab]`, which stay unchanged."""
        positions = [_Position(sequence) for sequence in sequences]
        # Dropped until all is computed: if something fails, the next call makes a new batch.
        batch, self._batch = self._batch, None
        if batch is None or not batch.fits(positions, logits.shape[-1]):
            batch = _Batch(positions, logits.shape[-1], logits.device, batch)
        constrained = [(i, s.constraint) for i, s in enumerate(sequences) if s.constraint]
        chosen, finite = self._choose(logits.float(), batch, constrained)
        errors = {row: constraint.error for row, constraint in constrained}
        logprobs = _logprobs(
            logits, range(len(chosen)), chosen, [s.request.params.logprobs for s in sequences]
        )
        if constrained:
            self._masks.advance([(constraint, chosen[row]) for row, constraint in constrained])
        for group in batch.random:
            group.take()
        self._batch = batch
        return [
            Sampled(*sampled, errors.get(row, ""))
            for row, sampled in enumerate(zip(chosen, logprobs, finite, strict=True))
        ]

    def verify(self, logits: torch.Tensor, drafts: abc.Sequence[Draft]) -> list[list[Sampled]]:
        """Accept the drafts of each row: returns one token more than are accepted.

        `logits` `[positions, vocab]` are those after each row's tokens and after each drafted
        token. The rows have neither a grammar nor penalties.
        """
        positions = [_Position(d.sequence, n) for d in drafts for n in range(1 + len(d.tokens))]
        batch = _Batch(positions, logits.shape[-1], logits.device)
        chosen, finite = self._choose(logits.float(), batch, [])
        # For each draft, the positions whose tokens the sequence takes.
        taken: list[list[int]] = []
        start = 0
        for draft in drafts:
            own = chosen[start : start + 1 + len(draft.tokens)]
            accepted = next(
                (i for i, t in enumerate(draft.tokens) if own[i] != t), len(draft.tokens)
            )
            taken.append(list(range(start, start + accepted + 1)))
            start += len(own)
        kept = [index for mine in taken for index in mine]
        tokens = [chosen[index] for index in kept]
        wanted = [positions[index].sequence.request.params.logprobs for index in kept]
        logprobs = dict(zip(kept, _logprobs(logits, kept, tokens, wanted), strict=True))
        for draft, mine in zip(drafts, taken, strict=True):
            if draft.sequence.request.params.temperature > 0:
                draft.sequence.draws.take(len(mine))
        return [
            [Sampled(chosen[index], logprobs[index], finite[index]) for index in mine]
            for mine in taken
        ]

    def _choose(
        self,
        logits: torch.Tensor,
        batch: "_Batch",
        constrained: abc.Sequence[tuple[int, Constraint]],
    ) -> tuple[list[int], list[bool]]:
        """Choose a token for each row of `logits`, and say whether the row is finite."""
        adjusted = _apply_masks(batch.adjust(logits), constrained)
        adjusted = self._ban(adjusted, batch.positions)
        tokens = _greatest(adjusted)
        finite = torch.isfinite(adjusted.gather(1, tokens[:, None])[:, 0]).tolist()
        for group in batch.random:
            tokens[group.rows] = group.draw(adjusted[group.rows])
        batch.count(tokens)
        return tokens.tolist(), finite

    def close(self) -> None:
        self._masks.close()

    def _ban(self, logits: torch.Tensor, positions: abc.Sequence[_Position]) -> torch.Tensor:
        """Forbid the end to rows below their `min_tokens`, and tokens that complete a bad word.
        Rows that may take no other token are left as they are."""
        banned: list[tuple[int, int]] = []
        for row, position in enumerate(positions):
            banned_here = self._banned_ends(position)
            if position.sequence.request.params.bad_words:
                banned_here |= _ends_of_bad_words(position.sequence)
            if banned_here and _allows_others(position.sequence, banned_here):
                banned += [(row, token) for token in banned_here]
        if banned:
            rows, tokens = zip(*banned, strict=True)
            logits = logits.clone()
            logits[list(rows), list(tokens)] = -torch.inf
        return logits

    def _banned_ends(self, position: _Position) -> frozenset[int]:
        params = position.sequence.request.params
        if position.sequence.answer_tokens + position.ahead < params.min_tokens:
            ignores_eos = params.ignore_eos and position.sequence.constraint is None
            return params.stop_token_ids if ignores_eos else self._eos | params.stop_token_ids
        if params.ignore_eos and position.sequence.constraint is not None:
            return self._eos
        return frozenset()


def _ends_of_bad_words(sequence: Sequence) -> frozenset[int]:
    """The tokens that would complete a bad word after the answer's last tokens."""
    words = sequence.request.params.bad_words
    longest = max(len(word) for word in words) - 1
    last = sequence.tokens[max(sequence.prompt_tokens, len(sequence.tokens) - longest) :]
    return frozenset(
        word[-1] for word in words if list(word[:-1]) == last[len(last) - len(word) + 1 :]
    )


def _allows_others(sequence: Sequence, tokens: frozenset[int]) -> bool:
    """Whether the sequence may take any token except these."""
    if sequence.constraint is not None:
        return sequence.constraint.allows_others_than(tokens)
    allowed = sequence.request.params.allowed_tokens
    if allowed is None:
        return True
    token = allowed.find(1)
    while token in tokens:
        token = allowed.find(1, token + 1)
    return token >= 0


def _greatest(logits: torch.Tensor) -> torch.Tensor:
    """`[rows]`: the first of each row's greatest logits, or of its NaN. On the CPU numpy takes a
    sixth of torch's time."""
    if logits.is_cuda:
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _apply_masks(
    logits: torch.Tensor, constrained: abc.Sequence[tuple[int, Constraint]]
) -> torch.Tensor:
    """Set the tokens that a row's grammar forbids to minus infinity. Tokens that an adapter adds to
    the base's vocabulary are forbidden too."""
    if not constrained:
        return logits
    index = torch.tensor([row for row, _ in constrained], device=logits.device)
    allowed = torch.stack([constraint.allowed for _, constraint in constrained])
    allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]))
    if logits.is_cuda:
        allowed = allowed.pin_memory().to(logits.device, non_blocking=True)
    return logits.index_copy(0, index, logits[index].masked_fill(~allowed, -torch.inf))


class _Batch:
    """The parameters and counts of one composition of the batch, as tensors."""

    def __init__(
        self,
        positions: abc.Sequence[_Position],
        vocab: int,
        device: torch.device,
        previous: "_Batch | None" = None,
    ) -> None:
        """`previous`: the batch of the step before, whose token counts may still be valid."""
        self.positions = positions
        self._vocab = vocab
        self._lengths = [position.length for position in positions]
        params = [position.sequence.request.params for position in positions]
        random = [row for row, p in enumerate(params) if p.temperature > 0]
        truncated = [row for row in random if params[row].top_k > 0 or params[row].top_p < 1]
        plain = [row for row in random if row not in truncated]
        self.random = [
            _RandomRows(rows, positions, truncates, device)
            for rows, truncates in ((plain, False), (truncated, True))
            if rows
        ]
        bias = [(row, t, b) for row, p in enumerate(params) for t, b in p.logit_bias.items()]
        self._bias = Bias(bias, device) if bias else None
        allowed = {row: p.allowed_tokens for row, p in enumerate(params) if p.allowed_tokens}
        self._allowed = Allowed(allowed, vocab, device) if allowed else None
        self._penalties: Penalties | None = None
        penalised = [row for row, p in enumerate(params) if p.is_penalised]
        if penalised:
            self._penalised = torch.tensor(penalised, device=device)
            sequences = [positions[row].sequence for row in penalised]
            known = None if previous is None else previous._penalties
            is_valid = known is not None and known.fits(sequences, vocab)
            self._penalties = known if is_valid else Penalties(sequences, vocab, device)

    def fits(self, positions: abc.Sequence[_Position], vocab: int) -> bool:
        """Whether these are the same sequences, each one token longer than before."""
        if len(positions) != len(self.positions) or vocab != self._vocab:
            return False
        if any(
            a.sequence is not b.sequence for a, b in zip(positions, self.positions, strict=True)
        ):
            return False
        if [position.length for position in positions] != [length + 1 for length in self._lengths]:
            return False
        self._lengths = [length + 1 for length in self._lengths]
        return True

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply penalties (OpenAI's on the answer, repetition on prompt and answer), then biases,
        then allowed tokens."""
        if self._penalties is not None:
            penalised = self._penalties.apply(logits[self._penalised])
            logits = logits.index_copy(0, self._penalised, penalised)
        if self._bias is not None:
            logits = logits.index_put(self._bias.index, self._bias.values, accumulate=True)
        if self._allowed is not None:
            logits = self._allowed.apply(logits)
        return logits

    def count(self, tokens: torch.Tensor) -> None:
        """Count this step's tokens `[rows]`."""
        if self._penalties is not None:
            self._penalties.count(tokens[self._penalised])


class _RandomRows:
    """Rows of a batch that are sampled at random: all with truncation (top-k, top-p), or none."""

    def __init__(
        self,
        rows: list[int],
        positions: abc.Sequence[_Position],
        truncates: bool,
        device: torch.device,
    ) -> None:
        self.rows = torch.tensor(rows, device=device)
        self._draws = [(positions[row].sequence.draws, positions[row].ahead) for row in rows]
        self._truncates = truncates
        params = [positions[row].sequence.request.params for row in rows]
        self._temperature = column([p.temperature for p in params], device)
        self._top_k = column([p.top_k for p in params], device)
        self._top_p = column([p.top_p for p in params], device)
        self._min_p = column([p.min_p for p in params], device)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Sample tokens `[rows]` from `[rows, vocab]`, each by a random number of its sequence."""
        drawn = [draws.peek(ahead) for draws, ahead in self._draws]
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

    def take(self) -> None:
        """Consume one random number of each row; every row is a different sequence."""
        for draws, _ in self._draws:
            draws.take(1)

    def _needs_more(self, values: torch.Tensor, total: torch.Tensor) -> bool:
        """Whether the top-k or top-p of some row reaches beyond the sorted candidates."""
        if values.shape[-1] < _CANDIDATES:
            return False
        mass = (values - total).exp().sum(dim=-1, keepdim=True)
        few = torch.where(self._top_k > 0, self._top_k > values.shape[-1], mass < self._top_p)
        return bool(few.any())

    def _keep_min_p(self, probabilities: torch.Tensor) -> torch.Tensor:
        floor = self._min_p * probabilities.amax(dim=-1, keepdim=True)
        return probabilities.masked_fill(probabilities < floor, 0.0)


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of `[rows, n]` weights passes `uniform` of the total."""
    running = weights.double().cumsum(dim=-1)
    index = torch.searchsorted(running, uniform * running[:, -1:], right=True)
    return index[:, 0].clamp(max=weights.shape[-1] - 1)


def _logprobs(
    logits: torch.Tensor,
    rows: abc.Sequence[int],
    tokens: abc.Sequence[int],
    wanted: abc.Sequence[int | None],
) -> list[TokenLogprob | None]:
    """Score `tokens[i]` under `logits[rows[i]]`, with the `wanted[i]` best tokens, if not None."""
    asked = [(i, count) for i, count in enumerate(wanted) if count is not None]
    found: list[TokenLogprob | None] = [None] * len(wanted)
    if asked:
        scored = score_tokens(
            logits[[rows[i] for i, _ in asked]],
            [tokens[i] for i, _ in asked],
            max(count for _, count in asked),
        )
        for (i, count), entry in zip(asked, scored, strict=True):
            found[i] = TokenLogprob(entry.token_id, entry.logprob, entry.top[:count])
    return found


def score_tokens(logits: torch.Tensor, tokens: abc.Sequence[int], best: int) -> list[TokenLogprob]:
    """Score `tokens[i]` under `logits[i]` (`[n, vocab]`), with the `best` most likely tokens."""
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
