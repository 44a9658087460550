"""Replaces RMS norms by modules of four torch operators; transformers' modules take eight."""

import math

import torch
from torch import nn


class FusedRMSNorm(nn.Module):
    """An RMS norm, `x * rsqrt(mean(x²) + eps) * weight`, computed as
    `x * (weight * √n) / hypot(‖x‖, √(n * eps))`."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps
        numerator = weight.detach() * math.sqrt(len(weight))
        least = torch.tensor(math.sqrt(len(weight) * eps), dtype=weight.dtype)
        self._numerator: torch.Tensor
        self._least: torch.Tensor
        self.register_buffer("_numerator", numerator, persistent=False)
        self.register_buffer("_least", least, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.mul(x, self._numerator).div_(torch.hypot(length, self._least))


def fuse_norms(model: nn.Module) -> int:
    """Replace the model's float32 RMS norms on the CPU, in place.

    Each norm is compared with ours on an example first: some (Gemma's) add one to their weight, and
    some round intermediate results to another dtype. Returns how many were replaced.
    """
    fused = 0
    for name, module in list(model.named_modules()):
        replacement = _fused(module)
        if replacement is not None:
            model.set_submodule(name, replacement)
            fused += 1
    return fused


def _fused(module: nn.Module) -> FusedRMSNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(module, FusedRMSNorm):
        return None
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    fused = FusedRMSNorm(weight, eps)
    x = torch.randn(1, 5, len(weight), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same = torch.allclose(fused(x), module(x), rtol=1e-5, atol=1e-6)
    return fused if same else None
