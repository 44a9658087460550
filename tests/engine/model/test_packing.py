import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from infuse.server.engine.native.model import packing
from infuse.server.engine.native.model.packing import (
    Linear,
    PackedLinear,
    PackedSibling,
    Siblings,
    fastest,
    noting_reads,
    noting_siblings,
    pack_for_onednn,
    pack_linears,
    packing_works,
    speed_of,
)
from tests.factories import tiny_model

IDS = torch.tensor([[5, 6, 7]])


def test_this_build_of_torch_packs_float32() -> None:
    """The operators are not public: a torch without them must be noticed here first."""
    assert packing_works(torch.float32)


PREPARING = """
import psutil, torch
from infuse.server.engine.native.model.packing import pack_for_onednn

linear = pack_for_onednn(torch.randn(64, 64), None)
memory = []
for tokens in range(1, 1001):
    linear(torch.randn(1, tokens, 64))
    if tokens in (400, 1000):
        memory.append(psutil.Process().memory_info().rss)
print((memory[1] - memory[0]) // 2**20)
"""


def test_what_is_prepared_for_many_numbers_of_tokens_is_not_all_kept() -> None:
    """In a process of its own, as what bounds the memory is read once. Without it, 350 MiB."""
    ran = subprocess.run(
        [sys.executable, "-c", PREPARING],
        env={name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) < 100


@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
)
def test_a_packed_layer_equals_torchs_for_any_shape(
    rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(1, rows, inputs)
    wanted = F.linear(x, linear.weight, linear.bias)

    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), wanted, atol=1e-5, rtol=1e-4)


def test_a_packed_layer_keeps_its_weights_dtype_and_shape_but_no_copy_of_it() -> None:
    packed = PackedLinear(nn.Linear(8, 16))

    assert (packed.weight.dtype, packed.weight.shape) == (torch.float32, (16, 8))
    assert packed.weight.is_meta


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: F.linear(torch.ones(1, 8), weight),
        lambda weight: weight.to(torch.float64),
        lambda weight: weight.T @ torch.ones(16),
        lambda weight: weight[0],
        lambda weight: weight.sum().item(),
    ],
)
def test_whoever_reads_a_packed_weight_gets_an_error_and_no_numbers(
    read: Callable[[torch.Tensor], object],
) -> None:
    """torch 2.13's `F.linear` makes uninitialised memory of a meta tensor, without an error."""
    with pytest.raises(RuntimeError, match="packed"):
        read(PackedLinear(nn.Linear(8, 16)).weight)


def test_a_layer_whose_weight_the_model_reads_itself_is_not_packed() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier, self.plain = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x.float(), self.classifier.weight.float()) + self.plain(x)

    model = Router()
    with noting_reads(model) as read:
        wanted = model(torch.ones(1, 8))

    assert read == {"classifier"}
    assert pack_linears(model, read=read) == 1
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.ones(1, 8)), wanted)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_a_packed_model_gives_the_same_logits_and_keeps_tied_embeddings() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    wanted = logits(model)
    packed = pack_linears(model)

    assert packed == 2 * 7 + 1
    assert not model.get_input_embeddings().weight.is_meta
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)


def test_layers_stay_as_they_are_where_packing_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object) -> Linear:
        raise AttributeError("no such operator in this build")

    monkeypatch.setattr(packing, "pack_for_onednn", missing)
    model = tiny_model("llama")

    assert pack_linears(model) == 0
    assert logits(model).isfinite().all()


def test_what_computes_wrongly_is_not_used() -> None:
    def wrong(weight: torch.Tensor, _bias: torch.Tensor | None) -> Linear:
        return lambda x: x.new_zeros(*x.shape[:-1], len(weight))

    assert packing_works(torch.float32)
    assert not packing_works(torch.float32, wrong)


def test_layers_that_are_no_plain_linear_are_left_alone() -> None:
    """GPT-2's Conv1D computes with its own weight; its LM head is a linear layer."""
    assert pack_linears(tiny_model("gpt2")) == 1


def packed_with_siblings(kind: str, **config: object) -> tuple[PreTrainedModel, torch.Tensor]:
    """A packed model, and the logits that it gave before."""
    model = tiny_model(kind, **config)
    with noting_siblings(model) as siblings:
        wanted = logits(model)
    pack_linears(model, siblings)
    return model, wanted


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gemma2", "mixtral"])
def test_layers_that_read_the_same_input_are_one_layer(kind: str) -> None:
    model, wanted = packed_with_siblings(kind)
    siblings = [m.siblings for m in model.modules() if isinstance(m, PackedSibling)]

    assert len(siblings) > len(set(map(id, siblings)))
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)


def test_siblings_keep_neither_input_nor_outputs_once_each_has_its_own() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def noting(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        def linear(x: torch.Tensor) -> torch.Tensor:
            outputs = F.linear(x, weight, bias)
            alive.extend(map(weakref.ref, (x, outputs)))
            return outputs

        return linear

    siblings = Siblings([nn.Linear(8, 8), nn.Linear(8, 4)], noting)
    with torch.inference_mode():
        x = torch.randn(1, 3, 8)
        siblings.take(0, x)
        assert all(tensor() is not None for tensor in alive)
        siblings.take(1, x)
    del x

    assert [tensor() for tensor in alive] == [None, None]


@given(order=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12))
def test_a_sibling_gives_its_own_part_whoever_was_asked_before(
    order: list[tuple[int, int]],
) -> None:
    """An adapter may rescale what one of them reads."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 4), "v": nn.Linear(8, 4)})
    plain = list(model.values())
    inputs = [torch.randn(1, 3, 8) for _ in range(3)]
    with torch.inference_mode():
        wanted = [[layer(x) for x in inputs] for layer in plain]
    pack_linears(model, ["qkv"])
    with torch.inference_mode():
        for member, which in order:
            found = model["qkv"[member]](inputs[which])
            torch.testing.assert_close(found, wanted[member][which], atol=1e-5, rtol=1e-4)
            found.mul_(0.0)  # It belongs to whoever asked, as with any layer.


def test_of_those_that_compute_rightly_the_fastest_is_taken() -> None:
    def slow(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        linear = pack_for_onednn(weight, bias)
        return lambda x: (time.sleep(0.005), linear(x))[1]

    def wrong(weight: torch.Tensor, _bias: torch.Tensor | None) -> Linear:
        return lambda x: x.new_zeros(*x.shape[:-1], len(weight))

    assert fastest([slow, pack_for_onednn, wrong], torch.float32) is pack_for_onednn
    assert fastest([pack_for_onednn, wrong, slow], torch.float32) is pack_for_onednn
    assert fastest([wrong], torch.float32) is None


def test_the_speed_of_a_dtype_is_measured_against_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.2 < speed_of(torch.float32) < 5

    monkeypatch.setattr(packing, "packing_works", lambda _: False)

    assert speed_of(torch.bfloat16) == 0.0
