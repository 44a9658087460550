import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from infuse.server.engine.native.model.norms import FusedRMSNorm, fuse_norms


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_a_norm_takes_fewer_operators_where_that_gives_the_same(kind: type[nn.Module]) -> None:
    norm = kind(24)
    nn.init.normal_(norm.weight)
    model = nn.ModuleDict({"norm": norm})
    x = torch.randn(2, 7, 24)
    with torch.inference_mode():
        wanted = norm(x)

        assert fuse_norms(model) == 1
        assert isinstance(model["norm"], FusedRMSNorm)
        torch.testing.assert_close(model["norm"](x), wanted, atol=1e-6, rtol=1e-5)


def test_a_norm_that_adds_one_to_its_weight_stays() -> None:
    assert fuse_norms(nn.ModuleDict({"norm": GemmaRMSNorm(24)})) == 0


def test_a_norm_in_another_dtype_stays_for_it_rounds_on_the_way() -> None:
    assert fuse_norms(nn.ModuleDict({"norm": LlamaRMSNorm(24).bfloat16()})) == 0
