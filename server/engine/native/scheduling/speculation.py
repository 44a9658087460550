"""Which rows of a step are drafted, and how far: as much as makes tokens come faster.

A row that is drafted computes its drafted tokens beside its own, and takes as many as it would have
drawn itself. What that costs is learned from the steps that ran, so that it is done where computing
more tokens costs little (few rows; a device that waits for memory) and left where it does not pay.
"""

import math
from bisect import bisect_left
from dataclasses import replace

from server.engine.native.scheduling.prefixes import Prefixes
from server.engine.native.sequences.drafting import Drafter
from server.engine.native.sequences.sequence import Sequence
from server.engine.native.sequences.step import Draft, Step
from server.engine.request import GenerationRequest

MOST = 16
"""Tokens that are drafted for one row, at most."""
_GAIN = 1.1
"""Tokens in a second, against those without drafts, that drafts must promise: less is noise."""
_WEIGHT = 0.1
"""How much the latest measurement counts among all."""
_FORGETTING = 0.01
"""What each step without drafts takes off a surcharge, so that drafts are tried again."""


class StepCosts:
    """How long steps take, by the number of their tokens, as learned from those that ran."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, float]] = {}
        """Quarter of an octave -> tokens and seconds, averaged."""

    def learn(self, tokens: int, seconds: float) -> None:
        """What disturbs a step makes it longer, so a shorter one is believed at once."""
        octave = round(4 * math.log2(tokens))
        usual, known = self._known.get(octave, (tokens, seconds))
        usual += _WEIGHT * (tokens - usual)
        known = min(seconds, known + _WEIGHT * (seconds - known))
        self._known = dict(sorted({**self._known, octave: (usual, known)}.items()))

    def seconds(self, tokens: int) -> float:
        """Between two that are known, on the line between them; outside, in proportion."""
        known = list(self._known.values())
        above = bisect_left([each for each, _ in known], tokens)
        if above == 0 or above == len(known):
            nearest, seconds = known[min(above, len(known) - 1)]
            return seconds * max(1.0, tokens / nearest)
        (low, fast), (high, slow) = known[above - 1 : above + 1]
        return fast + (slow - fast) * (tokens - low) / (high - low)


class Speculation:
    def __init__(self, *, by_default: bool, possible: bool) -> None:
        """`by_default`: for requests that do not say. `possible`: the runner takes several tokens
        of a decoding row at once."""
        self._by_default = by_default
        self._possible = possible
        self.costs = StepCosts()
        self._surcharge = 1.0
        """How much longer steps with drafts take than others of as many tokens."""
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def drafter(self, request: GenerationRequest) -> Drafter | None:
        """None: the request is never drafted. Penalties, bad words and a grammar depend on the
        tokens before, drafts included; they are left out rather than computed for each."""
        asked = request.speculation
        wanted = self._by_default or bool(request.prediction) if asked is None else asked
        params = request.params
        depends = params.grammar is not None or params.is_penalised or bool(params.bad_words)
        if not (self._possible and wanted and params.max_tokens > 1) or depends:
            return None
        return Drafter(request.prompt, request.prediction)

    def draft(self, step: Step, prefixes: Prefixes) -> Step:
        """The step, with some of its decoding rows drafted; `prefixes` reserves their room."""
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
        """How many drafted tokens of each sequence make the step's tokens come fastest."""
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
        """A step took this long, and `accepted` of its drafted tokens were taken."""
        if step.drafts:
            self.drafted_tokens += sum(len(draft.tokens) for draft in step.drafts)
            self.accepted_tokens += accepted
            usual = self.costs.seconds(step.tokens)
            self._surcharge += _WEIGHT * (seconds / usual - self._surcharge)
        else:
            self.costs.learn(step.tokens, seconds)
            self._surcharge += _FORGETTING * (1.0 - self._surcharge)


def _counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, … and `most`: enough to be near the best of all."""
    counts = [1 << power for power in range(most.bit_length())]
    counts += [3 * count // 2 for count in counts if count > 1]
    return [*sorted(count for count in counts if count < most), most]
