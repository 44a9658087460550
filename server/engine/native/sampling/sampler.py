"""The next token of every row, with that row's own parameters, for a whole batch at once.

What only a change of the batch can change (temperatures, biases, token counts) is kept as tensors
between changes; a step updates the counts by its own tokens. The filters follow transformers'
logits processors, in their order: penalties, temperature, top-k, top-p, min-p. A grammar's mask
comes before the temperature: the filters choose among what it allows.

Drafted tokens are verified by drawing: at each place with the random number that the sequence would
draw that token by in any case. So it takes the same tokens as without drafts, only sooner.
"""

from collections import abc
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.engine.constraints.grammars import Constraint, MaskMaker
from server.engine.native.sampling.adjustments import Allowed, Bias, Penalties, column
from server.engine.native.sequences.sequence import Sequence
from server.engine.native.sequences.step import Draft
from server.engine.request import TokenLogprob

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


@dataclass(frozen=True, slots=True)
class _Place:
    """A row of the logits: what follows the tokens of a sequence and `ahead` drafted ones."""

    sequence: Sequence
    ahead: int = 0

    @property
    def length(self) -> int:
        return len(self.sequence.tokens) + self.ahead


class Sampler:
    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids
        self._batch: _Batch | None = None
        self._masks = MaskMaker()

    def sample(self, logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> list[Sampled]:
        """`logits` `[rows, vocab]`, a row for each sequence, which it does not change."""
        places = [_Place(sequence) for sequence in sequences]
        # Not there until all is computed: where that fails, it is made anew.
        batch, self._batch = self._batch, None
        if batch is None or not batch.fits(places, logits.shape[-1]):
            batch = _Batch(places, logits.shape[-1], logits.device, batch)
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
        """What each of the drafted rows takes: at least one token, at most one more than drafted.

        `logits` `[places, vocab]`: what follows each row's tokens, and each drafted one. The rows
        have neither a grammar nor a penalty.
        """
        places = [_Place(d.sequence, n) for d in drafts for n in range(1 + len(d.tokens))]
        batch = _Batch(places, logits.shape[-1], logits.device)
        chosen, finite = self._choose(logits.float(), batch, [])
        taken: list[list[int]] = []
        start = 0
        for draft in drafts:
            own = chosen[start : start + 1 + len(draft.tokens)]
            true = next((i for i, t in enumerate(draft.tokens) if own[i] != t), len(draft.tokens))
            taken.append(list(range(start, start + true + 1)))
            start += len(own)
        kept = [place for mine in taken for place in mine]
        tokens = [chosen[place] for place in kept]
        wanted = [places[place].sequence.request.params.logprobs for place in kept]
        logprobs = dict(zip(kept, _logprobs(logits, kept, tokens, wanted), strict=True))
        for draft, mine in zip(drafts, taken, strict=True):
            if draft.sequence.request.params.temperature > 0:
                draft.sequence.draws.take(len(mine))
        return [
            [Sampled(chosen[place], logprobs[place], finite[place]) for place in mine]
            for mine in taken
        ]

    def _choose(
        self,
        logits: torch.Tensor,
        batch: "_Batch",
        constrained: abc.Sequence[tuple[int, Constraint]],
    ) -> tuple[list[int], list[bool]]:
        """A token for each row of `logits`, and whether the row is finite."""
        adjusted = _apply_masks(batch.adjust(logits), constrained)
        adjusted = self._ban(adjusted, batch.places)
        tokens = _greatest(adjusted)
        finite = torch.isfinite(adjusted.gather(1, tokens[:, None])[:, 0]).tolist()
        for group in batch.random:
            tokens[group.rows] = group.draw(adjusted[group.rows])
        batch.count(tokens)
        return tokens.tolist(), finite

    def close(self) -> None:
        self._masks.close()

    def _ban(self, logits: torch.Tensor, places: abc.Sequence[_Place]) -> torch.Tensor:
        """Rows below their `min_tokens` may not end, and no row completes a bad word; unless what
        it is held to leaves nothing else."""
        banned: list[tuple[int, int]] = []
        for row, place in enumerate(places):
            banned_here = self._banned_ends(place)
            if place.sequence.request.params.bad_words:
                banned_here |= _ends_of_bad_words(place.sequence)
            if banned_here and _allows_others(place.sequence, banned_here):
                banned += [(row, token) for token in banned_here]
        if banned:
            rows, tokens = zip(*banned, strict=True)
            logits = logits.clone()
            logits[list(rows), list(tokens)] = -torch.inf
        return logits

    def _banned_ends(self, place: _Place) -> frozenset[int]:
        params = place.sequence.request.params
        if place.sequence.answer_tokens + place.ahead < params.min_tokens:
            goes_on = params.ignore_eos and place.sequence.constraint is None
            return params.stop_token_ids if goes_on else self._eos | params.stop_token_ids
        if params.ignore_eos and place.sequence.constraint is not None:
            return self._eos
        return frozenset()


def _ends_of_bad_words(sequence: Sequence) -> frozenset[int]:
    """The tokens that would complete a bad word, after what the answer ends with."""
    words = sequence.request.params.bad_words
    longest = max(len(word) for word in words) - 1
    last = sequence.tokens[max(sequence.prompt_tokens, len(sequence.tokens) - longest) :]
    return frozenset(
        word[-1] for word in words if list(word[:-1]) == last[len(last) - len(word) + 1 :]
    )


def _allows_others(sequence: Sequence, tokens: frozenset[int]) -> bool:
    """Whether the sequence may take another token than these."""
    if sequence.constraint is not None:
        return sequence.constraint.allows_others_than(tokens)
    allowed = sequence.request.params.allowed_token_ids
    return allowed is None or not allowed <= tokens


def _greatest(logits: torch.Tensor) -> torch.Tensor:
    """`[rows]`: the first of each row's greatest, or of its NaN. On a CPU numpy takes a sixth of
    torch's time."""
    if logits.is_cuda:
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _apply_masks(
    logits: torch.Tensor, constrained: abc.Sequence[tuple[int, Constraint]]
) -> torch.Tensor:
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

    def __init__(
        self,
        places: abc.Sequence[_Place],
        vocab: int,
        device: torch.device,
        previous: "_Batch | None" = None,
    ) -> None:
        """`previous`: the batch of the step before, whose token counts may go on."""
        self.places = places
        self._vocab = vocab
        self._lengths = [place.length for place in places]
        params = [place.sequence.request.params for place in places]
        random = [row for row, p in enumerate(params) if p.temperature > 0]
        truncated = [row for row in random if params[row].top_k > 0 or params[row].top_p < 1]
        plain = [row for row in random if row not in truncated]
        self.random = [
            _RandomRows(rows, places, truncates, device)
            for rows, truncates in ((plain, False), (truncated, True))
            if rows
        ]
        bias = [(row, t, b) for row, p in enumerate(params) for t, b in p.logit_bias.items()]
        self._bias = Bias(bias, device) if bias else None
        allowed = {row: p.allowed_token_ids for row, p in enumerate(params) if p.allowed_token_ids}
        self._allowed = Allowed(allowed, vocab, device) if allowed else None
        self._penalties: Penalties | None = None
        penalised = [row for row, p in enumerate(params) if p.is_penalised]
        if penalised:
            self._penalised = torch.tensor(penalised, device=device)
            sequences = [places[row].sequence for row in penalised]
            known = None if previous is None else previous._penalties
            goes_on = known is not None and known.fits(sequences, vocab)
            self._penalties = known if goes_on else Penalties(sequences, vocab, device)

    def fits(self, places: abc.Sequence[_Place], vocab: int) -> bool:
        """Whether these are the rows that this state was made for, one token on."""
        if len(places) != len(self.places) or vocab != self._vocab:
            return False
        if any(a.sequence is not b.sequence for a, b in zip(places, self.places, strict=True)):
            return False
        if [place.length for place in places] != [length + 1 for length in self._lengths]:
            return False
        self._lengths = [length + 1 for length in self._lengths]
        return True

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Penalties (OpenAI's on the answer, repetition on prompt and answer), then biases, then
        the tokens that are allowed at all."""
        if self._penalties is not None:
            penalised = self._penalties.apply(logits[self._penalised])
            logits = logits.index_copy(0, self._penalised, penalised)
        if self._bias is not None:
            logits = logits.index_put(self._bias.index, self._bias.values, accumulate=True)
        if self._allowed is not None:
            logits = self._allowed.apply(logits)
        return logits

    def count(self, tokens: torch.Tensor) -> None:
        """Take note of this step's `[rows]` tokens."""
        if self._penalties is not None:
            self._penalties.count(tokens[self._penalised])


class _RandomRows:
    """Rows of a batch that draw at random: either all of them truncate (top-k, top-p), or none."""

    def __init__(
        self, rows: list[int], places: abc.Sequence[_Place], truncates: bool, device: torch.device
    ) -> None:
        self.rows = torch.tensor(rows, device=device)
        self._draws = [(places[row].sequence.draws, places[row].ahead) for row in rows]
        self._truncates = truncates
        params = [places[row].sequence.request.params for row in rows]
        self._temperature = column([p.temperature for p in params], device)
        self._top_k = column([p.top_k for p in params], device)
        self._top_p = column([p.top_p for p in params], device)
        self._min_p = column([p.min_p for p in params], device)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """`[rows]` tokens for `[rows, vocab]`, by one of the sequence's own numbers each."""
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
        """Each row is of another sequence, and takes the token that was drawn."""
        for draws, _ in self._draws:
            draws.take(1)

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
    """For each token, of that row of the logits: if wanted, its logprob and the `wanted` best."""
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
