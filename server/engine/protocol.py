"""The protocol between the API and any engine."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from transformers import GenerationConfig, PreTrainedTokenizerFast

from infuse.server.engine.constraints.grammars import Grammars
from infuse.server.engine.request import GenerationRequest, InFlight, Output
from infuse.server.engine.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The base model as requests see it."""

    tokenizer: PreTrainedTokenizerFast
    generation_config: GenerationConfig
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_model_len: int
    """How many tokens prompt and answer may have together; in an encoder-decoder, each of them."""
    decoder_start: tuple[int, ...] | None
    """The tokens that the decoder of an encoder-decoder begins with. None for other models."""

    def room_after(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt. Negative: the prompt is too long by as many."""
        room = self.max_model_len - prompt_tokens
        if self.decoder_start is None or room < 0:
            return room
        return self.max_model_len - len(self.decoder_start)


class Engine(Protocol):
    """Answers generation requests over one base model. Every method may be called by any thread.

    Each submitted request gets one last output. When the engine dies, its requests end with
    ENGINE_DEAD.
    """

    model: ServedModel
    grammars: Grammars
    """Compiles the constraints of requests."""

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Start. `deliver` is called with the outputs of each step; it must not block."""

    def submit(self, *requests: GenerationRequest) -> None:
        """Queue requests, all of them or none; never blocks. The engine owns their leases once this
        has returned. If this raises, the caller keeps them.

        Raises QueueFull, WaitTooLong, EngineStopping, EngineDead.
        """

    def cancel(self, request_id: str) -> None:
        """Cancel a request. It still gets a last output, CANCELLED, unless it has ended already."""

    def has_started(self, request_id: str) -> bool:
        """Whether a request that has not ended has left the queue."""

    def expecting(self) -> AbstractContextManager[None]:
        """Announce a request. The context prepares it; it is submitted right after, unless the
        context raises.

        An idle engine waits a moment for it, so that requests that come together start together.
        """

    def wake(self) -> None:
        """Wake an idle engine, since adapters may have been pinned or unpinned."""

    def stats(self) -> EngineStats: ...

    def in_flight(self) -> list[InFlight]:
        """Every request that has not ended."""

    def stop(self, timeout: float) -> None:
        """Refuse new requests, let the running ones end for up to `timeout` seconds, and cancel the
        rest."""
