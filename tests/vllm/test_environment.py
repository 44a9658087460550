"""vLLM's workers start with the variables that they need, and this process keeps its own."""

import os
from pathlib import Path

import pytest

from infuse.server.engine.vllm.environment import environment_of_workers, variables


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 5, 6})


@pytest.mark.parametrize(
    ("workers", "cores", "threads"),
    [
        (1, "1,2,5,6", "4"),
        (2, "1,2|5,6", "2"),
        (4, "1|2|5|6", "1"),
        (5, "|".join(["1,2,5,6"] * 5), "4"),
    ],
)
def test_workers_on_cpus_share_the_cores(
    tmp_path: Path, workers: int, cores: str, threads: str
) -> None:
    found = variables(tmp_path, True, workers)

    assert found["VLLM_CPU_OMP_THREADS_BIND"] == cores
    assert found["OMP_NUM_THREADS"] == threads


def test_on_gpus_vllm_chooses_by_itself(tmp_path: Path) -> None:
    assert "VLLM_CPU_OMP_THREADS_BIND" not in variables(tmp_path, False)


def test_what_the_user_has_set_wins_and_all_is_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    before = dict(os.environ)
    with environment_of_workers(True, 1):
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert dict(os.environ) == before
