"""The Engine protocol over vLLM: our queue, leases and slots in front of its scheduler."""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from enum import Enum, auto
from functools import partial

from vllm.inputs import tokens_input
from vllm.v1.engine.exceptions import EngineDeadError

from infuse.adapters.model.bank import BASE_SLOT
from infuse.adapters.residency import Residency
from infuse.server.engine.admission import Admission
from infuse.server.engine.constraints.grammars import Grammars
from infuse.server.engine.errors import EngineDead, EngineStopping
from infuse.server.engine.fair_queue import MAX_OVERTAKEN, FairQueue, least_charge
from infuse.server.engine.protocol import ServedModel
from infuse.server.engine.request import (
    FinishReason,
    GenerationRequest,
    InFlight,
    Output,
    WaitsFor,
    adapter_names,
)
from infuse.server.engine.stats import EngineStats
from infuse.server.engine.vllm.answer import Answer
from infuse.server.engine.vllm.config import EngineConfig
from infuse.server.engine.vllm.llm import Llm
from infuse.server.engine.vllm.sampling import vllm_params
from infuse.server.engine.watchdog import Watchdog

log = logging.getLogger(__name__)

_AHEAD = 1.25
"""How many times as many requests as a batch has rows are with vLLM, so that it need not wait for
us when one ends. The others wait in our queue, which is fair among tenants and adapters."""
_FORGETTING = 0.99
"""The share of the longest step's time that is still expected a step later."""


class _State(Enum):
    NEW = auto()
    RUNNING = auto()
    DRAINING = auto()
    """No requests are taken; those in flight run on."""
    DEAD = auto()
    """vLLM's process has ended."""


