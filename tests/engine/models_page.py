"""docs/reference/models.md: which families run, how, and how exactly, as the tests saw it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.every_family import ALONE, CASES, not_tried
from tests.families import FAMILIES
from tests.hybrid_families import HYBRIDS

_PROPERTY = "models_page"
_OUTCOME = "models_page_outcome"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
_ABOUT = """# Model families

Written by `make test-full`, from a tiny model of each family with random weights, float32.

A batch of 15 rows (the base, two adapters with the family's default targets, one with a regular
expression and `exclude_modules`, and the product of two; three prompts each) gives PEFT's greedy
tokens in every row. *Error* is the largest difference of a log-probability, over the whole
vocabulary and all rows, to PEFT in float64: PEFT's own in float32, and ours. A *merged* export is
loaded by plain transformers and gives the logits of PEFT's `merge_and_unload`, bit for bit.

*flat*: all rows' tokens in one `[1, tokens]` batch on the engine's own attention. *padded*: rows
aligned in a `[rows, tokens]` batch on the model's attention
([why](../decisions/0009-a-second-runner.md)). Any other model is tried both ways at start-up, and
refused with the reason where neither is exact.

| model type | runner | PEFT's error | our error | merged | remarks |
|---|---|---|---|---|---|
"""
_FOR_ALL = """
Not supported in any family: images and sound beside text, attention that is not causal, attention
sinks. A window scaled by `dynamic` or `longrope` positions ends where the original one did
([why](../decisions/0004-positions-that-depend-on-the-longest-row.md)).
"""
_EVERY_CLASS = f"""
## Every class of transformers {transformers.__version__.rpartition(".")[0]}

All model types with a causal or encoder-decoder head, each tried as a tiny random model with the
windows that its config knows switched on, at 8 tokens, and with packed linear layers: greedy
answers to two prompts, one longer than the windows, equal the plain model's full forwards, or the
start-up check refuses the model. *flat, compiled*: they do so as well as `--compile` runs it, with
our own kernels; torch traces the grouped products of most experts in bfloat16 only, not in float32
as here. *Why*: why not flat, why not compiled, why refused, or why there is no tiny model of it;
the start-up check judges those as all others.

With a `sliding_window` in their configs, moshi, helium and granitemoe still attend to all tokens;
transformers' `generate` gives them a cache that drops the older ones, so that its answers differ
from the model's own full forward. Ours equal the full forward.

| model type | runs | why |
|---|---|---|
"""


@dataclass(frozen=True)
class Seen:
    """What a test saw of a family. It travels with the test's report, from whatever process."""

    family: str
    runner: str
    peft_error: float
    our_error: float

    @property
    def as_property(self) -> tuple[str, dict[str, Any]]:
        return _PROPERTY, asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What a test saw of a model type. It travels as Seen does."""

    kind: str
    runs: str
    """"flat", "flat, compiled", "padded", "refused" or "not tried"."""
    why: str

    @property
    def as_property(self) -> tuple[str, dict[str, Any]]:
        return _OUTCOME, asdict(self)


class ModelsPage:
    """A pytest plugin that writes the page when the session ends, if it saw every family and every
    model type."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._outcomes = {
            kind: Outcome(kind, "not tried", reason)
            for kind in CASES
            if (reason := not_tried(kind))
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == _PROPERTY:
                seen = Seen(**value)
                self._seen[seen.family] = seen
            if name == _OUTCOME:
                outcome = Outcome(**value)
                self._outcomes[outcome.kind] = outcome

    def pytest_sessionfinish(self) -> None:
        if self._seen.keys() == FAMILIES.keys() and self._outcomes.keys() == set(CASES):
            self._write()

    def _write(self) -> None:
        rows = [
            f"{beginning(family, self._seen[family].runner)} {self._seen[family].peft_error:.1e} | "
            f"{self._seen[family].our_error:.1e} | equal | {' '.join(FAMILIES[family].remarks)} |"
            for family in FAMILIES
        ]
        types = [_row(self._outcomes[kind]) for kind in CASES]
        tables = [_ABOUT.rstrip(), *rows, _FOR_ALL.rstrip(), _EVERY_CLASS.rstrip(), *types]
        PAGE.write_text("\n".join(tables) + "\n")


def beginning(family: str, runner: str) -> str:
    """How the row of a family begins."""
    model_type, _, variant = family.partition("-")
    return f"| `{model_type}`{f' ({variant})' * bool(variant)} | {runner} |"


def _row(outcome: Outcome) -> str:
    remarks = HYBRIDS[outcome.kind].remarks if outcome.kind in HYBRIDS else ()
    why = " ".join([f"{outcome.why}." if remarks else outcome.why, *remarks]).replace("|", "\\|")
    return f"{beginning_of_type(outcome.kind)} {outcome.runs} | {why} |"


def beginning_of_type(kind: str) -> str:
    """How the row of a model type begins in the table of all."""
    return f"| `{kind.removesuffix(ALONE)}`{' (decoder alone)' * kind.endswith(ALONE)} |"
