"""Infuse without HTTP: the engine, asked directly in its own process, which is a server's.

What HTTP costs is less than what processes of one kind differ by: this one answers either way.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from benchmarks.engines import Answer, Request, Round
from benchmarks.engines.lines import Run, serve
from infuse.server import app as application
from infuse.server.engine import GenerationRequest, Output, SamplingParams
from infuse.server.listener import freeze_heap
from infuse.server.settings import Settings
from infuse.server.streams import Streams


def make(**settings: Any) -> Run:
    # The application makes its streams itself.
    application.Streams = _TappedStreams
    app = application.create_app(Settings(**settings))
    freeze_heap()
    _serve(app)
    services = app.state.services
    rounds = services.streams.rounds

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


def _serve(app: FastAPI) -> None:
    """Start serving, and say where."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.05)
    print(f"answers on http://127.0.0.1:{listening.getsockname()[1]}", file=sys.stderr, flush=True)


class _TappedStreams(Streams):
    """What the model's thread delivers goes to the round that runs, if one does."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = _Rounds(super().deliver)

    def deliver(self, outputs: list[Output]) -> None:
        self.rounds.deliver(outputs)


class _Rounds:
    """Collects what the model's thread delivers; between rounds it goes to `others`."""

    def __init__(self, others: Callable[[list[Output]], None]) -> None:
        self._others = others
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
        if not self._left:
            self._others(outputs)
            return
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
