"""Our own engine on a real (tiny) model, and PEFT to compare with."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine.native import Engine, EngineConfig, LoadedModel
from tests.driver import Answer, Driver
from tests.factories import tiny_tokenizer


class Harness(Driver):
    engine: Engine

    def __init__(
        self,
        base: PreTrainedModel,
        folder: Path,
        adapters: Mapping[str, Path],
        max_resident: int = 64,
        max_saved_bytes: int = 1 << 30,
        tokenizer: PreTrainedTokenizerFast | None = None,
        keep_revisions: int = 10,
        **config: Any,
    ) -> None:
        store = AdapterStore(folder, keep_revisions)
        self.ia3 = IA3Slots(base, max_resident, max_saved_bytes)
        registry = AdapterRegistry(store, self.ia3.modules_of_base, self.ia3)
        loaded = LoadedModel(
            base, tokenizer or tiny_tokenizer(), "tiny", GenerationConfig(eos_token_id=2)
        )
        engine = Engine(loaded, self.ia3, registry.residency, EngineConfig(**config))
        super().__init__(store, registry, engine)
        for name, source in adapters.items():
            self.add(name, source)


class Oracle:
    """The base, or the base with one adapter put on by PEFT: one sequence at a time."""

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model: Any = copy.deepcopy(base)
        if self._model.dtype != dtype:
            self._model.to(dtype)
        if adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, adapter)
        if dtype is torch.float64:
            self._model.double()  # PEFT's vectors too, which it keeps in float32.
        self._model.eval()

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """`[tokens, vocab]`."""
        logits: torch.Tensor = self._model(torch.tensor([list(ids)])).logits[0]
        return logits

    def in_several_shapes(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """`[tokens, vocab]` each: alone, and before more tokens.

        Libraries add up in another order for a few rows than for many, and err by several times as
        much in one as in the other.
        """
        return [self.logits([*ids] * times)[: len(ids)] for times in (1, 2, 8)]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


def worst_error(answer: Answer, exact: torch.Tensor) -> float:
    """The farthest that a prompt's scores are from `exact`, log-probabilities `[tokens, vocab]`."""
    worst = 0.0
    for position, scored in enumerate((answer.prompt_logprobs or ())[1:]):
        assert scored is not None
        tokens, values = zip(*scored.top, strict=True)
        error = torch.tensor(values, dtype=torch.float64) - exact[position, list(tokens)]
        worst = max(worst, error.abs().max().item())
    assert worst > 0, "scores were asked for"
    return worst
