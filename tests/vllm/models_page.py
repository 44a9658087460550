"""docs/reference/models-vllm.md: which families the vLLM engine was tested with, and how exactly it
computes them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.families import SHAPES

_PROPERTY = "vllm_models_page"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models-vllm.md"
_ABOUT = """# Model families on vLLM

Written by the tests of `--engine vllm` with `--full`, from a tiny model of each family with random
weights, float32, on a CPU. vLLM serves many more
([its list](https://docs.vllm.ai/en/latest/models/supported_models.html)); a module that it computes
without a layer of its own cannot be rescaled, and the start says so.

A batch of 39 rows (the base, ten adapters that rescale modules of all kinds on both sides, the
product of two, and one at half its strength; three prompts each) gives PEFT's greedy tokens in
every row: compiled, with prompts in chunks, and once more with the prompts cached. *Error* is the
largest difference of a log-probability, over the whole vocabulary and all rows, to PEFT in float64:
PEFT's own in float32, and ours.

| model type | PEFT's error | our error | remarks |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Seen:
    """What a test saw of a family. It travels with the test's report, from whatever process."""

    family: str
    peft_error: float
    our_error: float

    @property
    def as_property(self) -> tuple[str, dict[str, Any]]:
        return _PROPERTY, asdict(self)


class VllmModelsPage:
    """A pytest plugin that writes the page when the session ends, if it saw every family."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == _PROPERTY:
                seen = Seen(**value)
                self._seen[seen.family] = seen

    def pytest_sessionfinish(self) -> None:
        if self._seen.keys() == SHAPES.keys():
            rows = [_row(self._seen[family]) for family in SHAPES]
            PAGE.write_text("\n".join([_ABOUT.rstrip(), *rows]) + "\n")


def beginning(family: str) -> str:
    """How the row of a family begins."""
    return f"| `{family}` |"


def _row(seen: Seen) -> str:
    remarks = " ".join(SHAPES[seen.family].remarks)
    errors = f"{seen.peft_error:.1e} | {seen.our_error:.1e}"
    return f"{beginning(seen.family)} {errors} | {remarks} |"
