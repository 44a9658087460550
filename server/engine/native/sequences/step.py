"""A step: the tokens that one forward computes, as the scheduler has planned them."""

from dataclasses import dataclass, field

from infuse.server.engine.native.sequences.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """A decoding row with the tokens that are drafted to follow its latest token."""

    sequence: Sequence
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The work of one forward: one token of each decoding row in the cache's order, then the chunks
    of prompts, then the decoding rows that compute drafted tokens too."""

    decode: list[Sequence]
    prefill: list[tuple[Sequence, int]]
    """Sequences, each with how many of its next tokens to compute."""
    drafts: list[Draft] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.drafts)

    @property
    def sequences(self) -> list[Sequence]:
        chunks = (sequence for sequence, _ in self.prefill)
        return [*self.decode, *chunks, *(draft.sequence for draft in self.drafts)]

    @property
    def tokens(self) -> int:
        """How many tokens the forward computes."""
        chunks = sum(tokens for _, tokens in self.prefill)
        return len(self.decode) + chunks + sum(1 + len(draft.tokens) for draft in self.drafts)
