"""The caller of a request: what its key may do, and what it uses already."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from infuse.adapters.errors import UnknownAdapter
from infuse.adapters.storage.quota import Quota
from infuse.adapters.storage.stored import StoredAdapters
from infuse.server.errors import ApiError
from infuse.server.keys.scope import Scope
from infuse.server.keys.usage import Usage

SCOPE_KEY = "infuse.caller"
"""Where `Authorize` leaves the caller in a request's ASGI scope."""
_EVERYTHING = Scope()


@dataclass(frozen=True, slots=True)
class Caller:
    """Without keys, everybody has no name and may do everything.

    An adapter that a caller may not see is one that does not exist: both are refused before they
    are looked up, so that neither the answer nor its time tells them apart.
    """

    name: str | None = None
    scope: Scope = _EVERYTHING
    usage: Usage = field(default_factory=Usage)

    # What it reaches.

    def sees(self, name: str) -> bool:
        return self.scope.adapters is None or self.scope.adapters.may_see(name)

    def check_sees(self, name: str) -> None:
        """`name`, or `name@revision`. Raises UnknownAdapter."""
        bare = name.partition("@")[0]
        if not self.sees(bare):
            raise UnknownAdapter(bare)

    def check_uses(self, name: str) -> None:
        """`name`, or `name@revision`. Raises UnknownAdapter, ApiError 403."""
        self.check_sees(name)
        bare = name.partition("@")[0]
        if self.scope.adapters is not None and not self.scope.adapters.may_use(bare):
            raise self._refused(f"use the adapter '{bare}'", "adapters.use", "model")

    def check_changes(self, name: str) -> None:
        """Raises UnknownAdapter, ApiError 403."""
        self.check_sees(name)
        self.check_creates(name)

    def check_creates(self, name: str) -> None:
        """Whether there is an adapter of this name or not. Raises ApiError 403."""
        if self.scope.adapters is not None and not self.scope.adapters.may_change(name):
            raise self._refused(f"change adapters named '{name}'", "adapters.change", "name")

    def check_pins(self) -> None:
        """Raises ApiError 403."""
        if self.scope.is_tenants:
            what = "pin or unpin adapters, which takes room of the device from other keys"
            raise self._refused(what, "adapters", "pinned")

    def _refused(self, what: str, where: str, param: str) -> ApiError:
        message = f"The key '{self.name}' may not {what}: its scope says so ({where})."
        return ApiError(403, message, code="out_of_scope", param=param)

    def visible(
        self, stored: StoredAdapters, after: str | None, limit: int | None
    ) -> Sequence[str]:
        """The names that it sees, in order: at most `limit` of those after `after`."""
        if not self.scope.is_tenants:
            return stored.names(after, limit)
        return list(islice(filter(self.sees, stored.names(after)), limit))

    def owns(self, by: str | None) -> bool:
        """Whether it may see what the key named `by` has made."""
        return not self.scope.is_tenants or by == self.name

    @property
    def quota(self) -> Quota | None:
        """What the adapters that it may change may take together."""
        scope = self.scope
        if scope.max_adapters is None and scope.max_adapter_bytes is None:
            return None
        covers = (lambda _: True) if scope.adapters is None else scope.adapters.may_change
        return Quota(covers, scope.max_adapters, scope.max_adapter_bytes)

    # How much it uses.

    @property
    def weight(self) -> float:
        """Its share of the model, beside others'."""
        return self.scope.weight or 1.0

    @property
    def guaranteed(self) -> int:
        """The tokens a minute that it gets ahead of others."""
        return self.scope.guaranteed_tokens_per_minute or 0

    def check_order(self, requests: int, tokens: int, capacity: int) -> None:
        """Check that so many requests to the engine may be submitted now, with so many tokens in
        their prompts. `capacity`: the queue's. Raises ApiError 400, 429."""
        scope, usage = self.scope, self.usage
        if scope.max_queue_share is not None:
            most = max(1, int(scope.max_queue_share * capacity))
            if requests > most:
                message = (
                    f"This is {requests} choices and prompts, and the key '{self.name}' may have "
                    f"{most} in the queue: send fewer at once."
                )
                raise ApiError(400, message, code="scope_exceeded")
            if usage.queued + requests > most:
                raise self._too_many(f"{most} choices and prompts in the queue", 1.0)
        self.check_tokens(tokens)

    def check_tokens(self, tokens: int) -> None:
        """Check that prompts of so many tokens keep to its rate now. Raises ApiError 429."""
        per_minute, burst = self.scope.tokens_per_minute, self.scope.burst_tokens
        seconds = self.usage.tokens.seconds_until(tokens, per_minute, burst)
        if seconds:
            at_once = "" if burst is None else f", {burst} at once"
            raise self._too_many(f"{per_minute} tokens a minute{at_once}", seconds)

    def begin_order(self, requests: int, tokens: int) -> None:
        self.usage.queued += requests
        self.spend_tokens(tokens)

    def end_request(self) -> None:
        """Note that one request of an order has ended."""
        self.usage.queued -= 1

    def spend_tokens(self, count: int) -> None:
        self.usage.tokens.spend(count, self.scope.tokens_per_minute)

    def begin_http(self, most_at_once: int) -> None:
        """Count an HTTP request until `end_http`. `most_at_once`: the server's limit. Raises
        ApiError 429."""
        scope, usage = self.scope, self.usage
        most = min(scope.max_requests_at_once or most_at_once, most_at_once)
        if usage.at_once >= most:
            message = f"The key '{self.name}' has {most} requests at once already."
            headers = {"Retry-After": "1"}
            raise ApiError(429, message, code="too_many_requests", headers=headers)
        seconds = usage.requests.seconds_until(1, scope.requests_per_minute)
        if seconds:
            raise self._too_many(f"{scope.requests_per_minute} requests a minute", seconds)
        usage.requests.spend(1, scope.requests_per_minute)
        usage.at_once += 1

    def end_http(self) -> None:
        self.usage.at_once -= 1

    def _too_many(self, limit: str, seconds: float) -> ApiError:
        retry_after = math.ceil(seconds)
        message = (
            f"The key '{self.name}' may have {limit}, and has used them; try again in "
            f"{retry_after} s."
        )
        headers = {"Retry-After": str(retry_after)}
        return ApiError(429, message, code="rate_limited", headers=headers)

    def check_prompt(self, tokens: int) -> None:
        """Raises ApiError 400."""
        most = self.scope.max_prompt_tokens
        if most is not None and tokens > most:
            message = (
                f"The prompt has {tokens} tokens, and the key '{self.name}' may send {most}: "
                "shorten it."
            )
            raise ApiError(400, message, code="scope_exceeded", param="prompt")

    def answer_tokens(self, tokens: int, field: str, asked: bool) -> int:
        """How many tokens an answer may have: `tokens`, or fewer where the request did not ask for
        so many. `field` names the limit in errors. Raises ApiError 400."""
        most = self.scope.max_answer_tokens
        if most is None or tokens <= most:
            return tokens
        if asked:
            message = (
                f"{field} is {tokens}, and the key '{self.name}' may ask for {most}: ask for fewer."
            )
            raise ApiError(400, message, code="scope_exceeded", param=field)
        return most
