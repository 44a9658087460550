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
        include_stop: bool = False,
    ) -> None:
        """`include_stop`: a stop string ends the text as its last part, rather than being cut."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(
            ids=list(prompt[-_CONTEXT_TOKENS:]), skip_special_tokens=skip_special_tokens
        )
        self._skip_special_tokens = skip_special_tokens
        self._stop = [s for s in stop if s]
        self._include_stop = include_stop
        self.stopped_by: str | None = None
        """The stop string that has come up."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self._incomplete: list[int] = []
        """Tokens since the last whole character."""

    def push(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string has come up.

        Without `may_stop` none can: what comes up then is text like any other, and stays it.
        """
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            self._incomplete.append(token)
            return "", False
        self._incomplete.clear()
        return self._release(piece, may_stop)

    def finish(self, may_stop: bool = True) -> str:
        """What is left when no more tokens come."""
        tail = ""
        if self._incomplete:
            tail = self._tokenizer.decode(
                self._incomplete, skip_special_tokens=self._skip_special_tokens
            )
        text, stopped = self._release(tail, may_stop)
        return text if stopped else text + self._held

    def _release(self, piece: str, may_stop: bool) -> tuple[str, bool]:
        text = self._held + piece
        if may_stop and self._stop:
            # A stop string ends in what is new: one that was held has been passed already.
            fresh = len(self._held) + 1
            found = [(text.find(s, max(0, fresh - len(s))), s) for s in self._stop]
            at, stop = min((each for each in found if each[0] >= 0), default=(-1, ""))
            if at >= 0:
                self._held = ""
                self.stopped_by = stop
                return text[: at + len(stop)] if self._include_stop else text[:at], True
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        certain = len(text) - kept
        self._held = text[certain:]
        return text[:certain], False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
