"""Clamps Mamba 2's time steps for single tokens too.

transformers clamps them to `time_step_limit` when it computes several tokens, but not when it
computes one. So decode steps would drift away from the model's own forward over the whole text.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from infuse.adapters.model.layer import Wrapper


class _LimitedSteps(Wrapper):
    """Wraps an input projection and clamps its last columns: time steps before bias and softplus.

    softplus is monotonic, so a limit on its input is a limit on its output.
    """

    outermost = True

    def __init__(
        self, projection: nn.Module, bias: torch.Tensor, limit: tuple[float, float]
    ) -> None:
        super().__init__(projection)
        lowest, highest = (_before_softplus(each) - bias.detach() for each in limit)
        self.lowest = nn.Buffer(lowest, persistent=False)
        self.highest = nn.Buffer(highest, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        steps = y[..., -len(self.lowest) :]
        steps.copy_(steps.clamp(self.lowest, self.highest))
        return y


def limit_time_steps(model: PreTrainedModel) -> None:
    """Clamp a model's time steps. Called once, before the layers are packed."""
    for mixer in list[Any](model.modules()):
        limit = getattr(mixer, "time_step_limit", None)
        if limit is not None and tuple(limit) != (0.0, math.inf):
            mixer.in_proj = _LimitedSteps(mixer.in_proj, mixer.dt_bias, tuple(limit))


def _before_softplus(step: float) -> float:
    """The number that softplus maps to this time step."""
    if step == 0.0:
        return -math.inf
    return step + math.log(-math.expm1(-step))
