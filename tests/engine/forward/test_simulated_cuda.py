"""The CUDA path without a GPU: every step runs, on tensors that refuse to be mixed with the CPU's.

The answers must be those of the same core on the CPU, whose tests compare it with PEFT. What only a
GPU shows, its kernels and its speed, is in test_cuda.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry, Part
from infuse.adapters.residency import Lease
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine import GenerationRequest, SamplingParams
from infuse.server.engine.constraints.grammars import Grammars
from infuse.server.engine.native import EngineConfig, LoadedModel
from infuse.server.engine.native.core import EngineCore
from infuse.server.engine.request import token_mask
from tests.engine.harness import Answer
from tests.engine.simulated_cuda import SimulatedCuda, simulated_cuda
from tests.engine.test_families import PADDED, save_adapters
from tests.engine.test_hybrids import save_adapters as hybrid_adapters
from tests.factories import TOKENS, run_by_modules, save_adapter, tiny_model, tiny_tokenizer
from tests.families import FAMILIES, tiny
from tests.hybrid_families import HYBRIDS, tiny_hybrid

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="this torch has CUDA: run the tests marked gpu"
    ),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

Make = Callable[[], PreTrainedModel]
PROMPTS = [[5 + (11 * row + n) % 250 for n in range(3 + 13 * row)] for row in range(3)]
SCHEMA = {"type": "object", "properties": {"age": {"enum": [1, 22]}}, "required": ["age"]}


@dataclass(frozen=True)
class Asked:
    """A request: with none of the adapters it is the base's, with several their product's."""

    prompt: Sequence[int]
    adapters: Sequence[str] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    speculation: bool = False


@dataclass(frozen=True)
class Answered:
    kind: str
    answers: dict[str, Answer]
    core: EngineCore


def answer(
    base: PreTrainedModel,
    adapters: Mapping[str, Path],
    folder: Path,
    *rounds: Mapping[str, Asked],
    max_resident: int = 64,
    **config: Any,
) -> Answered:
    """Answer rounds of requests, one round after the other, by a core that this thread drives."""
    slots = IA3Slots(base, max_resident)
    store = AdapterStore(folder / base.device.type)
    registry = AdapterRegistry(store, slots.modules_of_base, slots)
    loaded = LoadedModel(base, tiny_tokenizer(), "tiny", GenerationConfig(eos_token_id=2))
    core = EngineCore(loaded, slots, registry.residency, EngineConfig(**config))
    for name, source in adapters.items():
        with store.staging() as staged:
            for file in source.iterdir():
                (staged / file.name).write_bytes(file.read_bytes())
            registry.add(name, staged)
    answers: dict[str, Answer] = {}
    for asked in rounds:
        for name, each in asked.items():
            defaults = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "logprobs": 3}
            request = GenerationRequest(
                id=name,
                prompt=tuple(each.prompt),
                params=SamplingParams(**defaults | each.params),
                lease=lease_of(registry, each.adapters),
                speculation=each.speculation,
            )
            answers[name] = Answer()
            core.add(request)
        while core:
            for output in core.step():
                answers[output.request_id].add(output)
    core.close()
    store.close()
    assert [each.error for each in answers.values() if each.error] == []
    assert (registry.stats().leases, registry.stats().pinned) == (0, 0)
    return Answered(core.runner_kind, answers, core)


def lease_of(registry: AdapterRegistry, adapters: Sequence[str]) -> Lease | None:
    match adapters:
        case []:
            return None
        case [name]:
            return registry.lease(name)
    return registry.lease_mixture([Part(name) for name in adapters], "product")


@pytest.fixture(autouse=True)
def gpu(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimulatedCuda]:
    with simulated_cuda(tmp_path_factory.getbasetemp() / "guard", monkeypatch) as gpu:
        yield gpu


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., Answered]:
    """Answer by the same core on the CPU and on the simulated GPU: tokens and scores are equal."""

    def compare(
        make: Make,
        adapters: Mapping[str, Path],
        *rounds: Mapping[str, Asked],
        near: float = 1e-4,
        **settings: Any,
    ) -> Answered:
        plain = run_by_modules(make())
        wanted = answer(plain, adapters, tmp_path, *rounds, pack_linears=False, **settings)
        found = answer(make().cuda(), adapters, tmp_path, *rounds, **settings)
        assert found.kind == wanted.kind
        for name, each in wanted.answers.items():
            mine = found.answers[name]
            assert (mine.tokens, mine.text) == (each.tokens, each.text), name
            assert scores_of(mine) == pytest.approx(scores_of(each), abs=near), name
        return found

    return compare


def scores_of(answer: Answer) -> list[float]:
    scored = [*(answer.prompt_logprobs or ()), *answer.logprobs]
    return [each.logprob for each in scored if each is not None]


def mixed(adapters: Mapping[str, Path], **params: Any) -> dict[str, Asked]:
    """Each prompt for the base, and for each adapter."""
    return {
        f"{name}-{number}": Asked(prompt, [name] if name else [], params)
        for name in ("", *adapters)
        for number, prompt in enumerate(PROMPTS)
    }


def test_operands_on_two_devices_are_refused() -> None:
    weights = torch.ones(2, 2, device="cuda")

    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        weights @ torch.ones(2)
    assert (weights @ torch.ones(2).cuda()).tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="numpy"):
        weights.numpy()


def test_a_captured_graph_runs_again_and_may_not_wait() -> None:
    given = torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = given * 2
    given += 1
    graph.replay()

    assert doubled.tolist() == [2, 2]
    for waits in (given.sum, lambda: given + torch.tensor([1, 2], device="cuda")):
        with (
            pytest.raises(RuntimeError, match="when stream is capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            float(waits().sum())


def test_a_mixed_batch_in_chunks_and_captured_steps(
    gpu: SimulatedCuda, compare: Callable[..., Answered], adapters: dict[str, Path]
) -> None:
    """With fewer slots than adapters, whose targets need new columns, and so new graphs."""
    few = {name: adapters[name] for name in ("default", "queries", "mlp-inward", "lm-head")}

    found = compare(
        lambda: tiny_model("llama"),
        few,
        mixed(few) | {"both": Asked(PROMPTS[1], ["default", "queries"])},
        prefill_chunk_tokens=20,
        max_rows=6,
        max_resident=3,
    )

    assert found.kind == "flat"
    assert gpu.ran["replay"] > 10


def test_the_log_says_that_the_engine_has_never_run_on_a_gpu(
    compare: Callable[..., Answered], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, on the GPU and not on the CPU."""
    compare(lambda: tiny_model("llama"), {}, {"one": Asked([5])})

    [warned] = [record for record in caplog.records if "GPU" in record.message]
    assert warned.levelname == "WARNING"
    assert "--engine vllm" in warned.message


