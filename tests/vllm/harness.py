"""The vLLM engine on a real (tiny) model, in processes of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedModel

from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine.vllm.config import EngineConfig
from infuse.server.engine.vllm.llm import open_llm
from tests.driver import Driver
from tests.factories import tiny_tokenizer

# Skips the tests of every file that imports this.
pytest.importorskip("vllm", reason="vLLM has an environment of its own: constraints-vllm.txt")

BLOCK = 32
"""Tokens of a prompt that are cached together."""
CHUNK = 64
"""Tokens of prompts in a step: longer prompts are computed in several."""


class VllmHarness(Driver):
    def __init__(
        self,
        base: PreTrainedModel,
        folder: Path,
        adapters: Mapping[str, Path],
        options: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        """Adapters may rescale every linear layer on both sides, unless `targets` says otherwise.
        `options`: see `EngineConfig`."""
        from infuse.server.engine.vllm.engine import Engine

        base.save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        known = EngineConfig(
            **{
                "max_rows": 40,
                "kv_cache_tokens": 8192,
                "prefill_chunk_tokens": CHUNK,
                "targets": "all-linear,all-linear:input",
                "options": {"block_size": BLOCK} | dict(options or {}),
            }
            | config
        )
        others = vllm_processes()
        llm = open_llm(str(folder / "model"), known)
        self._own = [each for each in vllm_processes() if each not in others]
        store = AdapterStore(folder / "store")
        registry = AdapterRegistry(store, llm.base.modules, llm.slots)
        super().__init__(store, registry, Engine(llm, registry.residency, known))
        for name, source in adapters.items():
            self.add(name, source)

    def processes(self) -> list[psutil.Process]:
        """The processes of vLLM that this engine has started and that have not ended."""
        return [each for each in self._own if each.is_running()]


def vllm_processes() -> list[psutil.Process]:
    """Of all engines that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if each.name().startswith("VLLM::")]
