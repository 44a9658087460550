"""On vLLM, sides that are compared run together, and share what their processes differ by."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import tables, turns
from benchmarks.bench import FULL, Bench
from benchmarks.engines import Answer, Request, Round
from benchmarks.sections import on_vllm
from benchmarks.slices import Run
from benchmarks.targets import TARGETS, verdict


class Asked:
    """An engine that notes what it was asked, and needs a second for it."""

    start_seconds = 30.0
    group = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def run(self, requests: Sequence[Request], *_: object) -> Round:
        return Round(0.0, 1.0, [Answer("", each.at, 1.0, each.at + 0.1) for each in requests])


class Engines(Bench):
    """Engines that only have names."""

    def __init__(self) -> None:
        self.plan = replace(FULL, registered=32)
        self.prompts = [[5] * 64] * 32
        self.names = [f"adapter-{number}" for number in range(32)]
        self._running = {}

    def engine(self, name: str, *_: object) -> Any:
        return self._running.setdefault(name, Asked(name))

    def vllm(self, **kind: Any) -> Any:
        return self.engine("-".join(["vllm", *(each for each in kind if kind[each])]))

    def server_on_vllm(self, *_: object) -> Any:
        return self.engine("server")


@pytest.fixture
def matches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What ran in slices together: side -> engine."""
    found: list[dict[str, str]] = []

    def run(runs: dict[str, Run]) -> dict[str, Round]:
        found.append({name: each.engine.name for name, each in runs.items()})
        return {name: each.ask(each.engine) for name, each in runs.items()}

    monkeypatch.setattr(turns, "run_in_slices", run)
    return found


def test_sides_that_are_compared_run_together_on_each_process_of_their_kind_as_often(
    matches: list[dict[str, str]],
) -> None:
    on_vllm.measure(Engines())

    beside_base = [match for match in matches if on_vllm.ADAPTERS in match]
    assert len(beside_base) == FULL.on_vllm_turns
    sides = {on_vllm.ADAPTERS, on_vllm.BASE, on_vllm.PLAIN}
    assert all(match.keys() == sides for match in beside_base)
    pairs = Counter((match[on_vllm.BASE], match[on_vllm.PLAIN]) for match in beside_base)
    assert len(pairs) == 4
    assert set(pairs.values()) == {FULL.on_vllm_turns // 4}
    beside_lora = [match for match in matches if on_vllm.LORA in match]
    assert len(beside_lora) == FULL.on_vllm_lora_turns
    assert all(on_vllm.BESIDE_LORA in match for match in beside_lora)


def test_every_target_on_vllm_gets_its_ratio_and_the_page_shows_the_section(
    matches: list[dict[str, str]],
) -> None:
    found = {"on-vllm": on_vllm.measure(Engines())}

    assert matches
    for target in TARGETS:
        if target.section == "on-vllm":
            assert verdict(target, found).median == pytest.approx(1.0)
    assert "| vLLM with LoRA, 8 slots | 30 |" in "\n".join(tables.section(*found.popitem()))
