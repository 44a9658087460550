"""An adapter's own tokenizer and chat template, where its files hold them."""

import copy
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from adapters.config import (
    CHAT_TEMPLATE_FILE,
    SPECIAL_TOKENS_FILE,
    TEXT_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from adapters.errors import Fault, InvalidAdapter
from adapters.saved import State, rows_of
from adapters.targets import BaseModules

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
"""All that is read of a tokenizer's config: it could name files and classes too."""
_KEPT = 64
"""Tokenizers in memory; most are a few megabytes."""
_KEPT_BY_CONTENT = 4096
_SAVE_AGAIN = "save it with tokenizer.save_pretrained"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How texts and conversations become tokens, and back."""

    tokenizer: PreTrainedTokenizerFast
    size: int
    """The model reads and writes token ids below this."""


class Vocabularies:
    """Reads adapters' vocabularies, and keeps them. Thread-safe; blocking."""

    def __init__(self, base: PreTrainedTokenizerFast, modules: BaseModules) -> None:
        self._base = base
        self._base_ids = base.get_vocab().items()
        self._base_content = _content(base)
        self._modules = modules
        self._mutex = threading.Lock()
        self._tokenizers: OrderedDict[str, PreTrainedTokenizerFast | None] = OrderedDict()
        self._found: OrderedDict[str, Vocabulary | None] = OrderedDict()

    def knows(self, digest: str) -> bool:
        """Whether `find` reads no file for this digest."""
        with self._mutex:
            return digest in self._found

    def find(self, digest: str, folder: Path, saved: Mapping[str, State]) -> Vocabulary | None:
        """As `read`, for files with this digest."""
        with self._mutex:
            if digest in self._found:
                self._found.move_to_end(digest)
                return self._found[digest]
        vocabulary = self.read(folder, saved)
        # A folder that has gone meanwhile may have seemed to lack files.
        if folder.is_dir():
            with self._mutex:
                self._found[digest] = vocabulary
                while len(self._found) > _KEPT_BY_CONTENT:
                    self._found.popitem(last=False)
        return vocabulary

    def read(self, folder: Path, saved: Mapping[str, State]) -> Vocabulary | None:
        """What the files in a folder say; None where they say nothing that the base's does not.

        Raises InvalidAdapter: the files are damaged, change the ids of the base's tokens, or do
        not fit the embeddings.
        """
        files = _read(folder)
        tokenizer = self._load(files)
        embeddings = self._modules.input_embedding
        if embeddings is None:
            return None if tokenizer is None else Vocabulary(tokenizer, len(tokenizer))
        size = rows_of(embeddings, saved, self._modules)
        base_size = rows_of(embeddings, {}, self._modules)
        if size != base_size and TOKENIZER_FILE not in files:
            problem = f"is missing: the adapter has {size} embeddings, and the base {base_size}"
            fix = "put the tokenizer that it was trained with beside it, in the archive"
            raise InvalidAdapter([Fault(TOKENIZER_FILE, problem, fix)])
        if tokenizer is None and size == base_size:
            # The usual case, on the way of every cold request.
            return None
        highest = max((tokenizer or self._base).get_vocab().values(), default=-1)
        if highest >= size:
            problem = f"has a token {highest}, and there are {size} embeddings"
            fix = "resize the embeddings and save them: modules_to_save=['embed_tokens', 'lm_head']"
            raise InvalidAdapter([Fault(TOKENIZER_FILE, problem, fix)])
        return Vocabulary(tokenizer or self._base, size)

    def _load(self, files: Mapping[str, bytes]) -> PreTrainedTokenizerFast | None:
        sha = hashlib.sha256()
        for name in sorted(files):
            sha.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
        key = sha.hexdigest()
        with self._mutex:
            if key in self._tokenizers:
                self._tokenizers.move_to_end(key)
                return self._tokenizers[key]
        tokenizer = self._make(files)
        with self._mutex:
            self._tokenizers[key] = tokenizer
            while len(self._tokenizers) > _KEPT:
                self._tokenizers.popitem(last=False)
        return tokenizer

    def _make(self, files: Mapping[str, bytes]) -> PreTrainedTokenizerFast | None:
        faults: list[Fault] = []
        config = _object(files, SPECIAL_TOKENS_FILE, faults)
        config |= _object(files, TOKENIZER_CONFIG_FILE, faults)
        template = _template(files, config, faults)
        tokenizer = None
        if TOKENIZER_FILE in files:
            tokenizer = _tokenizer(files[TOKENIZER_FILE], config, faults)
        elif template is not None:
            tokenizer = copy.copy(self._base)
        if tokenizer is not None:
            moved = self._base_ids - tokenizer.get_vocab().items()
            if moved:
                token, number = min(moved, key=lambda each: each[1])
                problem = f"lacks {len(moved)} of the base's tokens, or gives them other ids: "
                problem += f"{token[:100]!r} is {number} in the base"
                fix = "add tokens to the base's tokenizer with add_tokens"
                faults.append(Fault(TOKENIZER_FILE, problem, fix))
        if faults:
            raise InvalidAdapter(faults)
        if tokenizer is None:
            return None
        tokenizer.chat_template = template or self._base.chat_template
        return None if _content(tokenizer) == self._base_content else tokenizer


def _content(tokenizer: PreTrainedTokenizerFast) -> tuple[object, ...]:
    """What makes two tokenizers the same; how the last batch was padded does not."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"padding": None, "truncation": None}
    return backend, tokenizer.chat_template, tokenizer.eos_token


def _read(folder: Path) -> dict[str, bytes]:
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
) -> str | None:
    """The chat template, if there is one that compiles in the sandbox."""
    name, template = TOKENIZER_CONFIG_FILE, config.get("chat_template")
    if CHAT_TEMPLATE_FILE in files:
        name, template = CHAT_TEMPLATE_FILE, files[CHAT_TEMPLATE_FILE].decode(errors="replace")
    if template is None:
        return None
    if not isinstance(template, str):
        faults.append(Fault(name, "has a chat_template that is no text", "give one template"))
        return None
    try:
        _compile_jinja_template(template)
    except (TemplateError, RecursionError, ValueError, SyntaxError) as error:
        problem = f"holds a chat template that cannot be compiled: {error}"
        faults.append(Fault(name, problem, "mend the template"))
        return None
    return template


def _tokenizer(
    data: bytes, config: Mapping[str, Any], faults: list[Fault]
) -> PreTrainedTokenizerFast | None:
    try:
        known = {name: _token(config[name]) for name in _FIELDS if config.get(name) is not None}
        backend = Tokenizer.from_buffer(data)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **known)  # type: ignore[no-untyped-call]
    except Exception as error:
        # The library raises bare Exceptions.
        problem = f"is no tokenizer: {str(error)[:200]}"
        faults.append(Fault(TOKENIZER_FILE, problem, _SAVE_AGAIN))
        return None


def _token(value: Any) -> Any:
    """A token is written as its text, or with how it takes blanks."""
    if isinstance(value, list):
        return [_token(each) for each in value]
    if not isinstance(value, dict):
        return value
    ways = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(value["content"], **{way: bool(value[way]) for way in ways if way in value})
