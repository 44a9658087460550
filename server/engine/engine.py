"""Requests in, outputs out: the loop that owns the model, on a thread of its own."""

import itertools
import logging
import threading
from collections.abc import Callable
from collections.abc import Sequence as Rows
from contextlib import suppress

from adapters.residency import Residency
from adapters.slots import IA3Slots
from server.engine.config import EngineConfig, EngineStats
from server.engine.constraints import Grammars
from server.engine.errors import EngineDead, EngineStopping, QueueFull
from server.engine.execution import prepare
from server.engine.faults import FAULTS, Fault
from server.engine.inbox import Inbox
from server.engine.loading import LoadedModel
from server.engine.places import Places
from server.engine.planning import memory_table, window_of
from server.engine.quantization import weights_bytes
from server.engine.request import FinishReason, GenerationRequest, Output
from server.engine.sampler import Sampled, Sampler
from server.engine.scheduler import CannotStart, Scheduler
from server.engine.sequence import Sequence
from server.engine.speculation import Speculation
from server.engine.stepping import Failed, Lost, Ran, Stepping
from server.engine.taking import take

log = logging.getLogger(__name__)

_CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
"""Prompt tokens in a step: what decoding rows wait for at most, by device."""


class Engine:
    """Batches any number of requests over one model. Made before any adapter is resident.

    Raises UnsupportedModel where the model cannot be run exactly, and DoesNotFit.
    """

    def __init__(
        self, loaded: LoadedModel, ia3: IA3Slots, residency: Residency, config: EngineConfig
    ) -> None:
        base = loaded.model
        self._residency = residency
        self._weights_bytes = weights_bytes(base)
        self.model_name = loaded.name
        self.tokenizer = loaded.tokenizer
        self.generation_config = loaded.generation_config
        self.vocab_size = int(base.config.get_text_config().vocab_size)
        self.eos_token_ids = loaded.end_tokens
        self.grammars = Grammars(loaded.tokenizer, self.vocab_size, self.eos_token_ids)
        self.max_model_len = window_of(base, config.max_model_len)
        self.decoder_start = loaded.decoder_start()
        execution = prepare(
            ia3,
            tokenizer=loaded.tokenizer,
            decoder_start=self.decoder_start,
            max_rows=config.max_rows,
            max_model_len=self.max_model_len,
            kv_cache_tokens=config.kv_cache_tokens,
            pack=config.pack_linears,
            trace_cache=config.trace_cache,
            compile_cache=config.compile_cache,
        )
        self._bank = ia3.bank
        self.runner_kind = execution.kind
        self._compiled = execution.compiled
        self._cache = execution.cache
        tokens, slots = self._cache.total_tokens, ia3.capacity
        log.info(
            "Memory planned:\n%s",
            memory_table(
                {
                    "weights": self._weights_bytes,
                    f"keys and values of {tokens:,} tokens": self._cache.nbytes,
                    f"{slots:,} adapters of the default kind": ia3.bank.planned_nbytes(),
                    "whole modules of adapters, at most": ia3.saved_capacity,
                    "adapters off the device, at most": residency.host_capacity,
                },
                base.device,
            ),
        )
        chunk = config.prefill_chunk_tokens or _CHUNK_TOKENS[base.device.type]
        self._scheduler = Scheduler(
            self._cache,
            residency,
            config.max_rows,
            chunk,
            config.prefix_cache,
            execution.whole_prompts,
        )
        self._sampler = Sampler(self.eos_token_ids)
        self._stepping = Stepping(execution.runner, self._sampler, self._cache)
        self._speculation = Speculation(
            self._scheduler.prefixes,
            by_default=config.speculation,
            possible=execution.kind == "flat",
        )
        self._places = Places(config.max_rows + config.max_queue)
        self._rows = itertools.count()
        self._changed = threading.Condition()
        """Guards the places and the three below, which other threads touch."""
        self._inbox = Inbox(self._changed, config.max_rows, chunk)
        self.expecting = self._inbox.expecting
        self._cancelled: set[str] = set()
        self._state = "new"
        self._sequences: dict[str, Sequence] = {}
        self._outputs: list[Output] = []
        """Not delivered yet."""
        self._ended: list[GenerationRequest] = []
        """Requests whose last output is among these."""
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._deliver: Callable[[list[Output]], None] = lambda _: None
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._unsettled = ""
        """Why the adapters that are kept are not all on the device."""

    # Any thread.

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Start the model thread. It calls `deliver` after each step; that must not block."""
        self._deliver = deliver
        self._state = "running"
        self._thread.start()

    def submit(self, *requests: GenerationRequest) -> None:
        """Queue requests, all of them or none; never blocks. Until this returns, their leases are
        the caller's.

        Raises QueueFull, EngineStopping, EngineDead.
        """
        for request in requests:
            tokens = len(request.prompt)
            assert tokens > 0, "the API refuses empty prompts"
            assert request.params.max_tokens <= self.room_after(tokens), "and too long ones"
        with self._changed:
            if self._state == "dead":
                raise EngineDead
            if self._state != "running":
                raise EngineStopping
            if not self._places.take(requests):
                waiting = self._places.taken - len(self._scheduler.running)
                raise QueueFull(waiting, self._places.seconds_until_free(requests))
            self._inbox.put(requests)

    def room_after(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt; below 0: by how many it is too long itself."""
        room = self.max_model_len - prompt_tokens
        if self.decoder_start is None or room < 0:
            return room
        return self.max_model_len - len(self.decoder_start)

    def cancel(self, request_id: str) -> None:
        """The request still ends with one output, CANCELLED, unless it has ended already."""
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify()

    def wake(self) -> None:
        """Something beside requests may have changed: which adapters are kept on the device."""
        with self._changed:
            self._changed.notify()

    def stats(self) -> EngineStats:
        running = len(self._scheduler.running)
        prefixes = self._scheduler.prefixes
        return EngineStats(
            alive=self._state != "dead",
            ready=self._state == "running",
            running=running,
            waiting=max(0, self._places.taken - running),
            kv_tokens_used=self._cache.used_tokens,
            kv_tokens_total=self._cache.total_tokens,
            kv_tokens_cached=prefixes.kept_tokens,
            prefix_queried_tokens=prefixes.queried_tokens,
            prefix_hit_tokens=prefixes.hit_tokens,
            weights_bytes=self._weights_bytes,
            kv_cache_bytes=self._cache.nbytes,
            compiled=self._compiled,
            bank_bytes=self._bank.nbytes,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            step_retries=self._stepping.retries,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            drafted_tokens=self._speculation.drafted_tokens,
            accepted_tokens=self._speculation.accepted_tokens,
        )

    def stop(self, timeout: float) -> None:
        """Refuse new requests, let the running ones end for up to `timeout` seconds, cancel the
        rest, and end the model thread."""
        with self._changed:
            if self._state == "running":
                self._state = "draining"
            self._changed.notify()
            self._changed.wait_for(lambda: not self._places.taken or self._state == "dead", timeout)
            if self._state == "draining":
                self._state = "stopping"
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # The model thread.

    def _loop(self) -> None:
        try:
            while self._receive():
                self._step()
        except BaseException:
            # A panic in a library's Rust code is no Exception.
            log.exception("The model thread ends.")
            with self._changed:
                self._state = "dead"
        reason = FinishReason.CANCELLED if self._state == "stopping" else FinishReason.ERROR
        with self._changed:
            self._accept()
        for sequence in self._all():
            self._end_anyway(sequence, reason)
        self._send()
        self._sampler.close()

    def _receive(self) -> bool:
        """Take in what other threads have asked; wait while there is nothing to do."""
        with self._changed:
            self._settle()
            while not (self._sequences or self._inbox) and self._state in ("running", "draining"):
                assert self._cache.used_tokens == 0, "an idle engine holds no rows"
                self._cancelled.clear()
                self._changed.wait()
                self._settle()
            if not self._sequences:
                self._inbox.gather()
            self._accept()
            cancelled, self._cancelled = self._cancelled, set()
            going = self._state in ("running", "draining")
        for sequence in [self._sequences[each] for each in cancelled if each in self._sequences]:
            self._end(sequence, FinishReason.CANCELLED)
        self._send()
        return going

    def _settle(self) -> None:
        """Bring kept adapters to the device; those that find no memory are tried again."""
        problem = ""
        try:
            self._residency.settle()
        except FAULTS as error:
            problem = Fault.of(error).message
            if problem != self._unsettled:
                log.error("An adapter cannot be kept on the device for now: %s", problem)
        self._unsettled = problem

    def _accept(self) -> None:
        """Queue what has come; requests that cannot even be queued end."""
        for request in self._inbox.take_all():
            own = None if request.lease is None else request.lease.vocabulary
            tokenizer = self.tokenizer if own is None else own.tokenizer
            try:
                sequence = Sequence(request, next(self._rows), tokenizer, self.decoder_start)
                sequence.drafter = self._speculation.drafter(request)
            except BaseException as error:
                log.exception("A request cannot begin; it ends.")
                self._fail(request, f"The request cannot begin: {error}")
                continue
            self._sequences[request.id] = sequence
            self._scheduler.add(sequence)

    def _step(self) -> None:
        try:
            step = self._speculation.draft(self._scheduler.schedule())
        except CannotStart as error:
            log.error("A request could not be started; it ends.\n%s", error.fault.trace)
            self._end(error.sequence, FinishReason.ERROR, error.fault.reason)
            self._send()
            return
        if not step:
            assert not self._sequences, "waiting requests with an idle model can always start"
            return
        for part in self._stepping.run(step):
            match part:
                case Ran():
                    self._advance(part)
                    for sequence, choices in part.choices:
                        self._take_safely(sequence, choices)
                case Failed(sequence, reason):
                    self._end(sequence, FinishReason.ERROR, reason)
                case Lost(sequences):
                    for sequence in sequences:
                        self._scheduler.put_back(sequence)
        self._steps += 1
        self._send()

    def _advance(self, ran: Ran) -> None:
        """The tokens have keys and values now; prompts that asked for it are scored."""
        step = ran.step
        accepted = sum(len(choices) - 1 for _, choices in ran.choices)
        self._speculation.learn(step, ran.seconds, accepted)
        for sequence, scores in ran.prompts:
            sequence.prompt_logprobs += scores
        decoding = [*step.decode, *(draft.sequence for draft in step.drafts)]
        for sequence, tokens in [*((s, 1) for s in decoding), *step.prefill]:
            sequence.computed += tokens
            self._prompt_tokens += min(
                tokens, max(0, sequence.prompt_tokens + tokens - sequence.computed)
            )

    def _take_safely(self, sequence: Sequence, choices: Rows[Sampled]) -> None:
        """Whatever a tokenizer or a stop string raises is the request's own failure."""
        try:
            output = take(sequence, choices, self.eos_token_ids)
        except BaseException as error:
            log.exception("A token could not be taken; its request ends.")
            self._end(sequence, FinishReason.ERROR, Fault.of(error).reason)
            return
        self._generated_tokens += len(output.token_ids)
        if output.finish_reason is None:
            self._outputs.append(output)
        else:
            self._close(sequence, output)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        """End a request whose latest step brought nothing."""
        output = Output(
            request_id=sequence.request.id,
            cached_tokens=sequence.cached_tokens or 0,
            finish_reason=reason,
            error="" if reason is FinishReason.CANCELLED else error,
            predicted_tokens=sequence.predicted_tokens,
        )
        self._close(sequence, output)

    def _close(self, sequence: Sequence, last: Output) -> None:
        """The one place where a request ends: its row, its cache, its pin and its lease go."""
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        self._answer(sequence.request, last)

    def _end_anyway(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a request of a thread that ends: what broke it may have left the scheduler broken."""
        try:
            self._end(sequence, reason, str(EngineDead()))
        except BaseException:
            log.exception("A request's row could not be given back.")
            self._sequences.pop(sequence.request.id, None)
            with suppress(AssertionError):  # Its adapter is pinned still.
                self._fail(sequence.request, str(EngineDead()))

    def _fail(self, request: GenerationRequest, error: str) -> None:
        """End a request that has no row."""
        reason = FinishReason.ERROR
        self._answer(request, Output(request_id=request.id, finish_reason=reason, error=error))

    def _answer(self, request: GenerationRequest, last: Output) -> None:
        self._ended.append(request)
        self._outputs.append(last)
        if request.lease is not None:
            request.lease.release()

    def _all(self) -> list[Sequence]:
        return list(self._sequences.values())

    def _send(self) -> None:
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return
        self._deliver(outputs)
        if self._ended:
            with self._changed:
                for request in self._ended:
                    self._places.leave(request)
                self._changed.notify_all()
            self._ended = []
