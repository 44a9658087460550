"""The scope of a key: which adapters it may use, see and change, and how much of the server."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from infuse.adapters.errors import BadSource
from infuse.adapters.sources.source_url import Source, parse_prefixes

_PATTERN = r"^[A-Za-z0-9._/*?\[\]!-]+$"
Pattern = Annotated[str, StringConstraints(pattern=_PATTERN, max_length=256)]
"""As a shell's: `*` for any characters, `?` for one, `[ab]` for one of these."""
Count = Annotated[int, Field(ge=1)]


class AdapterPatterns(BaseModel):
    """The names of the adapters that a key reaches. A key sees what it may use or change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: tuple[Pattern, ...] = ()
    see: tuple[Pattern, ...] = ()
    change: tuple[Pattern, ...] = ()

    def may_use(self, name: str) -> bool:
        return matches(name, self.use)

    def may_change(self, name: str) -> bool:
        return matches(name, self.change)

    def may_see(self, name: str) -> bool:
        return matches(name, (*self.use, *self.see, *self.change))


class Scope(BaseModel):
    """What a key may do within its roles. A limit that is None is not set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: AdapterPatterns | None = None
    """None: all adapters, and what else tenants do not see of each other."""
    sources: tuple[str, ...] | None = None
    """What the URLs that it fetches adapters from begin with. None: whatever the server allows, or
    nothing where `adapters` is given."""
    max_adapters: Count | None = None
    """How many adapters there may be that it may change."""
    max_adapter_bytes: Count | None = None
    """The bytes of all their revisions."""
    max_merges: Annotated[int, Field(ge=0)] | None = None
    """How many merges of its own are kept, waiting ones included."""
    weight: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Its share of the model beside others whose requests wait: with 2, twice as many tokens as a
    key with 1, which is what a key without a weight has."""
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    """Tokens of prompts and answers."""
    burst_tokens: Count | None = None
    """How many of these may be used at once. None: a minute's worth."""
    guaranteed_tokens_per_minute: Count | None = None
    """Its requests start ahead of other keys' until it has had so many."""
    max_requests_at_once: Count | None = None
    max_queue_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of the queue's places that its choices and prompts may take."""
    max_prompt_tokens: Count | None = None
    max_answer_tokens: Count | None = None

    @field_validator("sources")
    @classmethod
    def _are_prefixes(cls, sources: tuple[str, ...] | None) -> tuple[str, ...] | None:
        try:
            parse_prefixes(",".join(sources or ()))
        except BadSource as error:
            raise ValueError(str(error)) from None
        return sources

    @model_validator(mode="after")
    def _has_rates_that_agree(self) -> Self:
        most, guaranteed = self.tokens_per_minute, self.guaranteed_tokens_per_minute
        if self.burst_tokens is not None and most is None:
            raise ValueError("burst_tokens is for a key with tokens_per_minute: give both")
        if most is not None and guaranteed is not None and guaranteed > most:
            raise ValueError(
                f"guaranteed_tokens_per_minute ({guaranteed}) is more than tokens_per_minute "
                f"({most}), which refuses what is beyond: lower the one or raise the other"
            )
        return self

    @property
    def is_tenants(self) -> bool:
        """Whether the key sees only what is its own."""
        return self.adapters is not None

    @property
    def source_prefixes(self) -> tuple[Source, ...] | None:
        """None: whatever the server allows."""
        if self.sources is None and not self.is_tenants:
            return None
        return parse_prefixes(",".join(self.sources or ()))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns, which are a shell's, matches."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
