"""A server on a quantised base, asked over HTTP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.services import Services
from tests.factories import tiny_tokenizer

PROMPT = [5, 60, 7, 80, 9]


@pytest.mark.native
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_an_adapter_on_a_quantised_base_answers_as_peft_does_on_it(
    start_server: Callable[..., tuple[str, Services]],
    model_folder: Path,
    adapter_folders: dict[str, Path],
    bits: Any,
) -> None:
    from infuse.server.engine.native import load_model
    from tests.engine.harness import Oracle

    url, _ = start_server(quantization=bits, preload_adapters=adapter_folders["default"].parent)
    base = load_model(str(model_folder), "cpu", quantization=bits).model
    tokens = Oracle(base, adapter_folders["default"]).greedy(PROMPT, 12)
    body = {
        "model": "default",
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()

    wanted = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
    assert answer["choices"][0]["text"] == wanted
