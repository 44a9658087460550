"""Speculation: decides how many tokens to draft for each row, so that tokens come fastest.

A drafted row computes its drafted tokens beside its own next token, and accepts those that it would
have sampled anyway. The cost is learned from the steps that ran. So rows are drafted where more
tokens cost little (in small batches, on memory-bound devices), and not where it does not pay.
"""

import math
from bisect import bisect_left
from dataclasses import replace

from infuse.server.engine.native.scheduling.prefixes import Prefixes
from infuse.server.engine.native.sequences.drafting import Drafter
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Draft, Step
from infuse.server.engine.request import GenerationRequest

MOST = 16
"""The most tokens that are drafted for one row in a step."""
_GAIN = 1.1
"""How many times as many tokens a second drafts must promise. Less is within the noise."""
_WEIGHT = 0.1
"""The weight of the latest measurement in a moving average."""
_FORGETTING = 0.01
"""The share by which each step without drafts reduces the surcharge, so that drafts are retried."""


class StepCosts:
    """Learns how long steps take by their number of tokens."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, float]] = {}
        """Quarter of an octave of tokens -> average tokens and seconds."""

    def learn(self, tokens: int, seconds: float) -> None:
        """Take in a step. Disturbances make steps longer, so a shorter time counts at once."""
        octave = round(4 * math.log2(tokens))
        usual, known = self._known.get(octave, (tokens, seconds))
        usual += _WEIGHT * (tokens - usual)
        known = min(seconds, known + _WEIGHT * (seconds - known))
        self._known = dict(sorted({**self._known, octave: (usual, known)}.items()))

    def seconds(self, tokens: int) -> float:
        """Estimate the seconds of a step: interpolate between known steps, or scale the nearest.
        0 where no step is known."""
        known = list(self._known.values())
        if not known:
            return 0.0
        above = bisect_left([each for each, _ in known], tokens)
        if above == 0 or above == len(known):
            nearest, seconds = known[min(above, len(known) - 1)]
            return seconds * max(1.0, tokens / nearest)
        (low, fast), (high, slow) = known[above - 1 : above + 1]
        return fast + (slow - fast) * (tokens - low) / (high - low)


class Speculation:
    """Adds drafts to steps where they pay, and learns from the steps what they cost."""

    def __init__(self, *, by_default: bool, possible: bool) -> None:
        """`by_default`: draft for requests that do not say. `possible`: the runner can compute
        several tokens of a decoding row in a step."""
        self._by_default = by_default
        self._possible = possible
        self.costs = StepCosts()
        self._surcharge = 1.0
        """How many times as long steps with drafts take as others with as many tokens."""
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def drafter(self, request: GenerationRequest) -> Drafter | None:
        """Make a request's drafter. None: no tokens are drafted for it.

        Penalties, bad words and grammars depend on all tokens before, drafted ones too, so requests
        that have them are not drafted.
        """
        asked = request.speculation
        wanted = self._by_default or bool(request.prediction) if asked is None else asked
        params = request.params
        depends = params.grammar is not None or params.is_penalised or bool(params.bad_words)
        if not (self._possible and wanted and params.max_tokens > 1) or depends:
            return None
        return Drafter(request.prompt, request.prediction)

    def draft(self, step: Step, prefixes: Prefixes) -> Step:
        """Add drafts to a step's decoding rows; `prefixes` makes room for the drafted tokens."""
        chances: dict[Sequence, list[float]] = {}
        for sequence in step.decode:
            if sequence.drafter is not None:
                sequence.drafter.read(sequence.tokens)
                left = sequence.request.params.max_tokens - sequence.answer_tokens
                if likely := sequence.drafter.chances(min(MOST, left - 1)):
                    chances[sequence] = likely
        if not chances:
            return step
        drafts = [
            Draft(sequence, sequence.drafter.draft(count))
            for sequence, count in self._worthwhile(step, chances).items()
            if sequence.drafter is not None and prefixes.grow(sequence, count)
        ]
        drafted = {draft.sequence for draft in drafts}
        decode = [sequence for sequence in step.decode if sequence not in drafted]
        return replace(step, decode=decode, drafts=drafts)

    def _worthwhile(self, step: Step, chances: dict[Sequence, list[float]]) -> dict[Sequence, int]:
        """Choose how many tokens to draft for each sequence, so that tokens come fastest."""
        likeliest = sorted(
            ((chance, sequence) for sequence, mine in chances.items() for chance in mine),
            key=lambda each: -each[0],
        )
        rows, tokens = len(step.decode), step.tokens
        plain = rows / self.costs.seconds(tokens)
        best, taken = _GAIN * plain, 0
        gained, counted = float(rows), 0
        for count in _counts(len(likeliest)):
            gained += sum(chance for chance, _ in likeliest[counted:count])
            counted = count
            speed = gained / (self._surcharge * self.costs.seconds(tokens + count))
            if speed > best:
                best, taken = speed, count
        worthwhile: dict[Sequence, int] = {}
        for _, sequence in likeliest[:taken]:
            worthwhile[sequence] = worthwhile.get(sequence, 0) + 1
        return worthwhile

    def learn(self, step: Step, seconds: float, accepted: int) -> None:
        """Take in how long a step took and how many of its drafted tokens were accepted."""
        if step.drafts:
            self.drafted_tokens += sum(len(draft.tokens) for draft in step.drafts)
            self.accepted_tokens += accepted
            usual = self.costs.seconds(step.tokens)
            self._surcharge += _WEIGHT * (seconds / usual - self._surcharge)
        else:
            self.costs.learn(step.tokens, seconds)
            self._surcharge += _FORGETTING * (1.0 - self._surcharge)


def _counts(most: int) -> list[int]:
    """The numbers of drafted tokens that are compared: 1, 2, 3, 4, 6, 8, 12, … and `most`."""
    counts = [1 << power for power in range(most.bit_length())]
    counts += [3 * count // 2 for count in counts if count > 1]
    return [*sorted(count for count in counts if count < most), most]
