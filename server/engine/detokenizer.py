"""The detokenizer: a request's text as its tokens come, in whole characters until a stop string."""

import codecs
from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from infuse.server.engine.byte_tokens import byte_of
from infuse.server.engine.panics import is_panic

_CONTEXT_TOKENS = 8
"""Tokens before a new token that are decoded with it: enough for decoders that join tokens."""
_MOST_TOKENS = 32
"""The most tokens that are decoded together. A character takes at most four, so a replacement
character that has stayed this long is no incomplete character."""
_BROKEN = "\ufffd"
"""The replacement character, which decoders write for invalid bytes and incomplete characters."""


class Detokenizer:
    """Decodes tokens one at a time: each is decoded with a few tokens before it, and adds its text.

    The pieces together are the answer's part of the tokenizer's text of prompt and answer, as far
    as that is valid. A decoder may change text that was returned already (for an incomplete
    character, byte fallback also replaces the character before it), or raise. Then the token is
    decoded with fewer tokens before it, at last alone, and the text continues from there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Sequence[int],
        stop: Sequence[str],
        skip_special_tokens: bool,
        include_stop: bool = False,
    ) -> None:
        """`include_stop`: the text ends with the stop string instead of before it."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._prompt = prompt
        self._skip_special_tokens = skip_special_tokens
        decoder = self._tokenizer.decoder
        self._byte_fallback = decoder is not None and b"ByteFallback" in decoder.__getstate__()
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        """Holds the bytes of an incomplete character whose bytes are tokens."""
        self._bytes_of_prompt = False
        """Whether all of those bytes belong to the prompt."""
        self._stream: DecodeStream | None = None
        """Does the same as `_text_of` in a third of the time, as long as every token completes its
        characters. None: that is not known."""
        self._window: list[int] | None = None
        """The latest tokens. None: there was no token yet."""
        self._whole = 0
        """How many tokens of the window have given all their text."""
        self._given = ""
        """The part of the window's text that was returned or belongs to the prompt."""
        self._undecided = ""
        """The replacement character after that part, which may be an incomplete character."""
        self._stop = [s for s in stop if s]
        self._include_stop = include_stop
        self.stopped_by: str | None = None
        """The stop string that was found."""
        self._held = ""
        """Text that is held back because it may begin a stop string."""

    def push(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """Add a token. Returns the text that is now certain, and whether a stop string was found.

        Without `may_stop`, a stop string is ordinary text, and stays so. Raises RuntimeError if the
        tokenizer cannot decode the token, not even alone.
        """
        piece = None if self._stream is None else self._next_piece(self._stream, token)
        if piece is None:
            piece = self._text_of(token)
        return self._release(piece, may_stop) if piece and self._stop else (piece, False)

    def finish(self, may_stop: bool = True) -> str:
        """The rest of the text, when no more tokens come."""
        text, stopped = self._release(self._undecided + self._rest_of_bytes(), may_stop)
        return text if stopped else text + self._held

    def _next_piece(self, stream: DecodeStream, token: int) -> str | None:
        """A token's text by the stream. None: the stream cannot decode it, and is dropped."""
        assert self._window is not None
        piece = None
        if not (self._byte_fallback and self._byte_of(token)):
            try:
                piece = stream.step(self._tokenizer, token)
            except BaseException as error:
                if not (isinstance(error, Exception) or is_panic(error)):
                    raise
        if piece is not None:
            self._window.append(token)
            if len(self._window) > _MOST_TOKENS:
                del self._window[:-_CONTEXT_TOKENS]
            return piece
        self._stream = None
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._whole = len(self._window)
        self._given = self._decode(self._window) or ""
        return None

    def _begin(self) -> None:
        """Start with the end of the prompt: as many of its tokens as needed for some text."""
        length = _CONTEXT_TOKENS
        text = self._decode(self._prompt[-length:])
        while not text and length < len(self._prompt):
            length *= 2
            text = self._decode(self._prompt[-length:])
        self._given = text or ""
        self._window = [] if text is None else list(self._prompt[-length:])
        self._whole = len(self._window)
        for token in self._window if self._byte_fallback else ():
            if byte := self._byte_of(token):
                self._bytes.decode(byte)
            elif not self._is_skipped(token):
                self._bytes.reset()
        self._bytes_of_prompt = True

    def _text_of(self, token: int) -> str:
        if self._window is None:
            self._begin()
        byte = self._byte_of(token)
        if byte is None:
            text = self._text_in_context(token)
            if not text:
                return ""
            if self._window and not self._undecided and not self._given.endswith(_BROKEN):
                self._stream = DecodeStream(
                    ids=self._window, skip_special_tokens=self._skip_special_tokens
                )
            return self._rest_of_bytes() + text
        # The next token that is no byte needs this one as context, for the space between them.
        self._window, self._whole = [token], 1
        self._given = self._decode(self._window) or ""
        text = self._bytes.decode(byte)
        if text and self._bytes_of_prompt:
            text = text.removeprefix(_BROKEN)
        self._bytes_of_prompt &= not text
        return text

    def _byte_of(self, token: int) -> bytes | None:
        if not self._byte_fallback:
            return None
        return byte_of(self._tokenizer.id_to_token(token) or "")

    def _rest_of_bytes(self) -> str:
        """The replacement character for an incomplete character, unless it is the prompt's."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return "" if self._bytes_of_prompt else rest

    def _text_in_context(self, token: int) -> str:
        """The text that a token adds, without an incomplete character at its end."""
        assert self._window is not None
        start, kept, text = self._find_context(token)
        window = [*self._window[start:], token]
        before = "" if start == 0 else self._undecided
        whole = max(0, self._whole - start)
        new = text[kept:]
        if start == 0 and new == self._undecided and self._is_skipped(token):
            return ""
        may_be_half = text.endswith(_BROKEN) and not self._byte_fallback
        if may_be_half and len(window) < _MOST_TOKENS:
            out, self._undecided = new[:-1], new[-1:]
            self._window, self._whole, self._given = window, whole, text.removesuffix(new[-1:])
            return before + out
        self._undecided = ""
        self._window, self._given = window, text
        if new or len(window) >= _MOST_TOKENS:
            latest = window[whole:] if new and not may_be_half else window[-_CONTEXT_TOKENS:]
            self._window, self._whole = latest, len(latest)
            self._given = self._decode(latest) or ""
        return before + new

    def _find_context(self, token: int) -> tuple[int, int, str]:
        """Find the start in the window from which decoding a token keeps the text returned so far.

        Returns the start, how many characters of the decoded text were returned, and that text.
        """
        assert self._window is not None
        for start in range(len(self._window)):
            context = self._window[start:]
            given = self._given if start == 0 else self._decode(context)
            text = self._decode([*context, token])
            if given is None or text is None:
                continue
            if text.startswith(given):
                return start, len(given), text
            if given.endswith(_BROKEN) and text.startswith(given[:-1]):
                # The token completes the prompt's last character.
                return start, len(given) - 1, text
        text = self._decode([token])
        if text is None:
            raise RuntimeError(f"its tokenizer cannot decode the token {token}.")
        return len(self._window), 0, text

    def _is_skipped(self, token: int) -> bool:
        if not self._skip_special_tokens or self._decode([token]):
            return False
        return bool(self._tokenizer.decode([token], skip_special_tokens=False))

    def _decode(self, tokens: Sequence[int]) -> str | None:
        """Decode tokens. None: the tokenizer raised an Exception or panicked."""
        try:
            return self._tokenizer.decode(
                list(tokens), skip_special_tokens=self._skip_special_tokens
            )
        except BaseException as error:
            if isinstance(error, Exception) or is_panic(error):
                return None
            raise

    def _release(self, piece: str, may_stop: bool) -> tuple[str, bool]:
        text = self._held + piece
        if may_stop and self._stop:
            # A stop string ends in the new piece: held text was searched before.
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
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
