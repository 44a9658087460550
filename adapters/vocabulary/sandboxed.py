"""The script that runs adapters' own tokenizers and chat templates in processes with limits.

`sandbox` starts it without the server's environment and sends it the base's tokenizer. For each
socket that it is sent then, it forks a worker, which answers jobs on that socket. A worker is ended
by its limits of CPU time, wall-clock time and memory, and can open no file or socket. All of these
processes end with the server.
"""

import ctypes
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

from tokenizers import Tokenizer, processors
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    render_jinja_template,
)

Plain = dict[str, Any]
"""A JSON object."""

_MEBIBYTE = 1 << 20
_HEAD = struct.Struct("<Q")
_DIES_WITH_PARENT = 1
_MOST_CHARACTERS = 4 << 20
"""The longest text that a template may render."""
_MOST_TOKENS = 1 << 16
_MOST_TOKEN_CHARACTERS = _MEBIBYTE
"""The length of all added tokens together, since the library builds one automaton of them."""
_LONGEST_TOKEN = 1024
_MOST_AROUND = 8
"""How many tokens a tokenizer may put before each text, and how many after it."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_TEXTS = (
    "The quick brown fox, jumps over: the lazy dog. It's 3.14 or 2,718, isn't it? don't!",
    " leading, trailing and  double   blanks \t tabs\n\nnew\r\nlines \n ",
    "def f(x_1: int) -> str:\n    return {'a': [x_1 ** 2, \"b\"]}  # <|mark|> </s> [INST] <0x41>",
    "Ünïcödé ﬁ ℌ é e\u0301 ß İ 日本語 한국어 العربية 😀👩‍👩‍👧 \ufffd \u200b \xa0 ▁ Ġ ## @@",
    "0123456789 12 345 6789 1e-10 #tag @name http://example.org/?q=1&r=%20 a a a a aa aaa abab",
    "\x00\x01\x7f\x80 \ufeff \U000f0000 ÿ",
    "a",
    " ",
    "\n",
)
"""Texts of many kinds. Two tokenizers that differ most likely differ on one of them."""


def receive(link: socket.socket, most: int | None = None) -> bytes:
    """Receive a message. Empty: the other side has closed, or the message is longer than `most`
    bytes."""
    head = _receive(link, _HEAD.size)
    length = _HEAD.unpack(head)[0] if head else 0
    return b"" if most is not None and length > most else _receive(link, length)


def _receive(link: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        size = link.recv_into(view[got:])
        if size == 0:
            return b""
        got += size
    return bytes(data)


def send(link: socket.socket, message: bytes) -> None:
    link.sendall(_HEAD.pack(len(message)) + message)


def render(job: Plain) -> Plain:
    """Render a conversation with a chat template, as `apply_chat_template` of transformers does.

    The answer holds `text`; or `malformed`, `refused` or `exceeded` with the reason.
    """
    messages = [{k: v for k, v in each.items() if v is not None} for each in job["messages"]]
    if job["continue_final_message"] and job["add_generation_prompt"]:
        return {"refused": "a message cannot be continued and another begun"}
    if not messages:
        return {"refused": "an empty conversation cannot be written"}
    try:
        _compile_jinja_template(job["template"])
    except MemoryError:
        return {"exceeded": ""}
    except Exception as error:
        return {"malformed": str(error)[:500] or type(error).__name__}
    try:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=job["tools"],
            chat_template=job["template"],
            continue_final_message=job["continue_final_message"],
            add_generation_prompt=job["add_generation_prompt"],
            **job["variables"],
        )
        text = str(rendered[0][0])
    except MemoryError:
        return {"exceeded": ""}
    except Exception as error:
        return {"refused": str(error)[:500] or type(error).__name__}
    if len(text) > _MOST_CHARACTERS:
        return {"exceeded": f"{_MOST_CHARACTERS} characters"}
    return {"text": text}


def compare(base: Tokenizer, data: bytes) -> Plain:
    """Find what a tokenizer adds to the base's: `tokens`, and `around`, the ids around each text.

    The answer holds `fault` instead if it is not the base's tokenizer with tokens added.
    """
    try:
        theirs = Tokenizer.from_buffer(data)
        theirs.no_truncation()
        theirs.no_padding()
        return _compared(base, theirs)
    except MemoryError:
        return {"exceeded": ""}
    except BaseException as error:
        # The library raises bare Exceptions, and panics, which are not Exceptions.
        return {"fault": f"is no tokenizer: {str(error)[:200]}"}


def _compared(base: Tokenizer, theirs: Tokenizer) -> Plain:
    added = theirs.get_added_tokens_decoder()
    contents = [token.content for token in added.values()]
    if len(contents) > _MOST_TOKENS or sum(map(len, contents)) > _MOST_TOKEN_CHARACTERS:
        return {"fault": f"adds more than {_MOST_TOKENS} tokens, or a million characters of them"}
    if longest := next((each for each in contents if len(each) > _LONGEST_TOKEN), ""):
        return {"fault": f"adds a token of {len(longest)} characters"}
    if fault := _vocabulary_fault(base, theirs, contents):
        return {"fault": fault}
    ours = json.loads(base.to_str())
    own = json.loads(theirs.to_str())
    if own["model"].get("merges") != ours["model"].get("merges"):
        return {"fault": "has other merges than the base's"}
    before = base.get_added_tokens_decoder()
    fresh = [token for number, token in sorted(added.items()) if before.get(number) != token]
    base.add_tokens(fresh)
    if base.get_added_tokens_decoder() != added:
        return {"fault": "gives its added tokens other ids than add_tokens does, or lacks some"}
    around = _around(theirs)
    if around is not None and around == _around(base):
        around = None
    elif around is not None:
        surround(base, *around)
    different = _different(ours, own)
    literals = [text for part in different for text in _strings(part)]
    sample = contents[:: max(1, len(contents) // 64)]
    difference = _in_texts(base, theirs, sample, literals)
    if different and not difference:
        # A part that is written differently may still behave the same.
        difference = _in_tokens(base, theirs)
    if difference:
        return {"fault": f"{difference} otherwise than the base's with tokens added"}
    tokens = [
        {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
        for token in fresh
    ]
    return {"tokens": tokens, "around": around}


def _vocabulary_fault(base: Tokenizer, theirs: Tokenizer, added: list[str]) -> str:
    ours, own = base.get_vocab(), theirs.get_vocab()
    if moved := ours.items() - own.items():
        token, number = min(moved, key=lambda each: each[1])
        problem = f"lacks {len(moved)} of the base's tokens, or gives them other ids: "
        return problem + f"{token[:100]!r} is {number} in the base"
    if strange := own.keys() - ours.keys() - set(added):
        known = "that are neither the base's nor added ones"
        return f"has {len(strange)} tokens {known}, such as {min(strange)[:100]!r}"
    return ""


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The ids that a tokenizer puts before and after each text. None: it does something else."""
    plain = tokenizer.encode("a b", add_special_tokens=False).ids
    whole = tokenizer.encode("a b").ids
    for first in range(len(whole) - len(plain) + 1):
        before, after = whole[:first], whole[first + len(plain) :]
        if whole[first : first + len(plain)] == plain:
            return (before, after) if max(len(before), len(after)) <= _MOST_AROUND else None
    return None


