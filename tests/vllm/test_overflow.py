"""What one adapter overflows reaches no other request."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.vllm.harness import VllmHarness
from tests.vllm.test_engine import LONG

WEIGHTS = "adapter_model.safetensors"


def overflowing(source: Path, folder: Path) -> Path:
    """The adapter, so strong that a model's numbers are no longer finite."""
    shutil.copytree(source, folder)
    tensors = {key: tensor * 1e30 for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_what_an_adapter_overflows_is_not_left_in_the_cache_for_others(
    engine: VllmHarness, adapters: dict[str, Path], tmp_path: Path
) -> None:
    undisturbed = engine.ask(LONG, max_tokens=8).tokens
    engine.add("overflows", overflowing(adapters["default"], tmp_path / "overflows"))
    for number in range(40):
        engine.submit(f"overflows-{number}", [5 + number, *LONG], "overflows", max_tokens=8)
    engine.wait()
    # Enough of them to get every block of the cache.
    others = [f"base-{number}" for number in range(80)]
    for other in others:
        engine.submit(other, LONG, max_tokens=8, cache_salt=other)
    engine.wait()

    assert [engine.answers[other].tokens for other in others] == [undisturbed] * len(others)
