"""Bases in 8 and 4 bits: PEFT's results on the very same quantised base, and what is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerTensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from infuse.server.engine import UnsupportedModel
from infuse.server.engine.native import load_model
from infuse.server.engine.native.model import quantization
from infuse.server.engine.native.model.packing import pack_linears
from infuse.server.engine.native.model.quantization import is_quantized, weights_bytes
from tests.engine.harness import Harness, Oracle, worst_error
from tests.factories import TOKENS, save_adapter, tiny_model, tiny_tokenizer

PROMPTS = [[5 + (11 * row + n) % 250 for n in range(3 + 5 * row)] for row in range(10)]
QUANTIZED = [("llama", "int8"), ("llama", "int4"), ("opt", "int8"), ("gpt2", "int4")]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A saved tiny model of a family."""

    return lambda family: save(tiny_model(family), tmp_path / family)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_quantized(source: Path, target: Path, config: Any) -> Path:
    """What transformers writes of a quantised model."""
    return save(AutoModelForCausalLM.from_pretrained(source, quantization_config=config), target)


def offered(family: str, adapters: dict[str, Path], root: Path) -> dict[str, Path]:
    if family == "llama":
        return adapters
    return {"default": save_adapter(tiny_model(family), root / "default")}


def quantized_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantized(module)
    ]


def assert_a_mixed_batch_equals_peft(
    engine: Harness, theirs: PreTrainedModel, adapters: dict[str, Path]
) -> None:
    """`theirs`: the same base for PEFT."""
    names = ([None, *adapters] * 5)[:10]
    oracles = {name: Oracle(theirs, adapters.get(name or "")) for name in set(names)}
    with engine.held():
        for row, prompt in enumerate(PROMPTS):
            engine.submit(str(row), prompt, names[row], max_tokens=10)
    engine.wait()

    for row, prompt in enumerate(PROMPTS):
        assert engine.answers[str(row)].tokens == oracles[names[row]].greedy(prompt, 10)