def test_rows_with_every_sampling_parameter(compare: Callable[..., Answered]) -> None:
    grammars = Grammars(tiny_tokenizer(), TOKENS, frozenset({2}))
    grammar = grammars.compile("json", SCHEMA, "the grammar")
    random = {"temperature": 1.0, "seed": 5}
    every: list[dict[str, Any]] = [
        {},
        random,
        random | {"top_k": 5},
        random | {"top_p": 0.8},
        random | {"top_p": 0.99},
        random | {"min_p": 0.1, "temperature": 0.7},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.5},
        random | {"repetition_penalty": 1.2, "logit_bias": {7: 3.0, 9: -100.0}},
        {"allowed_tokens": token_mask({5, 6, 7})},
        {"bad_words": ((5,), (6, 7))},
        {"min_tokens": 4, "ignore_eos": False, "stop_token_ids": frozenset({60})},
        {"stop": ("a", "e")},
        {"prompt_logprobs": 2, "logprobs": 5},
        {"grammar": grammar, "ignore_eos": False},
        random | {"grammar": grammar, "ignore_eos": False, "frequency_penalty": 0.1},
    ]
    asked = {str(n): Asked(PROMPTS[n % 3], params=params) for n, params in enumerate(every)}

    # More tokens than the sampler sorts unless a row's top-p needs them.
    compare(lambda: tiny_model("llama", vocab_size=TOKENS + 700), {}, asked, max_rows=10)


