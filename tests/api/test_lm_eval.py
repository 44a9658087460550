"""lm-evaluation-harness, unmodified, finds in the server what it finds in PEFT.

The tasks are in `lm_eval/`, beside this file.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infuse.server.engine.model_files import default_model_folder
from infuse.server.services import Services
from tests.api.conftest import RunningServer

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "adapters"
TASKS = ["infuse_choice", "infuse_generate", "infuse_perplexity"]
NEAR = 1e-3
"""How far log-likelihoods may differ: sums of some dozens of tokens in float32."""

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks name their data from the repository's root; nothing outside is asked or kept."""
    import datasets

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def evaluate(model: str, arguments: dict[str, Any], batch_size: int = 1) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=TASKS,
        batch_size=batch_size,
        task_manager=TaskManager(include_path=str(Path(__file__).parent / "lm_eval")),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return dict(found)


def by_server(url: str, name: str, tokenizer: Path, **arguments: Any) -> dict[str, Any]:
    settings = {
        "model": name,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        "max_length": 256,
    }
    return evaluate("local-completions", settings | arguments, batch_size=4)


def by_peft(base: Path, adapter: Path | None) -> dict[str, Any]:
    settings = {"pretrained": str(base), "dtype": "float32", "device": "cpu", "max_length": 256}
    return evaluate("hf", settings | ({} if adapter is None else {"peft": str(adapter)}))


def responses(found: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to each request, in the documents' order."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["filtered_resps"]]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=NEAR), metric
    assert responses(ours, "infuse_generate") == responses(theirs, "infuse_generate")
    mine, pefts = responses(ours, "infuse_choice"), responses(theirs, "infuse_choice")
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in pefts]
    assert [value for value, _ in mine] == pytest.approx([v for v, _ in pefts], abs=NEAR)
    mine, pefts = responses(ours, "infuse_perplexity"), responses(theirs, "infuse_perplexity")
    assert mine == pytest.approx(pefts, abs=NEAR)


@pytest.mark.parametrize("name", ["tiny", "default", "mlp"])
@pytest.mark.parametrize("way", [{}, {"num_concurrent": 4}, {"tokenized_requests": False}])
def test_a_tiny_model_scores_as_in_peft(
    server: RunningServer, name: str, way: dict[str, Any]
) -> None:
    ours = by_server(server.base_url, name, server.model_folder, **way)

    assert_same(ours, by_peft(server.model_folder, server.adapter_folders.get(name)))


@pytest.mark.real
def test_the_default_model_scores_as_in_peft(
    start_server: Callable[..., tuple[str, Services]],
) -> None:
    base = default_model_folder()
    url, _ = start_server(
        model=str(base), served_model_name="base", preload_adapters=EXAMPLES, max_model_len=512
    )
    scores = {}
    for name, adapter in {"base": None, "sentiment": EXAMPLES / "sentiment"}.items():
        ours = by_server(url, name, base)
        theirs = by_peft(base, adapter)
        gc.collect()
        assert_same(ours, theirs)
        scores[name] = ours["results"]["infuse_choice"]["acc,none"]

    assert scores["base"] != scores["sentiment"]
