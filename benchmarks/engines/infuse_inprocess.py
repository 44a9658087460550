"""Infuse without HTTP: the engine, asked directly in its own process."""

import threading
import time
from typing import Any

from benchmarks.engines import Answer, Request, Round
from benchmarks.engines.lines import Run, serve
from server.app import load_services
from server.engine import GenerationRequest, Output, SamplingParams
from server.settings import Settings


def make(**settings: Any) -> Run:
    services = load_services(Settings(**settings))(streams=None)
    rounds = _Rounds()
    services.engine.start(rounds.deliver)

    def run(requests: list[Request], in_flight: int | None) -> Round:
        assert in_flight in (None, services.settings.max_batch_rows)
        asked = [
            GenerationRequest(
                id=rounds.new_id(),
                prompt=tuple(each.prompt),
                params=SamplingParams(temperature=0, max_tokens=each.tokens_out, ignore_eos=True),
                lease=None if each.adapter is None else services.registry.lease(each.adapter),
            )
            for each in requests
        ]
        return rounds.run(asked, services.engine.submit)

    return run


class _Rounds:
    """Collects what the model's thread delivers."""

    def __init__(self) -> None:
        self._asked = 0
        self._times: dict[str, list[float]] = {}
        self._texts: dict[str, list[str]] = {}
        self._left = 0
        self._error = ""
        self._done = threading.Event()

    def new_id(self) -> str:
        self._asked += 1
        return str(self._asked)

    def run(self, requests: list[GenerationRequest], submit: Any) -> Round:
        self._times = {each.id: [] for each in requests}
        self._texts = {each.id: [] for each in requests}
        self._left = len(requests)
        self._done.clear()
        began = time.perf_counter()
        submit(*requests)
        self._done.wait()
        seconds = time.perf_counter() - began
        if self._error:
            raise RuntimeError(self._error)
        answers = [
            Answer(
                "".join(self._texts[each.id]),
                arrived=0.0,
                first=self._times[each.id][0] - began,
                last=self._times[each.id][-1] - began,
            )
            for each in requests
        ]
        return Round(began, seconds, answers)

    def deliver(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        for output in outputs:
            self._error = self._error or output.error
            self._times[output.request_id].append(now)
            self._texts[output.request_id].append(output.text)
            self._left -= output.finish_reason is not None
        if self._left == 0:
            self._done.set()


if __name__ == "__main__":
    serve(make)
