"""An engine with adapters, driven as a server drives it: submit, then listen."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from infuse.adapters.registry import AdapterRegistry, Part
from infuse.adapters.residency import Lease
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine import (
    Engine,
    FinishReason,
    GenerationRequest,
    Output,
    SamplingParams,
    TokenLogprob,
)

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
    cached: int = 0

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
        self.cached += output.cached_tokens


class Driver:
    def __init__(self, store: AdapterStore, registry: AdapterRegistry, engine: Engine) -> None:
        self.store = store
        self.registry = registry
        self.engine = engine
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
        """The thread that delivers stands still after its next delivery."""
        self._gate.clear()

    def resume(self) -> None:
        self._gate.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: the thread that delivers stands still, so that what is submitted starts
        together."""
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
        """Nothing is held once the engine has stopped (invariant 6 of the design)."""
        self.engine.stop(_PATIENCE)
        self.assert_nothing_held()

    def assert_nothing_held(self) -> None:
        """Nothing is held while nothing runs."""
        stats, adapters = self.engine.stats(), self.registry.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
        assert (adapters.leases, adapters.pinned) == (0, 0)

    def close(self) -> None:
        self.resume()
        self.engine.stop(0)
        self.store.close()


def log_probabilities(answer: Answer, vocabulary: int) -> torch.Tensor:
    """`[answer, vocabulary]` of what the tokens of an answer that is scored whole were chosen
    from."""
    rows = torch.empty(len(answer.logprobs), vocabulary, dtype=torch.float64)
    for row, each in zip(rows, answer.logprobs, strict=True):
        tokens, values = zip(*each.top, strict=True)
        row[list(tokens)] = torch.tensor(values, dtype=torch.float64)
    return rows
