"""Uploaded tokenizers and templates run in processes that end at their limits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from infuse.adapters.errors import SandboxUnavailable
from infuse.adapters.vocabulary import sandbox
from infuse.adapters.vocabulary.sandbox import Exceeded, Limits, Sandbox, WouldWait, without_waiting
from tests.chat_templates import HERMES, LLAMA, MISTRAL
from tests.factories import CHAT_TEMPLATE, tiny_tokenizer

MESSAGES = [
    {"role": "user", "content": "what <b>time</b> is it? é"},
    {"role": "assistant", "content": "half past", "name": None},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
RUNAWAYS = {
    "two loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power that is folded": "{{ (7 ** 90000000) > 1 }}",
    "a power that is not": "{% set n = 90000000 %}{{ (7 ** n) > 1 }}",
    "a sort": "{% for a in range(99999) %}{{ range(99999) | list | sort | length }}{% endfor %}",
    "a string that doubles": "{% set ns = namespace(s='x') %}{% for i in range(40) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "a long answer": "{{ 'x' * 9000000 }}",
}
ERRORS = {
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "syntax": "{% for %}",
    "division": "{{ 1 / 0 }}",
    "an own refusal": "{{ raise_exception('never') }}",
    "an attribute": "{{ ''.__class__.__mro__ }}",
}


@pytest.fixture(scope="module", autouse=True)
def _low_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "TEMPLATE", Limits(1, 100, 128 << 20))
        yield


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with closing(Sandbox(tiny_tokenizer().backend_tokenizer.to_str)) as box:
        yield box


def render(box: Sandbox, template: str, **changes: Any) -> dict[str, Any]:
    how = {"tools": None, "variables": {}, "continue_final_message": False}
    how |= {"messages": MESSAGES, "add_generation_prompt": True}
    return box.render(template, **how | changes)


def processes(pid: int | None = None) -> list[psutil.Process]:
    found = []
    for each in psutil.Process(pid).children(recursive=True):
        # A process that has ended meanwhile has no command line.
        with suppress(psutil.Error):
            if any("sandboxed" in part for part in each.cmdline()):
                found.append(each)
    return found


def eventually_none(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]
        if not left:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HERMES, LLAMA, MISTRAL])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_template_writes_what_transformers_would(
    box: Sandbox, template: str, tools: list[dict[str, Any]] | None, goes_on: bool
) -> None:
    tokenizer = tiny_tokenizer(template)
    how = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    variables = {"bos_token": "<s>", "thinking": True}
    expected = tokenizer.apply_chat_template(
        MESSAGES, tools=tools, tokenize=False, **how, **variables
    )

    assert render(box, template, tools=tools, variables=variables, **how) == {"text": expected}
    assert render(box, template, tools=tools, variables=variables, **how) == {"text": expected}


@pytest.mark.fault(
    "memory",
    "An adapter's chat template takes time or memory without end",
    by="templates, in a process with `RLIMIT_AS` and `RLIMIT_CPU`",
    promise="It ends at its limits, and others are rendered meanwhile.",
)
@pytest.mark.parametrize("template", RUNAWAYS.values(), ids=RUNAWAYS)
def test_a_runaway_ends_at_its_limits_and_others_go_on(box: Sandbox, template: str) -> None:
    with ThreadPoolExecutor(1) as other:
        ends = other.submit(render, box, template)
        assert render(box, CHAT_TEMPLATE)["text"]
        with pytest.raises(Exceeded):
            ends.result(120)
    assert render(box, CHAT_TEMPLATE)["text"]


@pytest.mark.parametrize("kind", ["tokenizer", "template"])
def test_conversations_are_rendered_while_many_uploads_are_read(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sandbox, "TEMPLATE", Limits(60, 60, 128 << 20))
    tokenizer = tiny_tokenizer().backend_tokenizer.to_str().encode()
    box = Sandbox(tiny_tokenizer().backend_tokenizer.to_str)
    before = set(processes())
    render(box, CHAT_TEMPLATE)
    [parent] = [each for each in set(processes()) - before if each.ppid() == os.getpid()]
    with closing(box), ThreadPoolExecutor(6) as uploads:
        # A suspended process forks no worker; a worker that it has forked goes on.
        parent.suspend()
        try:
            read = box.try_template if kind == "template" else box.compare
            given = ("{{ messages }}", {}) if kind == "template" else (tokenizer, "key")
            ends = [uploads.submit(read, *given) for _ in range(6)]
            assert render(box, CHAT_TEMPLATE)["text"]
            assert not any(each.done() for each in ends)
        finally:
            parent.resume()
        assert all(each.result(60) for each in ends)


@pytest.mark.parametrize("template", ERRORS.values(), ids=ERRORS)
def test_what_a_template_raises_is_said(box: Sandbox, template: str) -> None:
    answer = render(box, template)

    assert answer.keys() & {"malformed", "refused"} or answer == {"text": ""}


def test_many_runaways_of_one_template_leave_no_process_behind(box: Sandbox) -> None:
    render(box, CHAT_TEMPLATE)
    before = len(processes())
    with ThreadPoolExecutor(6) as others:
        ends = [others.submit(render, box, RUNAWAYS["a string that doubles"]) for _ in range(6)]
        assert all(isinstance(each.exception(120), Exceeded) for each in ends)

    deadline = time.monotonic() + 30
    while len(processes()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes()) <= before
    assert not any(each.status() == "zombie" for each in psutil.Process().children(recursive=True))


def test_a_worker_has_no_secrets_and_may_open_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INFUSE_API_KEY", "hunter2")
    box = Sandbox(tiny_tokenizer().backend_tokenizer.to_str)
    with (tmp_path / "secret").open("w"), closing(box):
        render(box, CHAT_TEMPLATE)
        parent = max(psutil.Process().children(), key=lambda each: each.create_time())
        [worker] = parent.children()
        limits = Path(f"/proc/{worker.pid}/limits").read_text().splitlines()
        opened = [os.readlink(fd) for fd in Path(f"/proc/{worker.pid}/fd").iterdir()]
        environment = f"{parent.environ()} {worker.environ()}"

    most = {line[:25].strip(): line[25:].split()[1] for line in limits[1:]}
    assert most["Max open files"] == most["Max file size"] == most["Max processes"] == "0"
    assert most["Max core file size"] == "0"
    assert all(name == "/dev/null" or name.startswith("socket:") for name in opened)
    assert "hunter2" not in environment


def test_no_process_starts_before_it_is_needed_and_all_end_when_it_is_closed() -> None:
    before = set(processes())
    box = Sandbox(tiny_tokenizer().backend_tokenizer.to_str)
    assert set(processes()) <= before
    render(box, CHAT_TEMPLATE)
    pids = [each.pid for each in set(processes()) - before]
    box.close()

    assert len(pids) == 2
    assert eventually_none(pids)
    assert not [child for child in psutil.Process().children() if child.pid in pids]


SERVER = """
import sys, threading, psutil
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from infuse.adapters.vocabulary.sandbox import Sandbox

