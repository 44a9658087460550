"""Runs the core on the model thread: queues requests, steps, and delivers outputs."""

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto

from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.residency import Residency
from infuse.server.engine.admission import Admission
from infuse.server.engine.constraints.grammars import Grammars
from infuse.server.engine.errors import EngineDead, EngineStopping
from infuse.server.engine.native.config import EngineConfig
from infuse.server.engine.native.core import EngineCore, release_anyway
from infuse.server.engine.native.inbox import Inbox
from infuse.server.engine.native.model.loading import LoadedModel
from infuse.server.engine.request import FinishReason, GenerationRequest, InFlight, Output
from infuse.server.engine.stats import EngineStats
from infuse.server.engine.watchdog import Watchdog

log = logging.getLogger(__name__)


class _State(Enum):
    NEW = auto()
    RUNNING = auto()
    DRAINING = auto()
    """No requests are taken; those in flight run on."""
    STOPPING = auto()
    """The requests in flight are cancelled."""
    DEAD = auto()
    """The thread ended on an error, or hangs."""


_STEPS = (_State.RUNNING, _State.DRAINING)
"""The states in which the thread computes steps."""


class Engine:
    """Runs an `EngineCore` on a thread of its own. Every method may be called from any thread.

    Raises UnsupportedModel if the model cannot be run exactly, and DoesNotFit.
    """

    def __init__(
        self, loaded: LoadedModel, ia3: IA3Slots, residency: Residency, config: EngineConfig
    ) -> None:
        self.core = EngineCore(loaded, ia3, residency, config)
        """Belongs to the thread once that has started. Others only read `stats`,
        `in_flight` and `running`."""
        self.model = self.core.model
        self.grammars = Grammars(
            self.model.tokenizer,
            self.model.vocab_size,
            self.model.eos_token_ids,
            lambda: self.stats().is_busy,
        )
        self._changed = threading.Condition()
        """Guards all attributes below, and wakes threads that wait for one of them to change."""
        self._state = _State.NEW
        self._config = config
        self._admission = Admission(
            rows=config.max_rows, queue=config.max_queue, longest_wait=config.max_queue_seconds
        )
        self._inbox = Inbox(self._changed, config.max_rows, self.core.chunk_tokens)
        self.expecting = self._inbox.expecting
        self.has_started = self.core.has_started
        self._cancelled: set[str] = set()
        self._in_flight: dict[str, GenerationRequest] = {}
        """Request id -> a request whose last output has not been delivered."""
        self._hangs = False
        """Whether the thread has been given up. What it still delivers is dropped."""
        self._watchdog = Watchdog(config.hang_timeout, self._give_up)
        self.core.announce(self._begin_forward)
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._deliver: Callable[[list[Output]], None] = lambda _: None

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Start the thread. It calls `deliver` with each step's outputs; that must not block."""
        self._deliver = deliver
        self._state = _State.RUNNING
        self._thread.start()
        self._watchdog.start()

    def submit(self, *requests: GenerationRequest) -> None:
        """Queue requests, all of them or none; never blocks. The engine owns their leases once this
        has returned. If this raises, the caller keeps them.

        Raises QueueFull, WaitTooLong, EngineStopping, EngineDead.
        """
        for request in requests:
            tokens = len(request.prompt)
            assert tokens > 0, "the API refuses empty prompts"
            assert request.params.max_tokens <= self.model.room_after(tokens), "the API bounds it"
        with self._changed:
            if self._state is _State.DEAD:
                raise EngineDead
            if self._state is not _State.RUNNING:
                raise EngineStopping
            if not self._admission.admit(requests):
                raise self._admission.refusal(requests)
            self._in_flight |= {request.id: request for request in requests}
            self._inbox.put(requests)

    def cancel(self, request_id: str) -> None:
        """Cancel a request. It still gets a last output, CANCELLED, unless it has ended already."""
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify()

    def wake(self) -> None:
        """Wake an idle engine, since adapters may have been pinned or unpinned."""
        with self._changed:
            self._changed.notify()

    def stats(self) -> EngineStats:
        stats = self.core.stats()
        waiting = max(0, self._admission.admitted - stats.running)
        return replace(
            stats,
            alive=self._state is not _State.DEAD,
            ready=self._state is _State.RUNNING,
            most_running=self._config.max_rows,
            waiting=waiting,
            most_waiting=self._config.max_queue,
            wait_seconds=self._admission.wait_seconds,
            overloaded=self._admission.is_overloaded,
            waiting_adapters=stats.waiting_adapters | self._inbox.adapters,
            waiting_tokens=stats.waiting_tokens + self._inbox.tokens,
        )

    def in_flight(self) -> list[InFlight]:
        """Every request that has not ended, in order of arrival."""
        known = {each.request.id: each for each in self.core.in_flight()}
        with self._changed:
            requests = list(self._in_flight.values())
        return [known.get(each.id, InFlight(request=each)) for each in requests]

    def stop(self, timeout: float) -> None:
        """Refuse new requests, let the running ones end for up to `timeout` seconds, cancel the
        rest, and end the thread."""
        with self._changed:
            if self._state is _State.RUNNING:
                self._state = _State.DRAINING
            self._changed.notify()
            self._changed.wait_for(
                lambda: not self._admission.admitted or self._state is _State.DEAD, timeout
            )
            if self._state is _State.DRAINING:
                self._state = _State.STOPPING
            self._changed.notify()
        if self._thread.is_alive() and not self._hangs:
            self._thread.join()

    def _loop(self) -> None:
        try:
            while self._take_in():
                self._send(self.core.step())
        except BaseException:
            # A panic in a library's Rust code is not an Exception.
            log.exception("The model thread ends.")
            with self._changed:
                self._state = _State.DEAD
        self._watchdog.end()
        cancelled = self._state is _State.STOPPING
        reason = FinishReason.CANCELLED if cancelled else FinishReason.ENGINE_DEAD
        outputs = self.core.abandon(reason)
        self._send(outputs + self._left_over(outputs, reason))
        self.core.close()

    def _take_in(self) -> bool:
        """Pass new and cancelled requests to the core, and wait while there is nothing to do.

        False: the thread must stop.
        """
        with self._changed:
            self._watchdog.begin()
            self.core.settle()
            while not (self.core or self._inbox) and self._state in _STEPS:
                self._cancelled.clear()
                self._watchdog.rest()
                self._changed.wait()
                self._watchdog.begin()
                self.core.settle()
            if not self.core:
                self._inbox.gather()
            requests = list(self._inbox.take_all())
            cancelled, self._cancelled = self._cancelled, set()
            going = self._state in _STEPS
        for request in requests:
            self.core.add(request)
        for request_id in cancelled:
            self.core.cancel(request_id)
        return going

    def _begin_forward(self, tokens: int) -> None:
        chunks = max(1.0, tokens / self.core.chunk_tokens)
        self._watchdog.begin(self.core.costs.seconds(tokens), chunks)

    def _give_up(self) -> None:
        """End all requests, as the thread hangs; no thread can be ended from outside."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        log.critical("The model thread hangs; the server must be restarted.\n%s", stack)
        self._state, self._hangs = _State.DEAD, True
        with self._changed:
            requests = list(self._in_flight.values())
            self._in_flight.clear()
        dead = FinishReason.ENGINE_DEAD
        self._deliver([Output(request_id=each.id, finish_reason=dead) for each in requests])
        self._leave(requests)

    def _left_over(self, outputs: list[Output], reason: FinishReason) -> list[Output]:
        """Make the last outputs of requests that the core never got, or has lost: all that are in
        flight and do not end with `outputs`."""
        ending = {each.request_id for each in outputs if each.finish_reason is not None}
        with self._changed:
            requests = [each for id_, each in self._in_flight.items() if id_ not in ending]
        for request in requests:
            release_anyway(request)
        return [Output(request_id=each.id, finish_reason=reason) for each in requests]

    def _send(self, outputs: list[Output]) -> None:
        if not outputs:
            return
        last = [each.request_id for each in outputs if each.finish_reason is not None]
        with self._changed:
            if self._hangs:
                return
            ended = [self._in_flight.pop(request_id) for request_id in last]
        self._deliver(outputs)
        if ended:
            self._leave(ended)

    def _leave(self, requests: list[GenerationRequest]) -> None:
        with self._changed:
            for request in requests:
                self._admission.leave(request)
            self._changed.notify_all()