def surround(tokenizer: Tokenizer, before: list[int], after: list[int]) -> None:
    """Make a tokenizer put these ids around each text."""
    names = {number: tokenizer.id_to_token(number) for number in {*before, *after}}
    single = [*(names[each] for each in before), "$A", *(names[each] for each in after)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B"],
        special_tokens=[(name, number) for number, name in names.items()],
    )


def _different(ours: Plain, own: Plain) -> list[Any]:
    """The parts of a tokenizer whose JSON differs from the base's."""
    steps = ("normalizer", "pre_tokenizer", "decoder")
    parts = [own[step] for step in steps if own[step] != ours[step]]
    for key, value in own["model"].items():
        if key not in ("vocab", "merges") and value != ours["model"].get(key):
            parts.append(value)
    return parts


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value[:100]]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)][:100]


def _in_texts(base: Tokenizer, theirs: Tokenizer, added: list[str], literals: list[str]) -> str:
    """Describe the first text that the two encode or decode differently. Empty: none was found."""
    texts = [*_TEXTS, *literals, *(f"{text} {text}{text}" for text in literals)]
    texts += [f"a{token}b {token} {token}{token}\n{token}" for token in added]
    for text in texts:
        for special in (False, True):
            ours = base.encode(text, add_special_tokens=special).ids
            if ours != theirs.encode(text, add_special_tokens=special).ids:
                return f"encodes {text[:40]!r}"
        if problem := _decoded(base, theirs, ours):
            return problem
    return ""


def _in_tokens(base: Tokenizer, theirs: Tokenizer) -> str:
    """Describe the first token, or run of tokens, that the two decode differently. Empty: none was
    found."""
    size = base.get_vocab_size()
    step = max(1, size // 50_000)
    for token in range(0, size, step):
        if problem := _decoded(base, theirs, [token]):
            return problem
    for token in range(0, size, max(1, size // 2_000)):
        run = [(token + 7919 * n * n) % size for n in range(6)]
        if problem := _decoded(base, theirs, run):
            return problem
    return ""


def _decoded(base: Tokenizer, theirs: Tokenizer, ids: list[int]) -> str:
    for skip in (True, False):
        ours = base.decode(ids, skip_special_tokens=skip)
        if ours != theirs.decode(ids, skip_special_tokens=skip):
            return f"decodes {ours[:40]!r}"
    return ""


def _limit(cpu_seconds: float, wall_seconds: float) -> None:
    """Limit the next job. The kernel ends a process that goes beyond."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _close_in(memory: int, parent: int) -> None:
    """Take from a worker whatever a job does not need. `memory`: bytes beyond those that are mapped
    already."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    os.nice(5)


def _work(link: socket.socket, base: Tokenizer, parent: int) -> None:
    """Answer jobs until the server closes the socket. Each job brings its own limits."""
    closed_in = False
    while message := receive(link):
        job = json.loads(message)
        if not closed_in:
            _close_in(job["memory"], parent)
            closed_in = True
        _limit(job["cpu_seconds"], job["wall_seconds"])
        answer = compare(base, receive(link)) if job["kind"] == "tokenizer" else render(job)
        try:
            data = json.dumps(answer).encode()
        except MemoryError:
            data = b'{"exceeded": ""}'
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(link, data)


def _warm_up() -> None:
    """Import all that rendering imports, since a worker cannot open a file."""
    job: Plain = {"messages": [{"role": "user", "content": "x"}], "tools": None, "variables": {}}
    job |= {"continue_final_message": False, "add_generation_prompt": True}
    for template in ("{{ messages | tojson }}{{ strftime_now('%d') }}", "{% for %}", "{{ a.b }}"):
        render(job | {"template": template})


def main() -> None:
    control = socket.socket(fileno=0)
    base = Tokenizer.from_str(receive(control).decode())
    _warm_up()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    send(control, b"ready")
    parent = os.getpid()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            # The server has closed the socket or has ended; the workers end with this process.
            os.killpg(0, signal.SIGTERM)
            with suppress(ChildProcessError):
                os.wait()
            return
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            control.close()
            try:
                _work(socket.socket(fileno=fds[0]), base, parent)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    main()
    sys.exit(0)
