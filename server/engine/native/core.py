"""The engine's state and its steps, as one synchronous object without threads or locks."""

import itertools
import logging
from collections import abc
from collections.abc import Callable

from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.residency import Residency
from infuse.server.engine.fair_queue import least_charge
from infuse.server.engine.native.cache.planning import memory_table, window_of
from infuse.server.engine.native.config import EngineConfig
from infuse.server.engine.native.faults import FAULTS, Fault
from infuse.server.engine.native.forward.execution import prepare
from infuse.server.engine.native.model.loading import LoadedModel
from infuse.server.engine.native.model.quantization import weights_bytes
from infuse.server.engine.native.sampling.sampler import Sampled, Sampler
from infuse.server.engine.native.scheduling.scheduler import CannotStart, Scheduler
from infuse.server.engine.native.scheduling.speculation import Speculation
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.stepping import Failed, Lost, Ran, Stepping
from infuse.server.engine.native.taking import take
from infuse.server.engine.protocol import ServedModel
from infuse.server.engine.request import (
    FinishReason,
    GenerationRequest,
    InFlight,
    Output,
    adapter_names,
)
from infuse.server.engine.stats import EngineStats

log = logging.getLogger(__name__)

_CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}
"""The most prompt tokens of a step, by device. They bound how long decoding rows wait."""


