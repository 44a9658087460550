"""Writes log-probabilities in OpenAI's two shapes."""

import codecs
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from infuse.server.api.chat_schemas import ChatLogprobs, ChatTokenLogprob, TopLogprob
from infuse.server.api.completion_schemas import CompletionLogprobs
from infuse.server.engine.byte_tokens import byte_of
from infuse.server.engine.request import TokenLogprob

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come; JSON has no infinity."""


_BYTE_OF_LETTER = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
"""The byte behind each letter of the alphabet that byte-level tokenizers write tokens in."""


class TokenBytes:
    """The bytes that single tokens stand for, with a token's own leading space kept.

    `tokenizer.decode` cannot say it: it joins bytes to characters and drops leading spaces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._special = {token for token, added in self._added.items() if added.special}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = backend.decoder if backend is not None else None
        self._byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._known: dict[int, bytes] = {}

    def is_special(self, token: int) -> bool:
        return token in self._special

    def __getitem__(self, token: int) -> bytes:
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._look_up(token)
        return known

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token].content).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            # A row of the output embedding beyond the tokenizer's vocabulary.
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece if letter in _BYTE_OF_LETTER)
        return byte_of(piece) or piece.replace("▁", " ").encode()


def _text_of(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _name(data: bytes) -> str:
    """A token's text; where it has none alone, its bytes as OpenAI's completions write them."""
    text = _text_of(data)
    return text if text is not None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class CompletionLogprobWriter:
    """Writes one choice's logprobs part by part, and knows where in its text each token begins."""

    def __init__(self, token_bytes: TokenBytes, skip_special_tokens: bool) -> None:
        self._bytes = token_bytes
        self._skips = skip_special_tokens
        self._part = _no_logprobs()
        self._known: str | None = None
        self.begin_text(0)

    def begin_prompt(self, text: str) -> None:
        """The next tokens are the prompt's, which is shown as this text.

        It has its special tokens only where they were written, and no blank that a tokenizer puts
        before the first word.
        """
        self.begin_text(0)
        self._known = text

    def begin_text(self, offset: int) -> None:
        """The next token begins at this character of the choice's text."""
        self._known = None
        self._offset = offset
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, tokens: Iterable[tuple[int, TokenLogprob | None]]) -> None:
        """Add tokens, each with what the engine says about it (None: a first token, unscored)."""
        for token, scored in tokens:
            self._part.tokens.append(_name(self._bytes[token]))
            self._part.text_offset.append(self._take_room(token))
            self._part.token_logprobs.append(None if scored is None else _finite(scored.logprob))
            self._part.top_logprobs.append(None if scored is None else self._top(scored))

    def _take_room(self, token: int) -> int:
        """Where the token begins in the text; the next one begins where it ends."""
        data = self._bytes[token]
        if self._bytes.is_special(token) and not self._shows(data.decode()):
            return self._offset
        own = _text_of(data)
        begin = self._offset + (0 if own is None else self._marks)
        written = self._utf8.decode(data)
        if own is None:
            self._offset += len(written)
            return begin
        if self._known is not None:
            if begin == 0 and not self._known.startswith(own):
                own = own.removeprefix(" ")
            begin = min(self._place(own, begin), len(self._known))
        self._offset = begin + len(own)
        return begin

    @property
    def _marks(self) -> int:
        """Characters of the text for bytes before, which a token of whole characters cuts off."""
        return len(self._utf8.getstate()[0].decode(errors="replace"))

    def _shows(self, special: str) -> bool:
        if self._known is None:
            return not self._skips
        begin = self._offset + self._marks
        return self._known.startswith(special, self._place(special, begin))

    def _place(self, text: str, begin: int) -> int:
        """Where the prompt has the text: a special token may have swallowed blanks around it."""
        assert self._known is not None
        rest = self._known[begin:]
        behind = begin + len(rest) - len(rest.lstrip())
        swallowed = not rest.startswith(text) and self._known.startswith(text, behind)
        return behind if swallowed else begin

    def take(self) -> CompletionLogprobs:
        """The log-probabilities that were written since the last call."""
        part, self._part = self._part, _no_logprobs()
        return part

    def _top(self, scored: TokenLogprob) -> dict[str, float]:
        named: dict[str, float] = {}
        # Different tokens can have the same text; the likeliest one is reported.
        for token, logprob in (*scored.top, (scored.token_id, scored.logprob)):
            named.setdefault(_name(self._bytes[token]), _finite(logprob))
        return named


def _no_logprobs() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


def chat_logprobs(token_bytes: TokenBytes, scored: Sequence[TokenLogprob]) -> ChatLogprobs:
    def entry(token: int, logprob: float) -> TopLogprob:
        data = token_bytes[token]
        return TopLogprob(
            token=data.decode(errors="replace"), logprob=_finite(logprob), bytes=list(data)
        )

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **entry(token.token_id, token.logprob).model_dump(),
                top_logprobs=[entry(*candidate) for candidate in token.top],
            )
            for token in scored
        ]
    )
