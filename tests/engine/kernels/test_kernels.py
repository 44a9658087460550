"""A kernel's life; what they compute is in `test_caches.py` and `test_linear_kernel.py`."""

from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.exc import InvalidCxxCompiler

from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.kernels.attention import attention_kernels
from infuse.server.engine.native.kernels.linear import linear_kernels

SHAPES = [LayerShape(2, 8, 8, torch.float32), LayerShape(2, 16, 16, torch.float16)]


def test_float16_has_no_kernel(tmp_path: Path) -> None:
    assert attention_kernels(SHAPES, tmp_path).keys() == {SHAPES[0]}
    assert linear_kernels(tmp_path).keys() == {torch.float32, torch.bfloat16}


def test_subnormal_numbers_stay_what_they_are(tmp_path: Path) -> None:
    """A library that is linked with -ffast-math makes them zero in all of its process."""
    attention_kernels(SHAPES, tmp_path)

    assert (torch.tensor([1e-40]) * 1).item() > 0


def test_a_damaged_library_is_built_anew(tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    attention_kernels(SHAPES, whole)
    [library] = whole.iterdir()
    damaged.mkdir()
    (damaged / library.name).write_bytes(b"damaged")

    assert attention_kernels(SHAPES, damaged)
    assert (damaged / library.name).stat().st_size > 1000


def test_without_a_compiler_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    no_compiler = inductor.patch({"cpp.cxx": ("/does/not/exist",)})
    with no_compiler, pytest.raises(InvalidCxxCompiler):
        attention_kernels(SHAPES, tmp_path)
