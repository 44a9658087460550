"""What the API expects of an engine, whichever it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from transformers import GenerationConfig, PreTrainedTokenizerFast

from server.engine.constraints.grammars import Grammars
from server.engine.request import GenerationRequest, Output
from server.engine.stats import EngineStats


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
    """What the decoder of an encoder-decoder begins with; None for other models."""

    def room_after(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt; below 0: by how many it is too long itself."""
        room = self.max_model_len - prompt_tokens
        if self.decoder_start is None or room < 0:
            return room
        return self.max_model_len - len(self.decoder_start)


class Engine(Protocol):
    """Answers generation requests over one base model. Every method may be called by any thread.

    Each submitted request has one last output. Requests that a dead engine leaves behind end with
    ERROR and the text of EngineDead.
    """

    model: ServedModel
    grammars: Grammars
    """Compiles the constraints of requests."""

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Begin to work. `deliver` is called with what each step brought; it must not block."""

    def submit(self, *requests: GenerationRequest) -> None:
        """Queue requests, all of them or none; never blocks. Until this returns, their leases are
        the caller's.

        Raises QueueFull, EngineStopping, EngineDead.
        """

    def cancel(self, request_id: str) -> None:
        """The request still ends with one output, CANCELLED, unless it has ended already."""

    def expecting(self) -> AbstractContextManager[None]:
        """Within: a request is made ready that will be submitted right after, unless this raises.

        An idle engine waits a moment for it, so that requests that come together start together.
        """

    def wake(self) -> None:
        """Something beside requests may have changed: which adapters are kept on the device."""

    def stats(self) -> EngineStats: ...

    def stop(self, timeout: float) -> None:
        """Refuse new requests, let the running ones end for up to `timeout` seconds, and cancel the
        rest."""
