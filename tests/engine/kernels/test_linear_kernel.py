"""A linear layer by our kernel, each token with IA3 vectors of its own."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from infuse.adapters.model.layer import ByToken, Scale
from infuse.server.engine.native.kernels.build import NUMBERS
from infuse.server.engine.native.kernels.linear import KernelLinear, Pack, Scales, linear_kernel
from infuse.server.engine.native.model.packing import packing_works

ENTRIES = 4


@pytest.fixture(scope="module")
def widening(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """For bfloat16, where the processor has no instruction for it."""
    folder: Path = tmp_path_factory.mktemp("widening")
    flags = (*NUMBERS[torch.bfloat16], "-mno-avx512bf16")
    return linear_kernel(flags, folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "bfloat16, widened"])
def pack(
    request: pytest.FixtureRequest, kernels: Mapping[torch.dtype, Pack], widening: Pack
) -> tuple[Pack, torch.dtype]:
    name, *widened = request.param.split(", ")
    dtype: torch.dtype = getattr(torch, name)
    return (widening if widened else kernels[dtype]), dtype


def parameters(
    outputs: int, inputs: int, bias: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs).to(dtype)
    return weight, torch.randn(outputs).to(dtype) if bias else None


def layer(pack: tuple[Pack, torch.dtype], inputs: int, outputs: int, bias: bool) -> KernelLinear:
    linear = pack[0](*parameters(outputs, inputs, bias, pack[1]))
    assert isinstance(linear, KernelLinear)
    return linear


def exact(linear: KernelLinear, x: torch.Tensor) -> torch.Tensor:
    """The same in float64, by torch."""
    shape = linear.outputs, linear.inputs
    weight, bias = parameters(*shape, linear.bias is not None, x.dtype)
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def by_token(linear: KernelLinear, size: int, entries: torch.Tensor) -> Scale:
    """Some columns of a wider bank. Factors are whole 64ths."""
    width = linear.panel_width
    panels = torch.randint(32, 97, (2 + -(-size // width), ENTRIES, width)) / 64
    return Scale(by_token=ByToken(panels[1:-1], entries, size))


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = max(1e-5, 2 * torch.finfo(found.dtype).eps)
    assert (found - wanted).abs().max() <= error * wanted.abs().max()


def test_it_computes_here(pack: tuple[Pack, torch.dtype]) -> None:
    kernel, dtype = pack
    assert packing_works(dtype, kernel)


@given(
    tokens=st.integers(1, 130),
    inputs=st.one_of(st.integers(1, 70), st.integers(700, 1600)),
    outputs=st.integers(1, 150),
    bias=st.booleans(),
)
def test_a_linear_layer_equals_torchs_for_any_shape(
    pack: tuple[Pack, torch.dtype], tokens: int, inputs: int, outputs: int, bias: bool
) -> None:
    linear = layer(pack, inputs, outputs, bias)
    x = torch.randn(1, tokens, inputs).to(pack[1])

    assert_near(linear(x), exact(linear, x))


@given(tokens=st.integers(1, 130), inputs=st.integers(1, 70), bias=st.booleans())
def test_one_half_of_a_layers_outputs_is_the_others_gate(
    pack: tuple[Pack, torch.dtype], tokens: int, inputs: int, bias: bool
) -> None:
    linear = layer(pack, inputs, 128, bias)
    assert linear.can_gate
    x = 3 * torch.randn(1, tokens, inputs).to(pack[1])
    taken = ((slice(20, 100), by_token(linear, 80, torch.randint(0, ENTRIES, (tokens,)))),)
    wanted = exact(linear, x)
    taken[0][1].scale_(wanted[..., 20:100])
    gate, up = wanted.chunk(2, dim=-1)
    gated = by_token(linear, 64, torch.randint(0, ENTRIES, (tokens,)))

    scales = Scales(outputs=taken)
    assert_near(linear(x, scales, gate=True), F.silu(gate) * up)
    scales = Scales(outputs=taken, gated=gated)
    assert_near(linear(x, scales, gate=True), gated.scale_(F.silu(gate) * up))


def test_halves_that_share_a_panel_have_no_gate(pack: tuple[Pack, torch.dtype]) -> None:
    assert not layer(pack, 8, 72, False).can_gate


@given(
    tokens=st.integers(1, 100),
    inputs=st.integers(1, 70),
    edges=st.lists(st.integers(0, 60), min_size=4, max_size=4, unique=True).map(sorted),
    bias=st.booleans(),
    given_too=st.booleans(),
)
def test_vectors_rescale_the_input_and_parts_of_the_output(
    pack: tuple[Pack, torch.dtype],
    tokens: int,
    inputs: int,
    edges: list[int],
    bias: bool,
    given_too: bool,
) -> None:
    """As an IA3 layer does: `l * (W x + b)` and `W (l * x) + b`."""
    linear = layer(pack, inputs, 61, bias)
    x = torch.randn(1, tokens, inputs).to(pack[1])
    entries = torch.randint(0, ENTRIES, (tokens,))
    given = by_token(linear, inputs, entries) if given_too else None
    parts = [slice(*edges[:2]), slice(*edges[2:])]
    taken = tuple((part, by_token(linear, part.stop - part.start, entries)) for part in parts)
    wanted = exact(linear, x if given is None else given.scaled(x))
    for part, scale in taken:
        scale.scale_(wanted[..., part])

    assert_near(linear(x, Scales(given, taken)), wanted)
    assert_near(linear(x), exact(linear, x))


def test_a_token_gets_the_same_to_the_bit_in_any_batch_and_on_any_number_of_threads(
    pack: tuple[Pack, torch.dtype],
) -> None:
    linear = layer(pack, 800, 200, bias=True)
    x = torch.randn(1, 150, 800).to(pack[1])
    together = linear(x)

    for tokens in (1, 2, 7, 48, 49, 97):
        assert torch.equal(linear(x[:, :tokens]), together[:, :tokens])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(linear(x), together)
    finally:
        torch.set_num_threads(threads)


def test_an_input_in_any_layout_is_read_as_it_is(pack: tuple[Pack, torch.dtype]) -> None:
    linear = layer(pack, 40, 30, bias=False)
    x = torch.randn(40, 9).to(pack[1]).t()[None]

    assert torch.equal(linear(x), linear(x.contiguous()))


@given(tokens=st.integers(1, 60), inputs=st.integers(1, 150), bias=st.booleans())
def test_bfloat16_is_rounded_where_a_layer_of_peft_rounds(
    kernels: Mapping[torch.dtype, Pack], tokens: int, inputs: int, bias: bool
) -> None:
    """`ia3.layer.Linear.forward`: the layer's result, and then that by its vector; or its input by
    its vector. Sums of such numbers are exact, in any order."""
    torch.manual_seed(0)
    weight, x = (torch.randint(-9, 10, (rows, inputs)).bfloat16() for rows in (70, tokens))
    shift = torch.randint(-9, 10, (70,)).bfloat16() if bias else None
    linear = kernels[torch.bfloat16](weight, shift)
    assert isinstance(linear, KernelLinear)
    entries = torch.randint(0, ENTRIES, (tokens,))
    given, taken = (by_token(linear, size, entries) for size in (inputs, 70))

    def result(x: torch.Tensor) -> torch.Tensor:
        to = None if shift is None else shift.double()
        return F.linear(x.double(), weight.double(), to).bfloat16()

    outputs = ((slice(0, 70), taken),)
    assert torch.equal(linear(x, Scales(outputs=outputs)), taken.scaled(result(x)))
    assert torch.equal(linear(x, Scales(input=given)), result(given.scaled(x)))
