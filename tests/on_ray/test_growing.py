"""Replicas that are started because tokens wait."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.api.stores import COMPLETIONS
from tests.on_ray.deployed import deployed

pytest.importorskip("ray")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_another_replica_comes_where_tokens_wait(model_folder: Path, tmp_path: Path) -> None:
    flags = [f"--model={model_folder}", "--served-model-name=tiny", "--max-batch-rows=1"]
    flags += [f"--adapters-dir={tmp_path / 'store'}", "--shared-store"]
    flags += ["--max-replicas=2", "--queued-tokens=200"]
    body = {"model": "tiny", "prompt": "The order", "max_tokens": 200, "ignore_eos": True}
    with deployed(tmp_path, 1, flags) as deployment, ThreadPoolExecutor(8) as threads:
        deadline = time.monotonic() + 240
        while len(deployment.running) < 2:
            assert time.monotonic() < deadline
            posts = [COMPLETIONS] * 15
            asked = threads.map(lambda path: deployment.client.post(path, json=body), posts)
            assert {answer.status_code for answer in asked} == {200}
