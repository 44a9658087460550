"""The wrapper around one linear layer, against PEFT's."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from infuse.adapters.model.layer import IA3Layer, Scale

SIZE = 16


def linear(bias: bool) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(SIZE, SIZE, bias=bias)


def conv1d() -> nn.Module:
    torch.manual_seed(1)
    layer = Conv1D(SIZE, SIZE)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {"plain": linear(bias=False), "biased": linear(bias=True), "conv1d": conv1d()}


def by_peft(layer: nn.Module, vector: torch.Tensor, on_input: bool) -> nn.Module:
    """PEFT's layer around a copy of ours; its vectors are never narrower than float32."""
    config = peft.IA3Config(
        target_modules=["only"], feedforward_modules=["only"] if on_input else []
    )
    model = peft.IA3Model(nn.ModuleDict({"only": copy.deepcopy(layer)}), config, "default")
    wrapped = model.model["only"]
    parameter = wrapped.ia3_l["default"]
    wide = torch.promote_types(parameter.dtype, torch.float32)
    parameter.data = vector.view_as(parameter).to(wide)
    return wrapped


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("on_input", [True, False], ids=["input", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_scaled_layer_is_peft_s_bit_for_bit(
    kind: str, dtype: torch.dtype, on_input: bool
) -> None:
    base = copy.deepcopy(LAYERS[kind]).to(dtype)
    vector, x = torch.randn(SIZE), torch.randn(2, 5, SIZE, dtype=dtype)
    layer = IA3Layer(base)
    if on_input:
        layer.input_scale = Scale(vector)
    else:
        layer.output_scale = Scale(vector)
    ours, theirs = layer(x), by_peft(base, vector, on_input)(x)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)


def test_a_layer_without_scales_is_its_base_layer() -> None:
    x = torch.randn(2, 5, SIZE)
    assert torch.equal(IA3Layer(LAYERS["biased"])(x), LAYERS["biased"](x))


@pytest.mark.parametrize(
    "scale", [Scale(torch.full((SIZE,), 3.0)), Scale(pieces=((1, 4, torch.full((SIZE,), 3.0)),))]
)
def test_the_input_is_left_as_it_was(scale: Scale) -> None:
    layer = IA3Layer(LAYERS["plain"])
    layer.input_scale = scale
    x = torch.randn(1, 5, SIZE)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


@torch.inference_mode()
def test_tokens_in_no_piece_keep_their_value() -> None:
    layer = IA3Layer(LAYERS["biased"])
    x, plain = torch.randn(1, 6, SIZE), torch.randn(SIZE)
    rows = torch.randn(2, SIZE)
    layer.output_scale = Scale(pieces=((0, 2, rows), (3, 5, plain)))
    got, base = layer(x), LAYERS["biased"](x)
    assert torch.equal(got[0, [2, 5]], base[0, [2, 5]])
    for token, vector in {0: rows[0], 1: rows[1], 3: plain, 4: plain}.items():
        alone = by_peft(LAYERS["biased"], vector, on_input=False)(x)
        assert torch.equal(got[0, token], alone[0, token])


@pytest.mark.parametrize("on_input", [True, False], ids=["input", "output"])
def test_a_batch_that_the_model_has_flattened_is_scaled_by_row(on_input: bool) -> None:
    """OPT calls its feed-forward layers with `[batch * tokens, size]`."""
    layer = IA3Layer(LAYERS["biased"])
    vectors, x = torch.randn(3, SIZE), torch.randn(3 * 4, SIZE)
    scale = Scale(vectors[:, None])
    layer.input_scale, layer.output_scale = (scale, None) if on_input else (None, scale)
    got = layer(x).view(3, 4, SIZE)
    for row, vector in enumerate(vectors):
        alone = by_peft(LAYERS["biased"], vector, on_input)(x).view(3, 4, SIZE)
        assert torch.equal(got[row], alone[row])


def test_both_sides_may_be_scaled_at_once() -> None:
    layer = IA3Layer(LAYERS["biased"])
    left, right, x = torch.randn(SIZE), torch.randn(SIZE), torch.randn(1, 3, SIZE)
    layer.input_scale, layer.output_scale = Scale(left), Scale(right)
    merged = copy.deepcopy(LAYERS["biased"])
    inner = by_peft(merged, left, on_input=True)
    outer = by_peft(inner.merge() or inner.get_base_layer(), right, on_input=False)
    assert torch.allclose(layer(x), outer(x), atol=1e-5)


@pytest.mark.parametrize("on_input", [True, False])
def test_rows_keep_their_own_vectors_where_heads_stand_between_rows_and_tokens(
    on_input: bool,
) -> None:
    """Latent attention calls its layers with `[rows, heads, tokens, size]`."""
    layer = IA3Layer(linear(bias=True))
    vectors = torch.rand(3, 1, SIZE) + 0.5
    x = torch.randn(3, 2, 5, SIZE)
    inner = layer.base_layer
    side = "input_scale" if on_input else "output_scale"
    setattr(layer, side, Scale(vectors))

    expected = [
        inner(row * vector) if on_input else inner(row) * vector
        for row, vector in zip(x, vectors, strict=True)
    ]
    with torch.no_grad():
        assert torch.allclose(layer(x), torch.stack(expected), atol=1e-6)
