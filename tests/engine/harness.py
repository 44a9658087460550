"""An engine on a real (tiny) model, driven as a server drives it: submit, then listen."""

import copy
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from adapters.model.slots import IA3Slots
from adapters.registry import AdapterRegistry, Part
from adapters.residency import Lease
from adapters.storage.store import AdapterStore
from server.engine import FinishReason, GenerationRequest, Output, SamplingParams, TokenLogprob
from server.engine.native import Engine, EngineConfig, LoadedModel
from tests.factories import tiny_tokenizer

_PATIENCE = 60.0
"""Seconds until a test that waits for the engine gives up."""


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: FinishReason | None = None
    error: str = ""
    deliveries: int = 0
    """Outputs that brought tokens."""
    predicted: int = 0

    def add(self, output: Output) -> None:
        assert self.finish is None, "an output after the last one"
        self.tokens += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.finish, self.error = output.finish_reason, output.error
        self.deliveries += bool(output.token_ids)
        self.predicted += output.predicted_tokens


class Harness:
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
        self.store = AdapterStore(folder, keep_revisions)
        self.ia3 = IA3Slots(base, max_resident, max_saved_bytes)
        self.registry = AdapterRegistry(self.store, self.ia3.modules_of_base, self.ia3)
        loaded = LoadedModel(
            base, tokenizer or tiny_tokenizer(), "tiny", GenerationConfig(eos_token_id=2)
        )
        self.engine = Engine(loaded, self.ia3, self.registry.residency, EngineConfig(**config))
        for name, source in adapters.items():
            self.add(name, source)
        self.answers: dict[str, Answer] = {}
        self._outputs: queue.Queue[list[Output]] = queue.Queue()
        self._gate = threading.Event()
        self._gate.set()
        self.engine.start(self._deliver)

    def add(self, name: str, source: Path) -> None:
        with self.store.staging() as staged:
            for file in source.iterdir():
                (staged / file.name).write_bytes(file.read_bytes())
            self.registry.add(name, staged)

    def _deliver(self, outputs: list[Output]) -> None:
        self._outputs.put(outputs)
        self._gate.wait(_PATIENCE)

    def pause(self) -> None:
        """The model thread stands still after its next step."""
        self._gate.clear()

    def resume(self) -> None:
        self._gate.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: the model thread stands still, so that what is submitted starts together."""
        self.pause()
        self.submit("plug", [5], max_tokens=1)
        self.wait("plug")
        try:
            yield
        finally:
            self.resume()
            del self.answers["plug"]

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        *adapters: str | Lease | None,
        priority: int = 0,
        tenant: str = "",
        speculation: bool | None = None,
        prediction: Sequence[int] = (),
        cache_salt: str = "",
        **params: Any,
    ) -> None:
        """`adapters`: none or None for the base, one or its lease, or several for their product."""
        lease = self._lease([adapter for adapter in adapters if adapter is not None])
        sampling = SamplingParams(
            **{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | params
        )
        request = GenerationRequest(
            id=request_id,
            prompt=tuple(prompt),
            params=sampling,
            lease=lease,
            adapter_name=adapters[0] if len(adapters) == 1 and isinstance(adapters[0], str) else "",
            tenant=tenant,
            priority=priority,
            speculation=speculation,
            prediction=tuple(prediction),
            cache_salt=cache_salt,
        )
        self.answers[request_id] = Answer()
        try:
            self.engine.submit(request)
        except BaseException:
            del self.answers[request_id]
            if lease is not None:
                lease.release()
            raise

    def _lease(self, adapters: Sequence[str | Lease]) -> Lease | None:
        match adapters:
            case []:
                return None
            case [str(name)]:
                return self.registry.lease(name)
            case [Lease() as lease]:
                return lease
        return self.registry.lease_mixture([Part(str(name)) for name in adapters], "product")

    def order(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        adapter: str | None = None,
        **params: Any,
    ) -> list[str]:
        """Several requests at once, as one call of the API makes them; returns their ids."""
        requests = [
            GenerationRequest(
                id=f"{name}-{number}",
                prompt=tuple(prompt),
                params=SamplingParams(
                    **{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | params
                ),
                lease=None if adapter is None else self.registry.lease(adapter),
                order=name,
            )
            for number, prompt in enumerate(prompts)
        ]
        self.answers |= {request.id: Answer() for request in requests}
        self.engine.submit(*requests)
        return [request.id for request in requests]

    def read(self) -> None:
        """Take in one delivery."""
        for output in self._outputs.get(timeout=_PATIENCE):
            self.answers[output.request_id].add(output)

    def wait(self, *request_ids: str) -> None:
        """Until these requests (none given: all) have ended."""
        wanted = request_ids or tuple(self.answers)
        while any(self.answers[each].finish is None for each in wanted):
            self.read()

    def ask(
        self, prompt: Sequence[int], adapter: str | Lease | None = None, **params: Any
    ) -> Answer:
        """One request, alone."""
        self.submit("alone", prompt, adapter, **params)
        self.wait("alone")
        return self.answers.pop("alone")

    def assert_idle(self) -> None:
        """Nothing is held once nothing runs (invariant 6 of the design)."""
        self.engine.stop(_PATIENCE)
        stats, adapters = self.engine.stats(), self.registry.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
        assert (adapters.leases, adapters.pinned) == (0, 0)

    def close(self) -> None:
        self.resume()
        self.engine.stop(0)
        self.store.close()


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
