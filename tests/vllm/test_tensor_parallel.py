"""Two workers on two cores, each with a part of every layer, answer as PEFT does."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infuse.server.engine import UnsupportedModel
from tests.vllm.families import save_kinds, wide
from tests.vllm.harness import VllmHarness
from tests.vllm.test_families import assert_batches_equal_peft


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmo2"])
def test_a_mixed_batch_on_two_workers_equals_peft(
    start: Callable[..., VllmHarness],
    tmp_path: Path,
    family: str,
) -> None:
    base = wide(family)
    adapters = save_kinds(family, base, tmp_path / "adapters")
    engine = start(base, adapters, options={"tensor_parallel_size": 2})
    assert len([each for each in engine.processes() if "Worker" in each.name()]) == 2

    assert_batches_equal_peft(engine, base, adapters, tmp_path)
    engine.assert_idle()


def test_a_number_of_workers_that_does_not_divide_the_heads_is_refused(
    start: Callable[..., VllmHarness],
) -> None:
    """Before any process of vLLM's has started."""
    with pytest.raises(UnsupportedModel) as refused:
        start(wide("llama"), {}, options={"tensor_parallel_size": 3})
    assert str(refused.value) == (
        "vLLM does not serve model: Total number of attention heads (4) must be divisible by "
        "tensor parallel size (3)."
    )
