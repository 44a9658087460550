"""Requests in, outputs out: the loop that owns the model, on a thread of its own."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows

from adapters.model import IA3Model
from adapters.residency import Residency
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

log = logging.getLogger(__name__)

_CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
"""Prompt tokens in a step: what decoding rows wait for at most, by device."""


class Engine:
    """Batches any number of requests over one model. Made before any adapter is resident.

    Raises UnsupportedModel where the model cannot be run exactly, and DoesNotFit.
    """

    def __init__(
        self, loaded: LoadedModel, ia3: IA3Model, residency: Residency, config: EngineConfig
    ) -> None:
        base = loaded.model
        self._bank = ia3.bank
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
            max_rows=config.max_rows,
            max_tokens=self.max_model_len * (1 if self.decoder_start is None else 2),
            kv_cache_tokens=config.kv_cache_tokens,
            pack=config.pack_linears,
            trace_cache=config.trace_cache,
            compile_cache=config.compile_cache,
        )
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
        self._ended: list[GenerationRequest] = []
        """Whose last output is not delivered yet."""
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._deliver: Callable[[list[Output]], None] = lambda _: None
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._seconds_per_finish = 1.0
        self._unsettled = ""
        """Why the adapters that are kept are not all on the device."""
        self._last_finish = time.monotonic()

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
                retry_after = min(max(self._seconds_per_finish, 1.0), 60.0)
                raise QueueFull(self._places.taken - len(self._scheduler.running), retry_after)
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
        except Exception:
            log.exception("The model thread ends.")
            with self._changed:
                self._state = "dead"
        reason = FinishReason.CANCELLED if self._state == "stopping" else FinishReason.ERROR
        with self._changed:
            self._accept()
        self._send([self._end(s, reason, str(EngineDead())) for s in self._all()])
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
        ended = [self._sequences[each] for each in cancelled if each in self._sequences]
        self._send([self._end(sequence, FinishReason.CANCELLED) for sequence in ended])
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
        for request in self._inbox.take_all():
            own = None if request.lease is None else request.lease.vocabulary
            tokenizer = self.tokenizer if own is None else own.tokenizer
            sequence = Sequence(request, next(self._rows), tokenizer, self.decoder_start)
            sequence.drafter = self._speculation.drafter(request)
            self._sequences[request.id] = sequence
            self._scheduler.add(sequence)

    def _step(self) -> None:
        outputs = []
        try:
            step = self._speculation.draft(self._scheduler.schedule())
        except CannotStart as error:
            log.error("A request could not be started; it ends.\n%s", error.fault.trace)
            self._send([self._end(error.sequence, FinishReason.ERROR, error.fault.reason)])
            return
        if not step:
            assert not self._sequences, "waiting requests with an idle model can always start"
            return
        for part in self._stepping.run(step):
            match part:
                case Ran():
                    self._advance(part)
                    outputs += [self._take_safely(*each) for each in part.choices]
                case Failed(sequence, reason):
                    outputs.append(self._end(sequence, FinishReason.ERROR, reason))
                case Lost(sequences):
                    for sequence in sequences:
                        self._scheduler.put_back(sequence)
        self._steps += 1
        self._send(outputs)

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

    def _take_safely(self, sequence: Sequence, choices: Rows[Sampled]) -> Output:
        """What a tokenizer or a stop string may raise is the request's own failure."""
        try:
            return self._take(sequence, choices)
        except FAULTS as error:
            log.exception("A token could not be taken; its request ends.")
            return self._end(sequence, FinishReason.ERROR, Fault.of(error).reason)

    def _take(self, sequence: Sequence, choices: Rows[Sampled]) -> Output:
        """Append a sequence's next tokens, until one ends it, and say what that brought."""
        params = sequence.request.params
        scores = None
        if params.prompt_logprobs is not None and sequence.answer_tokens == 0:
            scores = tuple(sequence.prompt_logprobs)
        taken: list[Sampled] = []
        text, error = "", ""
        reason = FinishReason.LENGTH if params.max_tokens == 0 else None
        for choice in choices:
            if not choice.finite:
                reason = FinishReason.ERROR
                error = "The model's output is not finite; check the adapter's values."
            elif choice.grammar_error:
                reason, error = FinishReason.CONSTRAINT, choice.grammar_error
            if reason is not None:
                break
            if taken:
                # The one before was guessed, so its keys and values are there.
                sequence.computed += 1
            taken.append(choice)
            piece, reason = self._append(sequence, choice.token)
            text += piece
        predicted = 0
        if reason is not None:
            text += "" if error else sequence.detokenizer.finish()
            predicted = self._end(sequence, reason).predicted_tokens
        return Output(
            request_id=sequence.request.id,
            token_ids=tuple(choice.token for choice in taken),
            text=text,
            logprobs=tuple(choice.logprob for choice in taken if choice.logprob is not None),
            prompt_logprobs=scores,
            cached_tokens=0 if reason is None else sequence.cached_tokens or 0,
            finish_reason=reason,
            error=error,
            predicted_tokens=predicted,
        )

    def _append(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """The text that the token brings, and whether it is the last."""
        params = sequence.request.params
        sequence.tokens.append(token)
        self._generated_tokens += 1
        goes_on = params.ignore_eos and sequence.constraint is None
        is_end = token in self.eos_token_ids and not goes_on
        if is_end or token in params.stop_token_ids:
            return "", FinishReason.STOP
        text, stopped = sequence.detokenizer.push(token)
        if stopped:
            return text, FinishReason.STOP
        return text, FinishReason.LENGTH if sequence.answer_tokens >= params.max_tokens else None

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> Output:
        """The one place where a request ends: its row, its cache, its pin and its lease go."""
        self._scheduler.remove(sequence)
        if sequence.request.lease is not None:
            sequence.request.lease.release()
        del self._sequences[sequence.request.id]
        self._ended.append(sequence.request)
        now = time.monotonic()
        self._seconds_per_finish += 0.1 * (now - self._last_finish - self._seconds_per_finish)
        self._last_finish = now
        return Output(
            request_id=sequence.request.id,
            cached_tokens=sequence.cached_tokens or 0,
            finish_reason=reason,
            error="" if reason is FinishReason.CANCELLED else error,
            predicted_tokens=sequence.predicted_tokens,
        )

    def _all(self) -> list[Sequence]:
        return list(self._sequences.values())

    def _send(self, outputs: Iterable[Output]) -> None:
        outputs = list(outputs)
        if not outputs:
            return
        self._deliver(outputs)
        if self._ended:
            with self._changed:
                for request in self._ended:
                    self._places.leave(request)
                self._changed.notify_all()
            self._ended = []
