"""A linear layer by our kernel, each token with IA3 vectors of its own."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from adapters.layer import ByToken, Scale
from server.engine.kernels.product import KernelProduct, Scales
from server.engine.packing import Pack, packing_works

ENTRIES = 4


def layer(pack: Pack, inputs: int, outputs: int, bias: bool) -> KernelProduct:
    torch.manual_seed(0)
    product = pack(torch.randn(outputs, inputs), torch.randn(outputs) if bias else None)
    assert isinstance(product, KernelProduct)
    return product


def exact(product: KernelProduct, x: torch.Tensor) -> torch.Tensor:
    """The same in float64, by torch."""
    torch.manual_seed(0)
    weight = torch.randn(product.outputs, product.inputs).double()
    bias = None if product._bias is None else torch.randn(product.outputs).double()
    return F.linear(x.double(), weight, bias)


def by_token(product: KernelProduct, size: int, entries: torch.Tensor) -> Scale:
    """Some columns of a wider bank."""
    width = product.panel_width
    panels = torch.rand(2 + -(-size // width), ENTRIES, width) + 0.5
    return Scale(by_token=ByToken(panels[1:-1], entries, size))


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_it_computes_here(kernel: Pack) -> None:
    assert packing_works(torch.float32, kernel)


@given(
    tokens=st.integers(1, 130),
    inputs=st.one_of(st.integers(1, 70), st.integers(700, 1600)),
    outputs=st.integers(1, 150),
    bias=st.booleans(),
)
def test_a_product_equals_torchs_for_any_shape(
    kernel: Pack, tokens: int, inputs: int, outputs: int, bias: bool
) -> None:
    product = layer(kernel, inputs, outputs, bias)
    x = torch.randn(1, tokens, inputs)

    assert_near(product(x), exact(product, x))


@given(tokens=st.integers(1, 130), inputs=st.integers(1, 70), bias=st.booleans())
def test_one_half_of_a_product_is_the_others_gate(
    kernel: Pack, tokens: int, inputs: int, bias: bool
) -> None:
    product = layer(kernel, inputs, 128, bias)
    assert product.can_gate
    x = 3 * torch.randn(1, tokens, inputs)
    taken = ((slice(20, 100), by_token(product, 80, torch.randint(0, ENTRIES, (tokens,)))),)
    wanted = exact(product, x)
    taken[0][1].scale_(wanted[..., 20:100])
    gate, up = wanted.chunk(2, dim=-1)
    gated = by_token(product, 64, torch.randint(0, ENTRIES, (tokens,)))

    scales = Scales(outputs=taken)
    assert_near(product(x, scales, gate=True), F.silu(gate) * up)
    scales = Scales(outputs=taken, gated=gated)
    assert_near(product(x, scales, gate=True), gated.scale_(F.silu(gate) * up))


def test_halves_that_share_a_panel_have_no_gate(kernel: Pack) -> None:
    assert not layer(kernel, 8, 72, False).can_gate


@given(
    tokens=st.integers(1, 100),
    inputs=st.integers(1, 70),
    edges=st.lists(st.integers(0, 60), min_size=4, max_size=4, unique=True).map(sorted),
    bias=st.booleans(),
    given_too=st.booleans(),
)
def test_vectors_rescale_the_input_and_parts_of_the_product(
    kernel: Pack, tokens: int, inputs: int, edges: list[int], bias: bool, given_too: bool
) -> None:
    """As an IA3 layer does: `l * (W x + b)` and `W (l * x) + b`."""
    product = layer(kernel, inputs, 61, bias)
    x = torch.randn(1, tokens, inputs)
    entries = torch.randint(0, ENTRIES, (tokens,))
    given = by_token(product, inputs, entries) if given_too else None
    parts = [slice(*edges[:2]), slice(*edges[2:])]
    taken = tuple((part, by_token(product, part.stop - part.start, entries)) for part in parts)
    wanted = exact(product, x if given is None else given.scaled(x))
    for part, scale in taken:
        scale.scale_(wanted[..., part])

    assert_near(product(x, Scales(given, taken)), wanted)
    assert_near(product(x), exact(product, x))


def test_a_token_gets_the_same_to_the_bit_in_any_batch_and_on_any_number_of_threads(
    kernel: Pack,
) -> None:
    product = layer(kernel, 800, 200, bias=True)
    x = torch.randn(1, 150, 800)
    together = product(x)

    for tokens in (1, 2, 7, 48, 49, 97):
        assert torch.equal(product(x[:, :tokens]), together[:, :tokens])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(product(x), together)
    finally:
        torch.set_num_threads(threads)


def test_an_input_in_any_layout_is_read_as_it_is(kernel: Pack) -> None:
    product = layer(kernel, 40, 30, bias=False)
    x = torch.randn(40, 9).t()[None]

    assert torch.equal(product(x), product(x.contiguous()))
