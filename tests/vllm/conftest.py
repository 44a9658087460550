from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import PreTrainedModel

from tests.vllm.families import save_kinds, wide

if TYPE_CHECKING:
    from tests.vllm.harness import VllmHarness


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return wide("llama")


@pytest.fixture(scope="session")
def adapters(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_kinds("llama", llama, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def running_llama(
    llama: PreTrainedModel, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[VllmHarness]":
    """An engine that many tests use, one after the other: vLLM takes a minute to start."""
    from tests.vllm.harness import VllmHarness

    harness = VllmHarness(llama, tmp_path_factory.mktemp("llama"), adapters, max_adapters=12)
    yield harness
    harness.close()


@pytest.fixture
def engine(running_llama: "VllmHarness") -> "Iterator[VllmHarness]":
    """The tiny llama with adapters; afterwards nothing may be held."""
    yield running_llama
    running_llama.wait()
    running_llama.answers.clear()
    running_llama.assert_nothing_held()


@pytest.fixture
def start(tmp_path: Path) -> "Iterator[Callable[..., VllmHarness]]":
    """Start an engine of the test's own."""
    from tests.vllm.harness import VllmHarness

    started: list[VllmHarness] = []

    def start(base: PreTrainedModel, adapters: Mapping[str, Path], **config: Any) -> VllmHarness:
        harness = VllmHarness(base, tmp_path / f"engine-{len(started)}", adapters, **config)
        started.append(harness)
        return harness

    yield start
    for harness in started:
        harness.close()
