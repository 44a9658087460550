"""Each dtype as exact as PEFT in that dtype, on linear layers and on GPT-2's Conv1D."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infuse.server.engine.native.model.packing import panel_width_of
from tests.engine.harness import Harness, Oracle, worst_error
from tests.factories import TOKENS, save_adapter, tiny_model

ADAPTERS: dict[str, dict[str, dict[str, object]]] = {
    "llama": {
        "default": {},
        "outward": {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": []},
    },
    "gpt2": {
        "default": {},
        "outward": {"target_modules": ["c_fc"], "feedforward_modules": []},
    },
}
PROMPTS = [[5 + (11 * row + n) % 250 for n in range(4 + 7 * row)] for row in range(6)]


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize(
    ("family", "dtype", "compiled"),
    [
        *((family, dtype, False) for family in ADAPTERS for dtype in DTYPES),
        ("llama", torch.bfloat16, True),
    ],
)
def test_a_mixed_batch_errs_at_most_twice_as_much_as_peft_in_the_same_dtype(
    start: Callable[..., Harness],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: torch.dtype,
    compiled: bool,
) -> None:
    """Compiled, products are by our kernel."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    base = tiny_model(family)
    adapters = {
        name: save_adapter(base, tmp_path / name, seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS[family].items())
    }
    base.to(dtype)
    asked = list(zip([None, *adapters] * 2, PROMPTS, strict=True))
    exact, peft = {}, {}
    for row, (name, prompt) in enumerate(asked):
        adapter = adapters.get(name or "")
        exact[row] = Oracle(base, adapter, torch.float64).logits(prompt).log_softmax(-1)
        peft[row] = Oracle(base, adapter, dtype).logits(prompt).double().log_softmax(-1)
    cache = tmp_path / "compiled" if compiled else None
    engine = start(base, adapters, prefill_chunk_tokens=9, compile_cache=cache)
    assert engine.engine.stats().compiled == compiled
    assert (panel_width_of(engine.ia3.base) is not None) == compiled
    with engine.held():
        for row, (name, prompt) in enumerate(asked):
            engine.submit(str(row), prompt, name, max_tokens=1, prompt_logprobs=TOKENS)
    engine.wait()

    theirs = max((peft[row] - exact[row]).abs().max().item() for row in exact)
    ours = max(worst_error(engine.answers[str(row)], exact[row]) for row in exact)
    assert ours <= 2 * theirs


def test_float16_decodes_what_peft_finds_best(
    start: Callable[..., Harness], adapters: dict[str, Path]
) -> None:
    base = tiny_model("llama").to(torch.float16)
    names = [None, "default", "mlp-inward"]
    oracles = {name: Oracle(base, adapters.get(name or ""), torch.float16) for name in names}
    engine = start(base)
    with engine.held():
        for name in names:
            engine.submit(str(name), PROMPTS[2], name, max_tokens=12)
    engine.wait()

    for name, oracle in oracles.items():
        tokens = engine.answers[str(name)].tokens
        scores = oracle.logits([*PROMPTS[2], *tokens])[len(PROMPTS[2]) - 1 : -1].float()
        chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (scores.max(-1).values - chosen).max() <= 0.05, "no other token is clearly better"