@pytest.mark.parametrize(("family", "bits"), QUANTIZED)
def test_a_mixed_batch_equals_peft_on_the_same_quantised_base(
    start: Callable[..., Harness],
    folder: Callable[[str], Path],
    adapters: dict[str, Path],
    tmp_path: Path,
    family: str,
    bits: Any,
) -> None:
    base = load_model(str(folder(family)), "cpu", quantization=bits).model
    mine = offered(family, adapters, tmp_path)
    theirs = copy.deepcopy(base)
    engine = start(base, mine, prefill_chunk_tokens=9)

    assert_a_mixed_batch_equals_peft(engine, theirs, mine)
    engine.assert_idle()


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The same rounded weights, as their library reads them, in plain linear layers."""
    plain = copy.deepcopy(model)
    for name, module in quantized_linears(plain):
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                module.weight, module.weight.quant_state
            )
        else:
            weight = module.weight.dequantize(torch.float32)
        linear.weight = nn.Parameter(weight)
        linear.bias = module.bias
        plain.set_submodule(name, linear)
    return plain.double()


def exact_logprobs(base: PreTrainedModel, adapter: Path, prompt: list[int]) -> torch.Tensor:
    """`[tokens, vocab]`, by PEFT in float64."""
    return Oracle(in_float64(base), adapter, torch.float64).logits(prompt).log_softmax(-1)


def hooked(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The adapter's vectors put on by hooks, in float32: PEFT's formula where PEFT itself fails."""

    def scaled(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return (x.float() * vector.flatten()).to(x.dtype)

    model = copy.deepcopy(model)
    for key, vector in load_file(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
        module = model.get_submodule(name)
        if vector.shape[0] == 1:
            module.register_forward_pre_hook(lambda _, args, v=vector: (scaled(args[0], v),))
        else:
            module.register_forward_hook(lambda _, __, y, v=vector: scaled(y, v))
    return model


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_logits_err_at_most_twice_as_much_as_pefts_do(
    start: Callable[..., Harness],
    folder: Callable[[str], Path],
    adapters: dict[str, Path],
    bits: Any,
) -> None:
    base = load_model(str(folder("llama")), "cpu", quantization=bits).model
    asked = list(zip(adapters, PROMPTS, strict=False))
    exact = {name: exact_logprobs(base, adapters[name], prompt) for name, prompt in asked}
    theirs = max(
        (Oracle(base, adapters[name]).logits(prompt).log_softmax(-1) - exact[name]).abs().max()
        for name, prompt in asked
    )
    engine = start(base)
    with engine.held():
        for name, prompt in asked:
            engine.submit(name, prompt, name, max_tokens=1, prompt_logprobs=TOKENS)
    engine.wait()

    assert max(worst_error(engine.answers[name], exact[name]) for name, _ in asked) <= 2 * theirs


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_at_most_twice_as_much_as_hooks_in_the_same_dtype(
    start: Callable[..., Harness],
    folder: Callable[[str], Path],
    adapters: dict[str, Path],
    bits: Any,
    dtype: str,
) -> None:
    """PEFT's bitsandbytes layers answer in float32 here, and attention then refuses to mix."""
    base = load_model(str(folder("llama")), "cpu", dtype, bits).model
    adapter, prompt = adapters["default"], PROMPTS[-1]
    exact = exact_logprobs(base, adapter, prompt)
    plain = Oracle(hooked(base, adapter), None, base.dtype).logits(prompt).double()
    theirs = (plain.log_softmax(-1) - exact).abs().max().item()
    engine = start(base)
    answer = engine.ask(prompt, "default", max_tokens=1, prompt_logprobs=TOKENS)

    assert worst_error(answer, exact) <= 2 * theirs


def test_a_processor_with_bfloat16_does_not_round_a_float32_base(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ids = str(folder("llama")), torch.tensor([PROMPTS[5]])
    with torch.inference_mode():
        wanted = load_model(path, "cpu", quantization="int4").model(ids).logits
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
        found = load_model(path, "cpu", quantization="int4").model(ids).logits

    assert torch.equal(found, wanted)


def test_layers_too_narrow_for_the_layout_of_bfloat16_do_not_use_it(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor that has none, bitsandbytes could not run the others."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr(quantization, "rows_are_independent", lambda *_: True)
    model = load_model(str(folder("llama")), "cpu", "bfloat16", "int4").model

    packs = {m.in_features: m.support_avx512bf16_for_cpu for _, m in quantized_linears(model)}
    assert packs == {32: False, 64: True}


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_checkpoint_that_is_quantised_loads_as_it_is(
    folder: Callable[[str], Path], tmp_path: Path, bits: Any
) -> None:
    fresh = load_model(str(folder("llama")), "cpu", quantization=bits).model
    again = load_model(str(save(fresh, tmp_path / "saved")), "cpu").model
    ids = torch.tensor([PROMPTS[5]])

    assert len(quantized_linears(again)) == 2 * 7
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, fresh(ids).logits)


def test_an_llm_int8_checkpoint_keeps_its_weights_and_rounds_no_activations(
    start: Callable[..., Harness],
    folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """bitsandbytes says what the weights are; PEFT in float64, what an adapter makes of them."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    saved = save_quantized(folder("gpt2"), tmp_path / "8bit", config)
    theirs = AutoModelForCausalLM.from_pretrained(saved, device_map="cpu").dequantize()
    base = load_model(str(saved), "cpu").model

    assert len(quantized_linears(base)) == 2 * 4
    for name, module in quantized_linears(base):
        weight = theirs.get_submodule(name).weight.float()
        torch.testing.assert_close(module.weight.dequantize(), weight, rtol=1e-3, atol=1e-6)
    adapter = save_adapter(tiny_model("gpt2"), tmp_path / "a")
    exact = exact_logprobs(base, adapter, PROMPTS[3])
    engine = start(base, {"a": adapter})
    answer = engine.ask(PROMPTS[3], "a", max_tokens=1, prompt_logprobs=TOKENS)
    assert worst_error(answer, exact) < 1e-4


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_layers_are_not_packed_and_the_head_is(
    folder: Callable[[str], Path], bits: Any
) -> None:
    base = load_model(str(folder("llama")), "cpu", quantization=bits).model
    ids = torch.tensor([PROMPTS[5]])
    with torch.inference_mode():
        before = base(ids).logits
        assert pack_linears(base) == 1
        torch.testing.assert_close(base(ids).logits, before, atol=1e-5, rtol=1e-4)
    assert len(quantized_linears(base)) == 2 * 7


@pytest.mark.parametrize(("bits", "per_weight"), [("int8", 1.0), ("int4", 0.5)])
def test_the_weights_bytes_are_those_of_the_rounded_weights_and_their_scales(
    folder: Callable[[str], Path], bits: Any, per_weight: float
) -> None:
    path = str(folder("llama"))
    plain, rounded = load_model(path, "cpu"), load_model(path, "cpu", quantization=bits)
    linears = quantized_linears(rounded.model)
    weights = sum(module.in_features * module.out_features for _, module in linears)
    outputs = sum(module.out_features for _, module in linears)
    # int8: a float32 scale and an int8 zero point per output; NF4: a float32 scale per 64 weights.
    scales = 5 * outputs if bits == "int8" else 4 * weights // 64

    saved = weights_bytes(plain.model) - weights_bytes(rounded.model)
    assert saved == 4 * weights - (per_weight * weights + scales)


def test_a_server_says_how_much_its_quantised_weights_take(
    start: Callable[..., Harness], folder: Callable[[str], Path]
) -> None:
    base = load_model(str(folder("llama")), "cpu", quantization="int8").model
    wanted = weights_bytes(base)

    assert start(base).engine.stats().weights_bytes == wanted


def test_quantising_a_quantised_checkpoint_is_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    saved = save_quantized(folder("llama"), tmp_path / "4bit", config)
    with pytest.raises(UnsupportedModel, match="quantised already, by bitsandbytes"):
        load_model(str(saved), "cpu", quantization="int8")


def test_a_checkpoint_by_another_library_is_refused(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"quantised by gptq.*original checkpoint"):
        load_model(str(path), "cpu")


def test_missing_libraries_are_named_with_the_way_to_install_them(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantization.LIBRARIES, "torchao", lambda: False)
    with pytest.raises(UnsupportedModel, match=r"needs torchao: pip.*server\[quantization\]"):
        load_model(str(folder("llama")), "cpu", quantization="int8")
    assert load_model(str(folder("llama")), "cpu").model is not None


def test_a_model_with_nothing_to_quantise_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel has no layer.*int4"):
        load_model(str(folder("gpt2")), "cpu", quantization="int8")


def test_a_checkpoint_that_rounds_activations_over_the_whole_batch_is_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())
    saved = save_quantized(folder("llama"), tmp_path / "dynamic", TorchAoConfig(config))
    with pytest.raises(UnsupportedModel, match="would depend on the batch"):
        load_model(str(saved), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_mixed_batch_on_a_gpu_equals_peft_on_the_same_quantised_base(
    start: Callable[..., Harness],
    folder: Callable[[str], Path],
    adapters: dict[str, Path],
    bits: Any,
) -> None:
    path = str(folder("llama"))
    theirs = load_model(path, "cuda", "float32", bits).model
    engine = start(load_model(path, "cuda", "float32", bits).model)

    assert_a_mixed_batch_equals_peft(engine, theirs, adapters)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_captured_steps_in_bfloat16_are_near_to_float32(
    start: Callable[..., Harness],
    folder: Callable[[str], Path],
    adapters: dict[str, Path],
    bits: Any,
) -> None:
    path = str(folder("llama"))
    exact = Oracle(load_model(path, "cpu", quantization=bits).model, adapters["default"])
    engine = start(load_model(path, "cuda", "bfloat16", bits).model)
    tokens = engine.ask(PROMPTS[3], "default", max_tokens=8).tokens

    scores = exact.logits([*PROMPTS[3], *tokens])[len(PROMPTS[3]) - 1 : -1]
    chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (scores.max(-1).values - chosen).max() <= 0.2