box = Sandbox(Tokenizer(WordLevel({"a": 0}, unk_token="a")).to_str)
how = {"add_generation_prompt": True, "continue_final_message": False}
messages = [{"role": "user", "content": "x"}]
box.render("{{ messages }}", messages, None, {}, **how)
loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
threading.Thread(target=box.render, args=(loops, messages, None, {}), kwargs=how).start()
print(*(each.pid for each in psutil.Process().children(recursive=True)), flush=True)
sys.stdin.read()
"""


@pytest.mark.fault(
    "process",
    "The server is killed while its limited processes work",
    by="SIGKILL",
    promise="They end too.",
)
def test_no_process_outlives_a_server_that_is_killed() -> None:
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=root, env=environment, **pipes)
    assert server.stdout is not None
    pids = [int(pid) for pid in server.stdout.readline().split()]
    server.kill()
    server.communicate()

    assert len(pids) >= 2
    assert eventually_none(pids)


@pytest.mark.parametrize("which", ["its process", "its worker"])
def test_after_what_waits_was_killed_another_one_takes_its_place(box: Sandbox, which: str) -> None:
    render(box, CHAT_TEMPLATE)
    pids = [each.pid for each in processes()]
    if which == "its worker":
        pids = [each.pid for each in processes() if each.ppid() in pids]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert eventually_none(pids)

    assert render(box, CHAT_TEMPLATE)["text"]


@pytest.mark.fault(
    "process",
    "A limited process is killed within a job",
    by="SIGKILL",
    promise="The job is done again by another process.",
)
def test_a_job_whose_process_is_killed_is_not_at_fault(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "TEMPLATE", Limits(60, 120, 128 << 20))
    render(box, CHAT_TEMPLATE)
    before = set(processes())
    with ThreadPoolExecutor(1) as other:
        ends = other.submit(render, box, RUNAWAYS["two loops"])
        while not set(processes()) - before:
            time.sleep(0.01)
        for each in before:
            each.kill()
        with pytest.raises(SandboxUnavailable, match="try again"):
            ends.result(60)
    assert render(box, CHAT_TEMPLATE)["text"]


def test_a_job_that_a_busy_machine_did_not_finish_is_not_at_fault(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "TEMPLATE", Limits(60, 0.5, 128 << 20))
    with pytest.raises(SandboxUnavailable, match="the machine is too busy"):
        render(box, RUNAWAYS["two loops"])


def test_no_process_starts_after_it_is_closed() -> None:
    box = Sandbox(tiny_tokenizer().backend_tokenizer.to_str)
    before = set(processes())
    box.close()

    with pytest.raises(SandboxUnavailable, match="the server stops"):
        render(box, CHAT_TEMPLATE)
    assert set(processes()) <= before


def test_a_start_that_fails_leaves_nothing_behind() -> None:
    box = Sandbox(lambda: "no tokenizer")
    before = psutil.Process().children(), psutil.Process().num_fds()

    with pytest.raises(SandboxUnavailable):
        render(box, CHAT_TEMPLATE)
    assert (psutil.Process().children(), psutil.Process().num_fds()) == before


def test_a_start_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "START_SECONDS", 0.01)
    box = Sandbox(tiny_tokenizer().backend_tokenizer.to_str)
    before = psutil.Process().children(), psutil.Process().num_fds()

    with pytest.raises(SandboxUnavailable):
        render(box, CHAT_TEMPLATE)
    assert (psutil.Process().children(), psutil.Process().num_fds()) == before


def test_who_may_not_wait_is_told_what_for() -> None:
    box = Sandbox(tiny_tokenizer().backend_tokenizer.to_str)
    before = processes()
    with without_waiting(), pytest.raises(WouldWait) as first:
        render(box, CHAT_TEMPLATE)
    with without_waiting(), pytest.raises(WouldWait) as second:
        render(box, HERMES)

    assert first.value.key != second.value.key
    assert processes() == before