class Engine:
    """Answers requests with vLLM. Every method may be called from any thread.

    A request holds its adapter's slot from the moment that it is given to vLLM until vLLM has been
    told to forget it: vLLM's processes read what they are told in order, so no step that still uses
    the slot follows a new filling of it.
    """

    def __init__(self, llm: Llm, residency: Residency, config: EngineConfig) -> None:
        base, settings = llm.base, llm.engine.vllm_config
        self._llm = llm
        self._residency = residency
        self._config = config
        self.model = ServedModel(
            tokenizer=base.tokenizer,
            generation_config=base.generation_config,
            vocab_size=base.vocab_size,
            eos_token_ids=base.end_tokens,
            max_model_len=llm.max_model_len,
            decoder_start=None,
        )
        self.grammars = Grammars(
            base.tokenizer, base.vocab_size, base.end_tokens, lambda: self.stats().is_busy
        )
        self._most_started = math.ceil(config.max_rows * _AHEAD)
        cache = settings.cache_config
        self._block_tokens = cache.block_size
        self._kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        self._changed = threading.Condition()
        """Guards the state and the admission, and wakes who waits for the last request."""
        self._state = _State.NEW
        self._admission = Admission(
            rows=config.max_rows, queue=config.max_queue, longest_wait=config.max_queue_seconds
        )
        self._deliver: Callable[[list[Output]], None] = lambda _: None
        self._watchdog = Watchdog(config.hang_timeout, self._give_up)
        llm.counts.stepped = self._note_step
        # What follows belongs to the loop.
        self._numbers = itertools.count()
        self._queue: FairQueue[Answer] = FairQueue()
        self._waiting: dict[str, Answer] = {}
        self._started: dict[str, asyncio.Task[Output]] = {}
        self._running: dict[str, Answer] = {}
        """The answers of the started requests."""
        self._slotless: Answer | None = None
        """The first request in the queue, where its adapter has no slot."""
        self._step_began = self._step_seconds = 0.0
        """When vLLM's present step began, and about how long the longest of late took."""
        self._overtaking = 0
        """How many requests have started before the first one, whose adapter has no slot."""
        self._outputs: list[Output] = []
        """Outputs that are delivered together when the loop has done what is due now."""

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Take requests. The loop's thread calls `deliver`, which must not block."""
        self._deliver = deliver
        with self._changed:
            self._state = _State.RUNNING
        self._watchdog.start()
        self.wake()

    def submit(self, *requests: GenerationRequest) -> None:
        """Queue requests, all of them or none; never blocks. The engine owns their leases once this
        has returned. If this raises, the caller keeps them.

        Raises QueueFull, WaitTooLong, EngineStopping, EngineDead.
        """
        with self._changed:
            if self._is_dead:
                raise EngineDead
            if self._state is not _State.RUNNING:
                raise EngineStopping
            if not self._admission.admit(requests):
                raise self._admission.refusal(requests)
            # Under the lock, so that `stop` finds whatever has been admitted.
            self._llm.loop.call_soon_threadsafe(self._take, requests)

    def cancel(self, request_id: str) -> None:
        """Cancel a request. It still gets a last output, CANCELLED, unless it has ended already."""
        self._llm.loop.call_soon_threadsafe(self._cancel, request_id)

    def has_started(self, request_id: str) -> bool:
        """Whether a request that has not ended has left the queue: ours, and vLLM's, which takes a
        few ahead and runs them in the order in which they come."""
        answer = self._running.get(request_id)
        return answer is not None and self._is_run(answer, self._first_started())

    def _first_started(self) -> Collection[str]:
        """As many of the requests that vLLM has as it counted running, in their order. Any thread
        may call this."""
        return list(self._started.copy())[: max(1, self._llm.counts.running)]

    def _is_run(self, answer: Answer, first: Collection[str]) -> bool:
        """Whether vLLM runs a request. Its count comes after tokens, which say it first."""
        return answer.has_tokens or answer.request.id in first

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """vLLM takes requests as they come: it does not wait for announced ones."""
        yield

    def wake(self) -> None:
        """Fill slots for adapters that were pinned."""
        self._llm.loop.call_soon_threadsafe(self._residency.settle)

    def stats(self) -> EngineStats:
        counts, state = self._llm.counts, self._state
        # vLLM reports after a step: when its last requests are cancelled, no report follows.
        is_idle = not self._started
        running = 0 if is_idle else counts.running
        alive = not self._is_dead
        return EngineStats(
            alive=alive,
            ready=alive and state is _State.RUNNING,
            running=running,
            # Copies, as the loop may change both meanwhile.
            running_adapters=_names(self._running.copy()),
            most_running=self._config.max_rows,
            waiting=max(0, self._admission.admitted - running),
            most_waiting=self._config.max_queue,
            wait_seconds=self._admission.wait_seconds,
            overloaded=self._admission.is_overloaded,
            waiting_adapters=_names(self._waiting.copy()),
            waiting_tokens=least_charge(answer.request for answer in self._waiting.copy().values()),
            kv_tokens_used=0 if is_idle else round(counts.kv_cache_usage * self._kv_tokens),
            kv_tokens_total=self._kv_tokens,
            kv_block_tokens=self._block_tokens,
            kv_tokens_cached=None,
            prefix_queried_tokens=counts.prefix_queried_tokens,
            prefix_hit_tokens=counts.prefix_hit_tokens,
            weights_bytes=self._llm.base.nbytes,
            kv_cache_bytes=self._llm.kv_cache_bytes,
            compiled=self._llm.compiled,
            bank_bytes=self._llm.bank_bytes,
            preemptions=counts.preemptions,
            steps=counts.steps,
            step_retries=0,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            drafted_tokens=0,
            accepted_tokens=0,
        )

    def in_flight(self) -> list[InFlight]:
        """Every request that has not ended, those first that vLLM has."""
        # Copies, as the loop may change both meanwhile.
        answers = [*self._running.copy().values(), *self._waiting.copy().values()]
        first = frozenset(self._first_started())
        return [
            answer.in_flight(None if self._is_run(answer, first) else self._waits_for(answer))
            for answer in answers
        ]

    def _waits_for(self, answer: Answer) -> WaitsFor:
        """What keeps a request in our queue, or in vLLM's. Any thread may call this."""
        if answer.request.id in self._running or len(self._started) >= self._most_started:
            return WaitsFor.ROW
        return WaitsFor.SLOT if answer is self._slotless else WaitsFor.TURN

    def stop(self, timeout: float) -> None:
        """Refuse new requests, let the running ones end for up to `timeout` seconds, cancel the
        rest, and end vLLM's processes."""
        with self._changed:
            if self._state is _State.RUNNING:
                self._state = _State.DRAINING
            self._changed.wait_for(lambda: not self._admission.admitted, timeout)
        self._watchdog.end()
        if self._llm.is_open:
            self._llm.run(self._cancel_all())
            self._llm.close()

    @property
    def _is_dead(self) -> bool:
        """Whether vLLM's process has ended by itself."""
        ended = self._llm.engine.errored and self._state is not _State.DRAINING
        return ended or self._state is _State.DEAD

    def _take(self, requests: tuple[GenerationRequest, ...]) -> None:
        for request in requests:
            own = None if request.lease is None else request.lease.vocabulary
            tokenizer = self.model.tokenizer if own is None else own.tokenizer
            answer = Answer(request, next(self._numbers), tokenizer, self.model.eos_token_ids)
            self._waiting[request.id] = answer
            self._queue.add(answer)
        self._start_next()

    def _start_next(self) -> None:
        """Give vLLM the requests whose turn it is.

        Where the adapter of the first one has no slot, some requests of resident adapters go before
        it; then none starts until it does.
        """
        while len(self._started) < self._most_started:
            first = self._queue.first(lambda _: True)
            if first is None:
                return
            answer, slot = first, self._pin(first)
            self._slotless = first if slot is None else None
            if slot is None:
                first.lack_slot()
            if slot is None and self._overtaking < MAX_OVERTAKEN:
                resident = self._queue.first(self._is_resident)
                if resident is not None:
                    answer, slot = resident, self._pin(resident)
            if slot is None:
                return
            self._overtaking = 0 if answer is first else self._overtaking + 1
            self._queue.start(answer)
            del self._waiting[answer.request.id]
            answer.start()
            if not self._started:
                self._step_began = time.perf_counter()
                self._watchdog.begin(self._step_seconds)
            run = self._llm.loop.create_task(self._run(answer, slot))
            run.add_done_callback(partial(self._end, answer))
            self._started[answer.request.id] = run
            self._running[answer.request.id] = answer

    def _pin(self, answer: Answer) -> int | None:
        lease = answer.request.lease
        return BASE_SLOT if lease is None else self._residency.pin(lease)

    def _is_resident(self, answer: Answer) -> bool:
        lease = answer.request.lease
        return lease is None or self._residency.is_resident(lease)

    async def _run(self, answer: Answer, slot: int) -> Output:
        """Run one request from its start; return its last output."""
        request = answer.request
        last: Output | None = None
        try:
            if slot != BASE_SLOT:
                await self._llm.slots.filled(slot)
            digest = "" if request.lease is None else request.lease.vectors.digest
            prompt = tokens_input(list(request.prompt), cache_salt=f"{digest} {request.cache_salt}")
            params = vllm_params(request.params, slot, answer.ends)
            async with aclosing(self._llm.engine.generate(prompt, params, request.id)) as results:
                async for result in results:
                    output = answer.take(result)
                    if output.finish_reason is None:
                        self._emit(output)
                    elif result.finished:
                        last = output
                    else:
                        # A stop string has ended it, of which vLLM knows nothing.
                        return output
            assert last is not None, "vLLM sends no result after the last one"
            return last
        except asyncio.CancelledError:
            return answer.end(FinishReason.CANCELLED)
        except EngineDeadError:
            self._die()
            return answer.end(FinishReason.ENGINE_DEAD)
        except BaseException as error:
            log.exception("A request failed in vLLM.")
            # vLLM's own error says nothing: its cause does.
            reason = f"The model failed: {error.__cause__ or error}"
            return answer.end(FinishReason.ERROR, reason)

    def _end(self, answer: Answer, run: asyncio.Task[Output]) -> None:
        """Release what a started request holds, and send its last output."""
        request = answer.request
        del self._started[request.id], self._running[request.id]
        if not self._started:
            self._watchdog.rest()
        self._queue.end(answer)
        if request.lease is not None:
            self._residency.unpin(request.lease)
            self._residency.settle()
        # A run that is cancelled before its first step ends without an output.
        cancelled = answer.end(FinishReason.CANCELLED)
        self._send_last(request, cancelled if run.cancelled() else run.result())
        self._start_next()

    def _send_last(self, request: GenerationRequest, last: Output) -> None:
        if request.lease is not None:
            request.lease.release()
        self._emit(last)
        with self._changed:
            self._admission.leave(request)
            self._changed.notify_all()

    def _cancel(self, request_id: str) -> None:
        if request_id in self._started:
            self._started[request_id].cancel()
        elif request_id in self._waiting:
            answer = self._waiting.pop(request_id)
            self._queue.remove(answer)
            self._send_last(answer.request, answer.end(FinishReason.CANCELLED))

    async def _cancel_all(self) -> None:
        running = list(self._started.values())
        for request_id in [*self._waiting, *self._started]:
            self._cancel(request_id)
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0)  # What was emitted is delivered.

    def _note_step(self) -> None:
        """A step has ended, and the next one begins if anything is left to do."""
        now = time.perf_counter()
        self._step_seconds = max(now - self._step_began, _FORGETTING * self._step_seconds)
        self._step_began = now
        if self._started:
            self._watchdog.begin(self._step_seconds)

    def _give_up(self) -> None:
        """Kill vLLM, as it hangs: its requests end by that, and this engine with them."""
        log.critical("vLLM hangs and is killed; the server must be restarted.")
        self._llm.kill()

    def _die(self) -> None:
        with self._changed:
            if self._state is not _State.DEAD:
                log.error("vLLM's process has ended; the server must be restarted.")
                self._state = _State.DEAD
        # None of those that wait can start.
        for answer in list(self._waiting.values()):
            del self._waiting[answer.request.id]
            self._queue.remove(answer)
            self._send_last(answer.request, answer.end(FinishReason.ENGINE_DEAD))

    def _emit(self, output: Output) -> None:
        """Deliver an output, together with all others that come now."""
        if not self._outputs:
            self._llm.loop.call_soon(self._flush)
        self._outputs.append(output)

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        self._deliver(outputs)


def _names(answers: Mapping[str, Answer]) -> frozenset[str]:
    return adapter_names(answer.request for answer in answers.values())