def test_adapters_with_whole_modules(compare: Callable[..., Answered], tmp_path: Path) -> None:
    base = tiny_model("llama")
    saved: dict[str, dict[str, Any]] = {
        "ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "mlp": {
            "modules_to_save": ["mlp"],
            "target_modules": ["k_proj"],
            "feedforward_modules": [],
        },
        "vectors": {},
    }
    adapters = {
        name: save_adapter(base, tmp_path / name, seed=seed, **config)
        for seed, (name, config) in enumerate(saved.items(), start=1)
    }

    compare(lambda: tiny_model("llama"), adapters, mixed(adapters), max_rows=5)


@pytest.mark.usefixtures("free_tokens")
def test_drafted_tokens(compare: Callable[..., Answered], adapters: dict[str, Path]) -> None:
    loop = [5, 6, 7, 8] * 4
    asked = {
        name: Asked(loop, [name] if name else [], {"max_tokens": 16} | params, speculation=True)
        for name, params in {"": {}, "default": {"temperature": 0.5, "seed": 1}}.items()
    }

    found = compare(lambda: tiny_model("llama"), adapters, asked)

    assert found.core.stats().drafted_tokens > 0


def test_shared_pages_and_preempted_rows(
    compare: Callable[..., Answered], adapters: dict[str, Path]
) -> None:
    common = [5 + n % 250 for n in range(300)]
    asked = [
        {
            f"{turn}-{name}-{n}": Asked([*common, turn, n], [name] if name else [])
            for name in ("", "default")
            for n in range(3)
        }
        for turn in range(5, 7)
    ]
    # Rows of two pages; each takes a third one after 72 tokens.
    long = {str(n): Asked([9 + n] * 440, params={"max_tokens": 80}) for n in range(4)}

    found = compare(
        lambda: tiny_model("llama", max_position_embeddings=1024),
        adapters,
        *asked,
        long,
        kv_cache_tokens=2048,
        prefill_chunk_tokens=150,
    )

    stats = found.core.stats()
    assert stats.prefix_hit_tokens > 1000
    assert stats.preemptions > 0


def test_half_precision_by_the_kernel(
    gpu: SimulatedCuda, compare: Callable[..., Answered], adapters: dict[str, Path]
) -> None:
    compare(
        lambda: tiny_model("mistral", sliding_window=8).to(torch.bfloat16),
        adapters,
        mixed({"default": adapters["default"]}, max_tokens=2),
        near=0.05,
    )

    assert gpu.ran["torch_attn::_varlen_attn"] > 0


FEW = ["gemma2", "mixtral", "gpt2", "bloom", "t5"]
"""Soft caps and windows, experts, fused linears; padded without and with an encoder."""
FEW_HYBRIDS = ["qwen3_next", "lfm2"]
"""A delta rule with experts, and a convolution."""


def every(families: Sequence[str], few: Sequence[str]) -> Any:
    """Without --full, a few of them."""
    marked = [pytest.param(f, marks=[] if f in few else [pytest.mark.full]) for f in families]
    return pytest.mark.parametrize("family", marked)


@every(FAMILIES, FEW)
def test_a_family_runs_as_on_the_cpu(
    compare: Callable[..., Answered], tmp_path: Path, family: str
) -> None:
    adapters = save_adapters(FAMILIES[family], tiny(family), tmp_path / "adapters")

    found = compare(lambda: tiny(family), adapters, mixed(adapters), prefill_chunk_tokens=9)

    assert found.kind == ("padded" if family in PADDED else "flat")


@every(HYBRIDS, FEW_HYBRIDS)
def test_a_hybrid_family_runs_as_on_the_cpu(
    compare: Callable[..., Answered], tmp_path: Path, family: str
) -> None:
    adapters = hybrid_adapters(family, tmp_path / "adapters")

    compare(
        lambda: tiny_hybrid(family),
        adapters,
        mixed(adapters),
        prefill_chunk_tokens=9,
        max_model_len=256,
    )
