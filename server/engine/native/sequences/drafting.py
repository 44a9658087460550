"""Drafts a sequence's next tokens from its own text (prompt lookup).

If the latest tokens occurred before, the tokens that followed them there are drafted. A draft costs
a few look-ups. Each sequence learns how often its drafts are accepted, token by token.
"""

from collections import abc
from itertools import pairwise

_NONE = -1
"""Separates two texts; no token has this id."""
_PAIR, _TRIPLE = 2, 3
"""Lengths of the n-grams that are looked up."""
_BITS = 32
"""Bits of a token in a number that holds several."""
_SURE = 6
"""The most matching tokens that are counted. More do not change the acceptance rate."""
_RATES = (0.05, 0.3, 0.45, 0.5, 0.65, 0.75, 0.9)
"""Initial acceptance rates by the number of matching tokens before a drafted token."""
_WEIGHT = 0.15
"""The weight of the latest token in an acceptance rate."""
_LEAST = 0.05
"""The least chance of acceptance for which a token is drafted: below it pays on no machine."""


class Drafter:
    """Drafts for one sequence. It reads each token once, at a constant cost.

    The drafter keeps a position in the text from which it drafts: after the latest earlier
    occurrence of the last three tokens, else of the last two. The position moves on with every
    token. It also stays after a token that differs, since that one may be a replacement, until the
    last tokens are found elsewhere.
    """

    def __init__(self, prompt: abc.Sequence[int], prediction: abc.Sequence[int] = ()) -> None:
        """`prediction`: a text that the answer is expected to repeat, from its first token on.

        Nothing is computed before the first `read`.
        """
        self._prompt = prompt
        self._prediction = prediction
        self._text: list[int] = []
        self._positions: dict[int, int] = {}
        """Two or three tokens, as one number -> the position after their latest occurrence. (Tuples
        would keep the garbage collector busy.)"""
        self._at: int | None = None
        """The position in the text of the next drafted token. None: nothing is drafted."""
        self._agreeing = 0
        """How many tokens before that position equal the last tokens of the text."""
        self._rates = list(_RATES)
        self._read = 0
        self.predicted_tokens = 0
        """How many tokens of the answer were drafted rightly from the prediction."""

    def read(self, tokens: abc.Sequence[int]) -> None:
        """Read the tokens of prompt and answer that were added since the last call."""
        if self._read == 0:
            self._begin()
        for token in tokens[self._read :]:
            self._check(token)
            self._append(token)
        self._read = len(tokens)

    def _begin(self) -> None:
        if self._prediction:
            self._store([*self._prediction, _NONE])
        self._store(self._prompt[:-1])
        self._append(self._prompt[-1])
        self._read = len(self._prompt)
        if self._prediction:
            self._at, self._agreeing = 0, _SURE

    def chances(self, most: int) -> list[float]:
        """The chances that the first 1, 2, … drafted tokens, at most `most`, are all accepted."""
        chances: list[float] = []
        if self._at is None:
            return chances
        chance, agreeing = 1.0, self._agreeing
        for ahead in range(most):
            chance *= self._rates[min(agreeing, _SURE)]
            if chance < _LEAST or self._token_at(self._at + ahead) == _NONE:
                break
            chances.append(chance)
            agreeing += 1
        return chances

    def draft(self, count: int) -> tuple[int, ...]:
        """Draft `count` tokens, at most as many as `chances` gave."""
        assert self._at is not None, "without a position there are no chances"
        return tuple(self._token_at(self._at + ahead) for ahead in range(count))

    def _token_at(self, position: int) -> int:
        """The token at a position. Past the end the tokens from `_at` to the end are repeated."""
        assert self._at is not None
        end = len(self._text)
        if position >= end:
            position = self._at + (position - self._at) % (end - self._at)
        return self._text[position]

    def _check(self, token: int) -> None:
        """Compare a new token with the drafted one, and learn from it."""
        if self._at is None:
            return
        expected = self._text[self._at]
        if expected == _NONE:
            self._at = None
            return
        rate = self._rates[min(self._agreeing, _SURE)]
        self._rates[min(self._agreeing, _SURE)] += _WEIGHT * ((expected == token) - rate)
        self.predicted_tokens += expected == token and self._at < len(self._prediction)
        self._agreeing = self._agreeing + 1 if expected == token else 0
        self._at += 1

    def _append(self, token: int) -> None:
        """Add a token to the text, and move to an earlier occurrence of the last tokens."""
        text = self._text
        text.append(token)
        if len(text) >= _PAIR:
            pair = _joined(text[-2], token, 1)
            self._look_up(pair, _PAIR)
        if len(text) >= _TRIPLE:
            self._look_up(_joined(text[-3], pair, 2), _TRIPLE)

    def _look_up(self, latest: int, length: int) -> None:
        """Move to the latest occurrence of the text's last `length` tokens, if more tokens match
        there, and note the new occurrence."""
        found = self._positions.get(latest)
        if found is not None and (self._at is None or self._agreeing < length):
            self._at, self._agreeing = found, length
        self._positions[latest] = len(self._text)

    def _store(self, tokens: abc.Sequence[int]) -> None:
        """Add a whole text and note its n-grams."""
        first, end = len(self._text), len(self._text) + len(tokens) + 1
        self._text += tokens
        pairs = [_joined(a, b, 1) for a, b in pairwise(tokens)]
        triples = [_joined(a, pair, 2) for a, pair in zip(tokens, pairs[1:], strict=False)]
        self._positions.update(zip(pairs, range(first + _PAIR, end), strict=False))
        self._positions.update(zip(triples, range(first + _TRIPLE, end), strict=False))


def _joined(token: int, later: int, tokens: int) -> int:
    """Join a token and `tokens` later ones to one number, which differs for each length."""
    return (token - _NONE + 1) << (_BITS * tokens) | later
