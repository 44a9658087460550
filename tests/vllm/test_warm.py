"""`infuse warm --engine vllm` compiles what `infuse serve --engine vllm` then finds compiled."""

import shutil
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

from infuse.adapters.checkpoint.targets import Target
from infuse.adapters.storage.store import AdapterStore
from infuse.server.app import load_services, warm_up
from infuse.server.cli import app
from infuse.server.engine.vllm import llm
from infuse.server.settings import Settings
from tests.factories import save_adapter, tiny_tokenizer
from tests.vllm.harness import vllm_processes

WIDER = {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}
QUERIES = {"target_modules": ["o_proj"], "feedforward_modules": []}


@pytest.fixture
def settings(llama: PreTrainedModel, tmp_path: Path) -> Settings:
    """With an adapter that is stored, and another that is to be preloaded."""
    llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    stored = save_adapter(llama, tmp_path / "stored", **WIDER)
    save_adapter(llama, tmp_path / "preloaded" / "queries", **QUERIES)
    with closing(AdapterStore(tmp_path / "store")) as store, store.staging() as staged:
        shutil.copytree(stored, staged, dirs_exist_ok=True)
        store.create("stored", staged)
    return Settings(
        engine="vllm",
        model=str(tmp_path / "model"),
        adapters_dir=tmp_path / "store",
        preload_adapters=tmp_path / "preloaded",
        kv_cache_tokens=2048,
    )


def test_warm_plans_what_a_server_plans(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotStarted(Exception):
        """Instead of vLLM's processes."""

    def planned(_: object, slots: llm.Slots, config: object) -> None:
        plans.append((slots.targets, slots.capacity, config))
        raise NotStarted

    plans: list[tuple[tuple[Target, ...], int, object]] = []
    monkeypatch.setattr(llm, "Llm", planned)
    for start in (warm_up, load_services):
        with pytest.raises(NotStarted):
            start(settings)

    assert plans[0] == plans[1]
    modules = {target.module.rpartition(".")[2] for target in plans[0][0]}
    assert modules == {"k_proj", "v_proj", "down_proj", "q_proj", "up_proj", "o_proj"}


@pytest.mark.full
def test_warm_compiles_and_leaves_no_process(settings: Settings) -> None:
    before = vllm_processes()
    given = [(name, getattr(settings, name)) for name in settings.model_fields_set]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given]
    done = CliRunner().invoke(app, ["warm", *flags])

    assert done.exit_code == 0, done.output
    assert "The model is compiled" in done.output
    left = [each for each in vllm_processes() if each not in before]
    assert psutil.wait_procs(left, timeout=30)[1] == []
