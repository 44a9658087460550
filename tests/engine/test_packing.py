import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from server.engine import packing
from server.engine.packing import PackedLinear, pack_linears, packing_works
from tests.factories import tiny_model

IDS = torch.tensor([[5, 6, 7]])


def test_this_build_of_torch_packs_float32() -> None:
    """The operators are not public: a torch without them must be noticed here first."""
    assert packing_works(torch.float32)


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
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator in this build")

    monkeypatch.setattr(packing, "_pack", missing)
    model = tiny_model("llama")

    assert pack_linears(model) == 0
    assert logits(model).isfinite().all()


def test_what_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_packed_linear", lambda *_: torch.zeros(1, 5, 48))

    assert not packing_works(torch.float32)


def test_layers_that_are_no_plain_linear_are_left_alone() -> None:
    """GPT-2's Conv1D computes with its own weight; its LM head is a linear layer."""
    assert pack_linears(tiny_model("gpt2")) == 1