class EngineCore:
    """Batches any number of requests over one model. It is made before any adapter is resident.

    Only one thread may call it, but any may call `stats` and `in_flight`. Every request that was
    added gets one last output, which has a finish reason; its lease is released before `step`
    returns that.

    Raises UnsupportedModel if the model cannot be run exactly, and DoesNotFit.
    """

    def __init__(
        self, loaded: LoadedModel, ia3: IA3Slots, residency: Residency, config: EngineConfig
    ) -> None:
        base = loaded.model
        if base.device.type == "cuda":
            log.warning("This engine has never run on a GPU. --engine vllm is made for GPUs.")
        self._residency = residency
        self._weights_bytes = weights_bytes(base)
        self.model = ServedModel(
            tokenizer=loaded.tokenizer,
            generation_config=loaded.generation_config,
            vocab_size=int(base.config.get_text_config().vocab_size),
            eos_token_ids=loaded.end_tokens,
            max_model_len=window_of(base, config.max_model_len),
            decoder_start=loaded.decoder_start(),
        )
        execution = prepare(
            ia3,
            tokenizer=loaded.tokenizer,
            decoder_start=self.model.decoder_start,
            max_rows=config.max_rows,
            max_model_len=self.model.max_model_len,
            kv_cache_tokens=config.kv_cache_tokens,
            pack=config.pack_linears,
            trace_cache=config.trace_cache,
            compile_cache=config.compile_cache,
        )
        self._bank = ia3.bank
        self.runner_kind = execution.kind
        self._compiled = execution.compiled
        self._cache = execution.cache
        self._log_memory(ia3, residency)
        self.chunk_tokens = config.prefill_chunk_tokens or _CHUNK_TOKENS[base.device.type]
        self._speculation = Speculation(
            by_default=config.speculation, possible=execution.kind == "flat"
        )
        self._scheduler = Scheduler(
            self._cache,
            residency,
            max_rows=config.max_rows,
            chunk_tokens=self.chunk_tokens,
            prefix_cache=config.prefix_cache,
            whole_prompts=execution.whole_prompts,
            speculation=self._speculation,
        )
        self._sampler = Sampler(self.model.eos_token_ids)
        self.costs = self._speculation.costs
        """How long steps take, as far as they are known."""
        self._stepping = Stepping(execution.runner, self._sampler, self._cache)
        self._seq_ids = itertools.count()
        self._sequences: dict[str, Sequence] = {}
        """Request id -> its sequence, until the request ends."""
        self._outputs: list[Output] = []
        """Outputs that `step` has not returned yet."""
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._unsettled = ""
        """Why `settle` could not bring all pinned adapters to the device. Empty: it could."""

    def __bool__(self) -> bool:
        """Whether there are sequences to compute or outputs to return."""
        return bool(self._sequences or self._outputs)

    @property
    def running(self) -> int:
        """The size of the running batch in rows."""
        return len(self._scheduler.running)

    def announce(self, begins: Callable[[int], None]) -> None:
        """Have `begins` called before each forward, with the number of its tokens."""
        self._stepping.begins = begins

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. If that fails, the request ends with the next step."""
        own = None if request.lease is None else request.lease.vocabulary
        tokenizer = self.model.tokenizer if own is None else own.tokenizer
        try:
            drafter = self._speculation.drafter(request)
            seq_id = next(self._seq_ids)
            sequence = Sequence(request, seq_id, tokenizer, self.model.decoder_start, drafter)
        except BaseException as error:
            log.exception("A request cannot begin; it ends.")
            self._fail(request, f"The request cannot begin: {error}")
            return
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request with the next step, unless it has ended already."""
        if request_id in self._sequences:
            self._end(self._sequences[request_id], FinishReason.CANCELLED)

    def has_started(self, request_id: str) -> bool:
        """Whether a sequence has left the queue. Any thread may call this."""
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.has_started

    def step(self) -> list[Output]:
        """Compute the next tokens of the running rows, or parts of their prompts.

        An error that no single request causes is raised. After it only `abandon` may be called.
        """
        try:
            step = self._scheduler.schedule()
        except CannotStart as error:
            log.error("A request could not be started; it ends.\n%s", error.fault.trace)
            self._end(error.sequence, FinishReason.ERROR, error.fault.reason)
            return self._take_outputs()
        if step:
            for part in self._stepping.run(step):
                self._advance(part)
            self._steps += 1
        else:
            assert not self._sequences, "waiting requests with an idle model can always start"
        assert self._sequences or not self._cache.used_tokens, "an idle engine holds no rows"
        return self._take_outputs()

    def settle(self) -> None:
        """Bring pinned adapters to the device. If there is no memory, the next call tries again."""
        problem = ""
        try:
            self._residency.settle()
        except FAULTS as error:
            problem = Fault.of(error).message
            if problem != self._unsettled:
                log.error("An adapter cannot be kept on the device for now: %s", problem)
        self._unsettled = problem

    def abandon(self, reason: FinishReason) -> list[Output]:
        """End every request, even in a state that an error left. Only `close` may follow."""
        for sequence in list(self._sequences.values()):
            try:
                self._end(sequence, reason)
            except BaseException:
                log.exception("A request's row could not be released.")
                if self._sequences.pop(sequence.request.id, None) is not None:
                    last = Output(request_id=sequence.request.id, finish_reason=reason)
                    self._outputs.append(last)
                    release_anyway(sequence.request)
        return self._take_outputs()

    def close(self) -> None:
        """End the sampler's thread, which computes grammar masks. No call may follow."""
        self._sampler.close()

    def in_flight(self) -> list[InFlight]:
        """Every request that was added and has not ended. Any thread may call this."""
        # Copies, as the thread that calls `step` changes both.
        running = set(self._scheduler.running.copy())
        return [
            InFlight(
                request=each.request,
                is_running=each in running,
                waits_for=self._scheduler.waits_for(each),
                answer_tokens=each.answer_tokens,
                started=each.started,
                first_token=each.first_token,
            )
            for each in self._sequences.copy().values()
        ]

    def stats(self) -> EngineStats:
        """What the core knows. `alive`, `ready` and `waiting` are for the engine to say."""
        prefixes = self._scheduler.prefixes
        # Copies, as the thread that calls `step` changes both.
        running = set(self._scheduler.running.copy())
        waiting = set(self._sequences.copy().values()) - running
        return EngineStats(
            running=len(running),
            running_adapters=adapter_names(sequence.request for sequence in running),
            waiting_adapters=adapter_names(sequence.request for sequence in waiting),
            waiting_tokens=least_charge(sequence.request for sequence in waiting),
            kv_tokens_used=self._cache.used_tokens,
            kv_tokens_total=self._cache.total_tokens,
            kv_block_tokens=self._cache.blocks.size,
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

    def _log_memory(self, ia3: IA3Slots, residency: Residency) -> None:
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
                ia3.base.device,
            ),
        )

    def _advance(self, part: Ran | Failed | Lost) -> None:
        match part:
            case Ran():
                self._count(part)
                for sequence, choices in part.choices:
                    self._append(sequence, choices)
            case Failed(sequence, reason):
                self._end(sequence, FinishReason.ERROR, reason)
            case Lost(sequences):
                for sequence in sequences:
                    self._scheduler.preempt(sequence)

    def _count(self, ran: Ran) -> None:
        """Note what a step computed: keys and values, scores of prompts, and the cost of drafts."""
        step = ran.step
        accepted = sum(len(choices) - 1 for _, choices in ran.choices)
        self._speculation.learn(step, ran.seconds, accepted)
        for sequence, scores in ran.prompts:
            sequence.score_prompt(scores)
        decoding = [*step.decode, *(draft.sequence for draft in step.drafts)]
        for sequence, tokens in [*((s, 1) for s in decoding), *step.prefill]:
            self._prompt_tokens += min(tokens, max(0, sequence.prompt_tokens - sequence.computed))
            sequence.advance(tokens)

    def _append(self, sequence: Sequence, choices: abc.Sequence[Sampled]) -> None:
        """Append sampled tokens. If decoding their text raises, only this request ends."""
        try:
            output = take(sequence, choices, self.model.eos_token_ids)
        except BaseException as error:
            log.exception("A token could not be appended; its request ends.")
            self._end(sequence, FinishReason.ERROR, Fault.of(error).reason)
            return
        self._generated_tokens += len(output.token_ids)
        if output.finish_reason is None:
            self._outputs.append(output)
        else:
            self._close(sequence, output)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        """End a request with an output that has no further tokens."""
        is_first = not sequence.answer_tokens
        last = Output(
            request_id=sequence.request.id,
            started=sequence.started if is_first else None,
            lacked_slot=sequence.lacked_slot if is_first else None,
            cached_tokens=sequence.cached_tokens or 0,
            finish_reason=reason,
            error=error,
            predicted_tokens=sequence.predicted_tokens,
        )
        self._close(sequence, last)

    def _close(self, sequence: Sequence, last: Output) -> None:
        """Release all that a sequence holds: its row, its cache, its pin and its lease."""
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        self._answer(sequence.request, last)

    def _fail(self, request: GenerationRequest, error: str) -> None:
        """End a request that has no sequence."""
        last = Output(request_id=request.id, finish_reason=FinishReason.ERROR, error=error)
        self._answer(request, last)

    def _answer(self, request: GenerationRequest, last: Output) -> None:
        self._outputs.append(last)
        if request.lease is not None:
            request.lease.release()

    def _take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs


def release_anyway(request: GenerationRequest) -> None:
    """Release an abandoned request's lease, even in a state that an error left."""
    if request.lease is not None:
        try:
            request.lease.release()
        except Exception:
            log.exception("A lease could not be released.")
