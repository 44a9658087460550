"""The core is one synchronous object: what is added ends within the steps that the caller makes."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import GenerationConfig

from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.residency import Lease
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine import FinishReason, GenerationRequest, Output, SamplingParams
from infuse.server.engine.native import EngineConfig, LoadedModel
from infuse.server.engine.native.core import EngineCore
from infuse.server.engine.native.scheduling.scheduler import Scheduler
from tests.engine.harness import Oracle
from tests.factories import panic, tiny_model, tiny_tokenizer
from tests.way import Way

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "internals" / "architecture.md"


class Cores:
    """A core on the tiny llama, with one adapter."""

    def __init__(self, folder: Path, adapter: Path) -> None:
        self.base = tiny_model("llama")
        ia3 = IA3Slots(tiny_model("llama"), 4)
        self.store = AdapterStore(folder)
        self.registry = AdapterRegistry(self.store, ia3.modules_of_base, ia3)
        with self.store.staging() as staged:
            for file in adapter.iterdir():
                (staged / file.name).write_bytes(file.read_bytes())
            self.registry.add("mine", staged)
        loaded = LoadedModel(ia3.base, tiny_tokenizer(), "tiny", GenerationConfig(eos_token_id=2))
        self.core = EngineCore(loaded, ia3, self.registry.residency, EngineConfig(max_rows=2))

    def request(self, name: str, *prompt: int, adapter: str = "") -> GenerationRequest:
        return GenerationRequest(
            id=name,
            prompt=prompt,
            params=SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
            lease=self.registry.lease(adapter) if adapter else None,
            adapter_name=adapter,
        )

    def run(self) -> list[Output]:
        outputs = []
        while self.core:
            outputs += self.core.step()
        return outputs


@pytest.fixture
def cores(tmp_path: Path, adapters: dict[str, Path]) -> Iterator[Cores]:
    cores = Cores(tmp_path, adapters["default"])
    yield cores
    cores.store.close()


def tokens(outputs: list[Output], name: str) -> list[int]:
    return [token for each in outputs if each.request_id == name for token in each.token_ids]


def reasons(outputs: list[Output]) -> dict[str, FinishReason]:
    ends = [(each.request_id, each.finish_reason) for each in outputs]
    assert len({name for name, reason in ends if reason}) == sum(1 for _, reason in ends if reason)
    return {name: reason for name, reason in ends if reason}


def test_requests_are_answered_as_peft_does_by_steps_alone(
    cores: Cores, adapters: dict[str, Path]
) -> None:
    cores.core.add(cores.request("base", 5, 6))
    cores.core.add(cores.request("adapter", 5, 6, adapter="mine"))
    cores.core.add(cores.request("waits", 7, 8))
    outputs = cores.run()

    assert tokens(outputs, "base") == Oracle(cores.base).greedy([5, 6], 4)
    assert tokens(outputs, "adapter") == Oracle(cores.base, adapters["default"]).greedy([5, 6], 4)
    assert reasons(outputs) == dict.fromkeys(("base", "adapter", "waits"), FinishReason.LENGTH)
    assert cores.registry.stats().leases == 0
    stats = cores.core.stats()
    assert (stats.running, stats.kv_tokens_used) == (0, 0)
    assert stats.steps == 8, "two requests run in four steps, and the third in four more"


def test_a_step_brings_a_token_of_each_row_that_runs(cores: Cores) -> None:
    cores.core.add(cores.request("a", 5))
    cores.core.add(cores.request("b", 6, 7))

    first = cores.core.step()

    assert [(each.request_id, len(each.token_ids)) for each in first] == [("a", 1), ("b", 1)]


def test_the_stats_name_adapters_as_requests_do_while_they_run_and_wait(cores: Cores) -> None:
    cores.core.add(cores.request("base", 5))
    cores.core.add(cores.request("runs", 5, adapter="mine"))
    cores.core.add(cores.request("waits", 5, adapter="mine@1"))

    queued = cores.core.stats()
    cores.core.step()
    running = cores.core.stats()
    cores.run()
    idle = cores.core.stats()

    assert (queued.running_adapters, queued.waiting_adapters) == (set(), {"mine", "mine@1"})
    assert (running.running_adapters, running.waiting_adapters) == ({"mine"}, {"mine@1"})
    assert (idle.running_adapters, idle.waiting_adapters) == (set(), set())


def test_a_cancelled_request_ends_with_the_next_step_wherever_it_is(cores: Cores) -> None:
    for name in ("runs", "runs on", "waits"):
        cores.core.add(cores.request(name, 5, adapter="mine"))
    cores.core.step()
    cores.core.cancel("runs")
    cores.core.cancel("waits")
    cores.core.cancel("nobody")
    outputs = cores.core.step()

    cancelled = {"runs": FinishReason.CANCELLED, "waits": FinishReason.CANCELLED}
    assert reasons(outputs) == cancelled
    assert reasons(cores.run()) == {"runs on": FinishReason.LENGTH}
    assert cores.registry.stats().leases == 0


def test_a_step_passes_the_files_that_the_architecture_page_lists_and_returns_to_none(
    cores: Cores,
) -> None:
    listed = re.findall(r"^\| `native/([\w/]+\.py)` \|", PAGE.read_text(), re.MULTILINE)
    cores.core.add(cores.request("a", 5, 6, adapter="mine"))
    cores.core.add(cores.request("b", 5))
    cores.core.step()
    way = Way(ROOT / "server" / "engine" / "native", "core.py")
    with way.followed():
        cores.core.step()

    assert ["core.py", *way.stages] == listed
    assert len(listed) == len(set(listed)) <= 8


def test_an_idle_core_has_nothing_to_do_and_says_nothing(cores: Cores) -> None:
    assert not cores.core
    assert cores.core.step() == []


def test_what_an_abandoned_core_has_not_said_yet_is_said_at_last(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores.core.add(cores.request("cancelled", 5, adapter="mine"))
    cores.core.add(cores.request("runs", 5, adapter="mine"))
    cores.core.step()
    cores.core.cancel("cancelled")
    monkeypatch.setattr(Scheduler, "schedule", lambda _: panic())
    with pytest.raises(BaseException, match="out of bounds"):
        cores.core.step()
    outputs = cores.core.abandon(FinishReason.ENGINE_DEAD)

    assert reasons(outputs) == {
        "cancelled": FinishReason.CANCELLED,
        "runs": FinishReason.ENGINE_DEAD,
    }
    assert cores.registry.stats().leases == 0


def test_a_lease_that_cannot_be_given_back_costs_no_request_its_one_last_output(
    cores: Cores, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores.core.add(cores.request("a", 5, adapter="mine"))
    cores.core.add(cores.request("b", 6, adapter="mine"))
    cores.core.step()
    monkeypatch.setattr(Scheduler, "schedule", lambda _: panic())
    monkeypatch.setattr(Lease, "release", lambda _: {}["broken"])
    with pytest.raises(BaseException, match="out of bounds"):
        cores.core.step()

    assert reasons(cores.core.abandon(FinishReason.ENGINE_DEAD)) == dict.fromkeys(
        ("a", "b"), FinishReason.ENGINE_DEAD
    )
