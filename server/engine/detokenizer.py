"""A request's text, as its tokens come: whole characters, and never a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

_CONTEXT_TOKENS = 8
"""Of the prompt: enough for a decoder that joins a token to the one before it."""


class Detokenizer:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Sequence[int],
        stop: Sequence[str],
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(
            ids=list(prompt[-_CONTEXT_TOKENS:]), skip_special_tokens=skip_special_tokens
        )
        self._skip_special_tokens = skip_special_tokens
        self._stop = [s for s in stop if s]
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self._incomplete: list[int] = []
        """Tokens since the last whole character."""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string has come up (and was cut)."""
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            self._incomplete.append(token)
            return "", False
        self._incomplete.clear()
        return self._release(self._held + piece)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        tail = ""
        if self._incomplete:
            tail = self._tokenizer.decode(
                self._incomplete, skip_special_tokens=self._skip_special_tokens
            )
        text, stopped = self._release(self._held + tail)
        return text if stopped else text + self._held

    def _release(self, text: str) -> tuple[str, bool]:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        certain = len(text) - kept
        self._held = text[certain:]
        return text[:certain], False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
