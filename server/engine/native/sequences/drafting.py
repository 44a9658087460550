"""Drafts how a sequence goes on, out of its own text (prompt lookup).

What followed the latest tokens where they stood before is drafted to follow them again. A draft
costs a few look-ups; how often drafts are accepted is learned for each sequence, token by token.
"""

from collections import abc
from itertools import pairwise

_NONE = -1
"""Between two texts: no token."""
_PAIR, _TRIPLE = 2, 3
"""Tokens whose return makes a place worth expecting more from."""
_BITS = 32
"""Bits of a token, where several make one number."""
_SURE = 6
"""Tokens in agreement from which on more of them say nothing new."""
_RATES = (0.05, 0.3, 0.45, 0.5, 0.65, 0.75, 0.9)
"""How often drafted tokens are accepted at first, by how many tokens before them agree."""
_WEIGHT = 0.15
"""How much the latest drafted token counts among all."""
_LEAST = 0.05
"""A drafted token less likely than this is worth its computation on no machine."""


class Drafter:
    """Follows one sequence; each of its tokens is read once, at a constant cost.

    It stands at the place whose text it expects next: where the last three tokens, else the last
    two, stood latest, and from there on as long as that text agrees. A token that differs is first
    taken for one exchanged: the place stays, until a better one is found.
    """

    def __init__(self, prompt: abc.Sequence[int], prediction: abc.Sequence[int] = ()) -> None:
        """`prediction`: a text that the answer is expected to follow, from its first token on.

        Nothing is computed before the first `read`.
        """
        self._prompt = prompt
        self._prediction = prediction
        self._text: list[int] = []
        self._places: dict[int, int] = {}
        """Two or three tokens, as one number -> where the token after them stands, the latest
        time. (Tuples would keep the garbage collector busy.)"""
        self._at: int | None = None
        """Below the text's length."""
        self._agreeing = 0
        """Tokens before that place which are those before the text's end."""
        self._rates = list(_RATES)
        self._read = 0
        self.predicted_tokens = 0
        """Tokens of the answer that were expected from the prediction."""

    def read(self, tokens: abc.Sequence[int]) -> None:
        """Take in what the sequence, prompt and answer, has got since the last call."""
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
        """How likely the next 1, 2, … drafted tokens, `most` at most, are all accepted."""
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
        """The next `count` tokens, no more than there are chances for."""
        assert self._at is not None, "without a place there are no chances"
        return tuple(self._token_at(self._at + ahead) for ahead in range(count))

    def _token_at(self, place: int) -> int:
        """The token at a place; past the end, what leads there comes over and over."""
        assert self._at is not None
        end = len(self._text)
        if place >= end:
            place = self._at + (place - self._at) % (end - self._at)
        return self._text[place]

    def _check(self, token: int) -> None:
        """Whether the answer's next token is the one that was expected."""
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
        """Note the token, and find the place that agrees in most tokens."""
        text = self._text
        text.append(token)
        if len(text) >= _PAIR:
            pair = _joined(text[-2], token, 1)
            self._expect(pair, _PAIR)
        if len(text) >= _TRIPLE:
            self._expect(_joined(text[-3], pair, 2), _TRIPLE)

    def _expect(self, latest: int, length: int) -> None:
        """Note what the text ends with, and go where it stood before if that agrees in more."""
        found = self._places.get(latest)
        if found is not None and (self._at is None or self._agreeing < length):
            self._at, self._agreeing = found, length
        self._places[latest] = len(self._text)

    def _store(self, tokens: abc.Sequence[int]) -> None:
        """Note a text at once."""
        first, end = len(self._text), len(self._text) + len(tokens) + 1
        self._text += tokens
        pairs = [_joined(a, b, 1) for a, b in pairwise(tokens)]
        triples = [_joined(a, pair, 2) for a, pair in zip(tokens, pairs[1:], strict=False)]
        self._places.update(zip(pairs, range(first + _PAIR, end), strict=False))
        self._places.update(zip(triples, range(first + _TRIPLE, end), strict=False))


def _joined(token: int, later: int, tokens: int) -> int:
    """A token before others, `tokens` of them, as one number; fewer tokens never give the same."""
    return (token - _NONE + 1) << (_BITS * tokens) | later
