"""Requests in, outputs out: the loop that owns the model, on a thread of its own."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adapters.model import IA3Model
from adapters.residency import Residency
from server.engine.constraints import Grammars
from server.engine.errors import EngineDead, EngineStopping, QueueFull, UnsupportedModel
from server.engine.execution import prepare
from server.engine.loading import LoadedModel
from server.engine.planning import window_of
from server.engine.quantization import weights_bytes
from server.engine.request import FinishReason, GenerationRequest, Output, TokenLogprob
from server.engine.runner import Logits
from server.engine.sampler import Sampled, Sampler, score_tokens
from server.engine.scheduler import Scheduler, Step
from server.engine.sequence import Sequence

log = logging.getLogger(__name__)

_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
"""Prompt tokens in a step: what decoding rows wait for at most, by device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """None: planned from the model and the machine."""

    max_rows: int = 32
    """Requests in one batch."""
    max_queue: int = 256
    """Requests that may wait beside those that run."""
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    prefill_chunk_tokens: int | None = None
    pack_linears: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    ready: bool
    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    weights_bytes: int
    """Of the base model, each parameter once."""
    kv_cache_bytes: int
    """The planned budget."""
    bank_bytes: int
    """Of the columns that adapters have used so far, for all slots."""
    preemptions: int
    steps: int
    prompt_tokens: int
    generated_tokens: int


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
        self.eos_token_ids = _end_tokens(loaded)
        self.grammars = Grammars(loaded.tokenizer, self.vocab_size, self.eos_token_ids)
        self.max_model_len = window_of(base, config.max_model_len)
        self.decoder_start = _decoder_start(loaded)
        execution = prepare(
            ia3,
            max_rows=config.max_rows,
            max_tokens=self.max_model_len * (1 if self.decoder_start is None else 2),
            kv_cache_tokens=config.kv_cache_tokens,
            pack=config.pack_linears,
        )
        self.runner_kind = execution.kind
        self._cache = execution.cache
        self._runner = execution.runner
        log.info(
            "Memory: %.0f MB of weights, %.0f MB for keys and values of %d tokens.",
            self._weights_bytes / 1e6,
            self._cache.nbytes / 1e6,
            self._cache.total_tokens,
        )
        chunk = config.prefill_chunk_tokens or _CHUNK_TOKENS[base.device.type]
        self._scheduler = Scheduler(self._cache, residency, config.max_rows, chunk)
        self._sampler = Sampler(self.eos_token_ids)
        self._max_in_flight = config.max_rows + config.max_queue
        self._rows = itertools.count()
        self._changed = threading.Condition()
        """Guards the four below, which other threads touch."""
        self._inbox: deque[GenerationRequest] = deque()
        self._cancelled: set[str] = set()
        self._in_flight = 0
        self._state = "new"
        self._sequences: dict[str, Sequence] = {}
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._deliver: Callable[[list[Output]], None] = lambda _: None
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._seconds_per_finish = 1.0
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
            if self._in_flight + len(requests) > self._max_in_flight:
                retry_after = min(max(self._seconds_per_finish, 1.0), 60.0)
                raise QueueFull(self._in_flight - len(self._scheduler.running), retry_after)
            self._in_flight += len(requests)
            self._inbox.extend(requests)
            self._changed.notify()

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
        return EngineStats(
            ready=self._state == "running",
            running=running,
            waiting=max(0, self._in_flight - running),
            kv_tokens_used=self._cache.used_tokens,
            kv_tokens_total=self._cache.total_tokens,
            weights_bytes=self._weights_bytes,
            kv_cache_bytes=self._cache.nbytes,
            bank_bytes=self._bank.nbytes,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def stop(self, timeout: float) -> None:
        """Refuse new requests, let the running ones end for up to `timeout` seconds, cancel the
        rest, and end the model thread."""
        with self._changed:
            if self._state == "running":
                self._state = "draining"
            self._changed.notify()
            self._changed.wait_for(lambda: self._in_flight == 0 or self._state == "dead", timeout)
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
            self._residency.settle()
            while not (self._sequences or self._inbox) and self._state in ("running", "draining"):
                assert self._cache.used_tokens == 0, "an idle engine holds no keys"
                self._cancelled.clear()
                self._changed.wait()
                self._residency.settle()
            self._accept()
            cancelled, self._cancelled = self._cancelled, set()
            going = self._state in ("running", "draining")
        ended = [self._sequences[each] for each in cancelled if each in self._sequences]
        self._send([self._end(sequence, FinishReason.CANCELLED) for sequence in ended])
        return going

    def _accept(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            own = None if request.lease is None else request.lease.vocabulary
            tokenizer = self.tokenizer if own is None else own.tokenizer
            sequence = Sequence(request, next(self._rows), tokenizer, self.decoder_start)
            self._sequences[request.id] = sequence
            prefix = request.prefix
            leader = None if prefix is None else self._sequences.get(prefix.leader)
            self._scheduler.add(sequence, leader)

    def _step(self) -> None:
        step = self._scheduler.schedule()
        if not step:
            assert not self._sequences, "waiting requests with an idle model can always start"
            return
        outputs = []
        try:
            logits = self._runner.run(step)
            self._advance(step, logits)
            sampled = self._sampler.sample(logits.next_token, logits.sequences)
            for sequence, choice in zip(logits.sequences, sampled, strict=True):
                outputs.append(self._take(sequence, choice))
        except (RuntimeError, ValueError, TypeError) as error:
            log.exception("A step failed; its requests end.")
            told = {output.request_id for output in outputs}
            everyone = [*step.decode, *(sequence for sequence, _ in step.prefill)]
            outputs += [
                self._end(sequence, FinishReason.ERROR, f"The model failed: {error}")
                for sequence in everyone
                if sequence.request.id not in told
            ]
        self._steps += 1
        self._send(outputs)

    def _advance(self, step: Step, logits: Logits) -> None:
        """The step's tokens have keys and values now; prompts that asked for it are scored."""
        for sequence, scores in logits.prompts:
            known = len(sequence.prompt_logprobs)
            scored = sequence.tokens[known : known + len(scores)]
            best = sequence.request.params.prompt_logprobs or 0
            sequence.prompt_logprobs += score_tokens(scores, scored, best)
        for sequence, tokens in [*((s, 1) for s in step.decode), *step.prefill]:
            sequence.computed += tokens
            self._prompt_tokens += min(
                tokens, max(0, sequence.prompt_tokens + tokens - sequence.computed)
            )

    def _take(self, sequence: Sequence, choice: Sampled) -> Output:
        """Append a sequence's next token, and say what that brought."""
        params = sequence.request.params
        if not choice.finite:
            return self._end(
                sequence,
                FinishReason.ERROR,
                "The model's output is not finite; check the adapter's values.",
            )
        if choice.grammar_error:
            return self._end(sequence, FinishReason.CONSTRAINT, choice.grammar_error)
        scores = None
        if params.prompt_logprobs is not None and sequence.answer_tokens == 0:
            scores = tuple(sequence.prompt_logprobs)
        if params.max_tokens == 0:
            return self._end(sequence, FinishReason.LENGTH, prompt_logprobs=scores)
        sequence.tokens.append(choice.token)
        self._generated_tokens += 1
        text, reason = "", None
        goes_on = params.ignore_eos and sequence.constraint is None
        is_end = choice.token in self.eos_token_ids and not goes_on
        if is_end or choice.token in params.stop_token_ids:
            reason = FinishReason.STOP
        else:
            text, stopped = sequence.detokenizer.push(choice.token)
            if stopped:
                reason = FinishReason.STOP
            elif sequence.answer_tokens >= params.max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            text += sequence.detokenizer.finish()
            self._end(sequence, reason)
        return Output(
            request_id=sequence.request.id,
            token_ids=(choice.token,),
            text=text,
            logprobs=() if choice.logprob is None else (choice.logprob,),
            prompt_logprobs=scores,
            finish_reason=reason,
        )

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: str = "",
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
    ) -> Output:
        """The one place where a request ends: its row, its cache, its pin and its lease go."""
        self._scheduler.remove(sequence)
        if sequence.request.lease is not None:
            sequence.request.lease.release()
        del self._sequences[sequence.request.id]
        now = time.monotonic()
        self._seconds_per_finish += 0.1 * (now - self._last_finish - self._seconds_per_finish)
        self._last_finish = now
        return Output(
            request_id=sequence.request.id,
            finish_reason=reason,
            error="" if reason is FinishReason.CANCELLED else error,
            prompt_logprobs=prompt_logprobs,
        )

    def _all(self) -> list[Sequence]:
        return list(self._sequences.values())

    def _send(self, outputs: Iterable[Output]) -> None:
        outputs = list(outputs)
        if not outputs:
            return
        ended = sum(output.finish_reason is not None for output in outputs)
        self._deliver(outputs)
        if ended:
            with self._changed:
                self._in_flight -= ended
                self._changed.notify_all()


def _end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The model's own end tokens: `generation_config` may name several."""
    ends = loaded.generation_config.eos_token_id
    if ends is None:
        ends = loaded.tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _decoder_start(loaded: LoadedModel) -> tuple[int, ...] | None:
    """What the decoder of an encoder-decoder begins with, as in transformers' `generate`."""
    if not loaded.model.config.is_encoder_decoder:
        return None
    asked = loaded.generation_config
    start = asked.decoder_start_token_id
    if start is None:
        start = getattr(loaded.model.config, "decoder_start_token_id", None)
    if start is None:
        raise UnsupportedModel("the model's config names no decoder_start_token_id")
    forced = [] if asked.forced_bos_token_id is None else [int(asked.forced_bos_token_id)]
    return (int(start), *forced)
