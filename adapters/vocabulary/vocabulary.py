"""Reads the tokenizer and the chat template that an adapter's files may hold."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from infuse.adapters.checkpoint.config import (
    CHAT_TEMPLATE_FILE,
    SPECIAL_TOKENS_FILE,
    TEXT_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from infuse.adapters.checkpoint.saved import State, rows_of
from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.errors import Fault, InvalidAdapter, TemplateRefused
from infuse.adapters.vocabulary.sandbox import Exceeded, Sandbox
from infuse.adapters.vocabulary.sandboxed import surround

_MOST_BYTES = {TOKENIZER_FILE: 64 << 20}
_MOST_OTHER_BYTES = 1 << 20
_TOKEN_FIELDS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_FIELDS = (
    *_TOKEN_FIELDS,
    "additional_special_tokens",
    "extra_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "clean_up_tokenization_spaces",
)
"""The only fields of a tokenizer's config that are read: others may name files and classes."""
MOST_KEPT = 64
"""How many vocabularies stay in memory; most tokenizers take some megabytes."""
_KEPT_DIGESTS = 4096
_MOST_SPECIAL_TOKENS = 1000
"""Building a tokenizer takes time proportional to the square of their number."""
_SAVE_AGAIN = "save it with tokenizer.save_pretrained"
_ADD = (
    "add tokens to the base's tokenizer with add_tokens and save it with save_pretrained, or leave "
    "the tokenizer out where it adds none"
)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template that an adapter brings. It runs in limited processes only."""

    text: str
    sandbox: Sandbox

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """Render a conversation. Raises TemplateRefused, SandboxUnavailable, WouldWait."""
        try:
            answer = self.sandbox.render(
                self.text,
                messages,
                tools,
                variables,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except Exceeded as error:
            raise TemplateRefused(f"it takes more than {error}") from error
        if "text" not in answer:
            raise TemplateRefused(str(answer.get("refused") or answer.get("malformed")))
        return str(answer["text"])


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer and the chat template for requests that use an adapter."""

    tokenizer: PreTrainedTokenizerFast
    """The base's, or the base's with tokens added. An adapter's own tokenizer never runs here."""
    size: int
    """All token ids that the model reads and writes are below this."""
    template: ChatTemplate | None = None
    """The adapter's own; None: that of `tokenizer`, which is the base's."""

    @property
    def has_template(self) -> bool:
        return self.template is not None or bool(self.tokenizer.chat_template)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        """Render a conversation with the chat template, which may also read `variables`.

        Raises TemplateRefused; and SandboxUnavailable and WouldWait for an adapter's own template.
        """
        if self.template is not None:
            return self.template.render(
                messages,
                tools,
                {**self.tokenizer.special_tokens_map, **variables},
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,  # type: ignore[arg-type]
                tools=tools,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        except Exception as error:
            # A template may raise anything, depending on the request.
            raise TemplateRefused(str(error)) from error
        return str(rendered)


@dataclass(frozen=True, slots=True)
class _Read:
    """The result of reading an adapter's files."""

    vocabulary: Vocabulary | None = None
    """None: the files add nothing to the base's."""
    faults: Sequence[Fault] = ()

    def outcome(self) -> Vocabulary | None:
        """Return the vocabulary. Raises InvalidAdapter if the files have faults."""
        if self.faults:
            raise InvalidAdapter(self.faults)
        return self.vocabulary


class Vocabularies:
    """Reads adapters' vocabularies, and keeps those used last. Thread-safe; blocking."""

    def __init__(self, base: PreTrainedTokenizerFast, modules: BaseModules) -> None:
        self._base = base
        self._modules = modules
        self._sandbox = Sandbox(base.backend_tokenizer.to_str)
        self._mutex = threading.Lock()
        self._read: OrderedDict[str, _Read] = OrderedDict()
        """Content -> result, least recently used first."""
        self._contents: OrderedDict[str, str] = OrderedDict()
        """Digest -> content, least recently used first."""

    def close(self) -> None:
        self._sandbox.close()

    def knows(self, digest: str) -> bool:
        """Whether `find` knows the result for this digest without reading a file."""
        with self._mutex:
            return self._contents.get(digest) in self._read

    def find(self, digest: str, folder: Path, saved: Mapping[str, State]) -> Vocabulary | None:
        """Do as `read` for files with this digest, without reading if the result is kept."""
        with self._mutex:
            known = self._use(self._contents.get(digest, ""))
            if known is not None:
                self._contents.move_to_end(digest)
                return known.outcome()
        files, size = read_files(folder), self._size(saved)
        content = _content(files, size)
        # A folder that is deleted meanwhile may have seemed to lack files.
        if folder.is_dir():
            with self._mutex:
                self._contents[digest] = content
                while len(self._contents) > _KEPT_DIGESTS:
                    self._contents.popitem(last=False)
        return self._load(files, size, content)

    def read(self, folder: Path, saved: Mapping[str, State]) -> Vocabulary | None:
        """Read the vocabulary of the files in a folder. None: they add nothing to the base's.

        Raises InvalidAdapter: the files are damaged, change the ids of the base's tokens, or do
        not fit the embeddings.
        """
        files, size = read_files(folder), self._size(saved)
        return self._load(files, size, _content(files, size))

    def _size(self, saved: Mapping[str, State]) -> int | None:
        """How many token embeddings there are. None: this base does not say."""
        embeddings = self._modules.input_embedding
        return None if embeddings is None else rows_of(embeddings, saved, self._modules)

    def _use(self, content: str) -> _Read | None:
        read = self._read.get(content)
        if read is not None:
            self._read.move_to_end(content)
        return read

    def _load(
        self, files: Mapping[str, bytes], size: int | None, content: str
    ) -> Vocabulary | None:
        with self._mutex:
            read = self._use(content)
        if read is None:
            try:
                read = _Read(self._make(files, size, content))
            except InvalidAdapter as refusal:
                # A refusal is kept too, since finding it may take long.
                read = _Read(faults=refusal.faults)
            with self._mutex:
                self._read[content] = read
                while len(self._read) > MOST_KEPT:
                    self._read.popitem(last=False)
        return read.outcome()

    def _make(
        self, files: Mapping[str, bytes], size: int | None, content: str
    ) -> Vocabulary | None:
        tokenizer, text = self._parts(files, content)
        template = None if text is None else ChatTemplate(text, self._sandbox)
        own = None if tokenizer is None and template is None else tokenizer or self._base
        base_size = self._size({})
        if size is None or base_size is None:
            return None if own is None else Vocabulary(own, len(own), template)
        if size != base_size and TOKENIZER_FILE not in files:
            problem = f"is missing: the adapter has {size} embeddings, and the base {base_size}"
            fix = "add the tokenizer that it was trained with to the archive"
            raise InvalidAdapter([Fault(TOKENIZER_FILE, problem, fix)])
        if own is None and size == base_size:
            return None
        highest = max((own or self._base).get_vocab().values(), default=-1)
        if highest >= size:
            problem = f"has a token {highest}, and there are {size} embeddings"
            fix = "resize the embeddings and save them: modules_to_save=['embed_tokens', 'lm_head']"
            raise InvalidAdapter([Fault(TOKENIZER_FILE, problem, fix)])
        return Vocabulary(own or self._base, size, template)

    def _parts(
        self, files: Mapping[str, bytes], content: str
    ) -> tuple[PreTrainedTokenizerFast | None, str | None]:
        """Read an adapter's tokenizer and chat template. None for one that equals the base's."""
        faults: list[Fault] = []
        config = _object(files, SPECIAL_TOKENS_FILE, faults)
        config |= _object(files, TOKENIZER_CONFIG_FILE, faults)
        name, template = _template(files, config, faults)
        if template == self._base.chat_template:
            template = None
        tokenizer = None
        if TOKENIZER_FILE in files:
            tokenizer = self._rebuild(files[TOKENIZER_FILE], config, content, faults)
        if template is not None and (fault := self._template_fault(template, tokenizer)):
            faults.append(Fault(name, fault, "mend the template"))
        if faults:
            raise InvalidAdapter(faults)
        return tokenizer, template

    def _template_fault(self, template: str, tokenizer: PreTrainedTokenizerFast | None) -> str:
        """Say what is wrong with a template. Empty: nothing, even if it refuses the trial."""
        try:
            variables = (tokenizer or self._base).special_tokens_map
            answer = self._sandbox.try_template(template, variables)
        except Exceeded as error:
            return f"holds a chat template that takes more than {error}"
        problem = answer.get("malformed", "")
        return f"holds a chat template that cannot be compiled: {problem}" if problem else ""

    def _rebuild(
        self, data: bytes, config: Mapping[str, Any], content: str, faults: list[Fault]
    ) -> PreTrainedTokenizerFast | None:
        """Rebuild a tokenizer as the base's with tokens added. None: it adds none, or it does
        something else, which is then appended to `faults`."""
        try:
            answer = self._sandbox.compare(data, content)
        except Exceeded as error:
            answer = {"fault": f"takes more than {error}"}
        if "fault" in answer:
            faults.append(Fault(TOKENIZER_FILE, answer["fault"], _ADD))
            return None
        backend = Tokenizer.from_str(self._base.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.add_tokens([AddedToken(**token) for token in answer["tokens"]])
        if answer["around"] is not None:
            surround(backend, *answer["around"])
        try:
            known = _settings(config, backend)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **known)  # type: ignore[no-untyped-call]
        except Exception as error:
            problem = f"does not fit its tokenizer: {str(error)[:200]}"
            faults.append(Fault(TOKENIZER_CONFIG_FILE, problem, _SAVE_AGAIN))
            return None
        tokenizer.chat_template = self._base.chat_template
        return None if _additions(tokenizer) == _additions(self._base) else tokenizer


def _content(files: Mapping[str, bytes], size: int | None) -> str:
    """The digest of all that a vocabulary is made of. `size`: how many embeddings there are."""
    sha = hashlib.sha256(f"{size}\0".encode())
    for name in sorted(files):
        sha.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return sha.hexdigest()


def _additions(tokenizer: PreTrainedTokenizerFast) -> tuple[object, ...]:
    """All that can differ between two tokenizers that add tokens to the same base."""
    backend = tokenizer.backend_tokenizer
    added = {number: repr(token) for number, token in backend.get_added_tokens_decoder().items()}
    around = repr(backend.encode("a").ids)
    return added, around, tokenizer.eos_token


def read_files(folder: Path) -> dict[str, bytes]:
    """Read the tokenizer files of a folder, by name. Raises InvalidAdapter if one is too large."""
    files, faults = {}, []
    for name in TEXT_FILES:
        path = folder / name
        if path.is_file():
            most = _MOST_BYTES.get(name, _MOST_OTHER_BYTES)
            if path.stat().st_size > most:
                faults.append(Fault(name, f"is larger than {most} bytes", _SAVE_AGAIN))
            else:
                files[name] = path.read_bytes()
    if faults:
        raise InvalidAdapter(faults)
    return files


def _object(files: Mapping[str, bytes], name: str, faults: list[Fault]) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
        if isinstance(value, dict):
            return value
        problem = "is no JSON object"
    except (ValueError, RecursionError) as error:
        problem = f"is no JSON: {error}"
    faults.append(Fault(name, problem, _SAVE_AGAIN))
    return {}


def _template(
    files: Mapping[str, bytes], config: Mapping[str, Any], faults: list[Fault]
) -> tuple[str, str | None]:
    """The name of the file that holds the chat template, and the template. None: there is none."""
    name, template = TOKENIZER_CONFIG_FILE, config.get("chat_template")
    if CHAT_TEMPLATE_FILE in files:
        name, template = CHAT_TEMPLATE_FILE, files[CHAT_TEMPLATE_FILE].decode(errors="replace")
    if template is not None and not isinstance(template, str):
        faults.append(Fault(name, "has a chat_template that is no text", "give one template"))
        return name, None
    return name, template or None


def _settings(config: Mapping[str, Any], backend: Tokenizer) -> dict[str, Any]:
    """Read the fields of a tokenizer's config, with all unnamed special tokens as one list.

    Raises ValueError if it names too many special tokens, or one that `backend` has no id for;
    KeyError or TypeError if one is malformed.
    """
    written = {name: config[name] for name in _FIELDS if config.get(name) not in (None, "")}
    extra = []
    for name in ("extra_special_tokens", "additional_special_tokens"):
        tokens = written.pop(name, [])
        # transformers 4.46 to 4.57 wrote an object with a name for each.
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        if not isinstance(tokens, list):
            raise TypeError(f"{name} is no list of tokens")
        extra += _token(tokens)
    known = {name: _token(value) for name, value in written.items()}
    unnamed = {str(token): token for token in extra}
    special = unnamed.keys() | {str(known[name]) for name in _TOKEN_FIELDS if name in known}
    if len(special) > _MOST_SPECIAL_TOKENS:
        raise ValueError(f"it names more than {_MOST_SPECIAL_TOKENS} special tokens")
    for token in sorted(special):
        if backend.token_to_id(token) is None:
            raise ValueError(f"it names {token[:100]!r}, which {TOKENIZER_FILE} has no token for")
    return known | ({"extra_special_tokens": list(unnamed.values())} if unnamed else {})


def _token(value: Any) -> Any:
    """Read a special token, or a list of them. Each is a text, or an object with flags."""
    if isinstance(value, list):
        return [_token(each) for each in value]
    if not isinstance(value, dict):
        return value
    ways = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(value["content"], **{way: bool(value[way]) for way in ways if way in value})
