"""Our adapters on vLLM: beside its base, beside vLLM without our workers, beside its LoRA; and what
the filling of slots costs requests that run.

Sides that are compared have an engine each, and take turns on two processes of its kind: of two
sides that share an engine, one would run in slices, and the other alone at the turn's end.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

from benchmarks.bench import LORA_ADAPTERS, ROWS, Bench
from benchmarks.engines import Engine, Request, Round
from benchmarks.machine import resident_bytes
from benchmarks.sections.latency import waits
from benchmarks.turns import Side, Turns, report, take_turns

ADAPTERS = "vLLM with our workers, 32 adapters"
BASE = "vLLM with our workers, base"
PLAIN = "vLLM, base"
BESIDE_LORA = "vLLM with our workers, 32 adapters, beside LoRA"
LORA = "vLLM, 8 LoRA adapters"
FILLS = "requests beside which slots are filled"
NO_FILLS = "requests beside as many of a resident adapter"
_SLOTS = 8
_RUNNING = 24
"""Requests of an adapter that stays; the other rows of the batch are free for those that come."""
_TOKENS_OUT = 48
_EVERY_SECONDS = 0.2


def measure(bench: Bench) -> dict[str, Any]:
    if not bench.plan.on_vllm_turns:
        return {"skipped": "not in a quick run"}
    bench.keep_only()  # Four engines need the memory.
    engines: dict[str, dict[str, float]] = {}
    base = _beside_base(bench)
    engines["vLLM"] = _costs(bench.vllm())
    engines["vLLM with our workers, 32 slots"] = _costs(bench.vllm(ia3=True))
    bench.stop("vllm", "vllm-twin", "vllm-ia3-twin")
    lora = _beside_lora(bench)
    engines["vLLM with LoRA, 8 slots"] = _costs(bench.vllm(lora=True))
    bench.stop("vllm-ia3", "vllm-lora")
    fills = _beside_fills(bench)
    engines[f"our server on vLLM, {_SLOTS} slots"] = _costs(bench.server_on_vllm(_SLOTS))
    bench.stop("infuse-on-vllm")
    return report(base, lora, fills) | {
        "ratios": {
            "adapters_over_base_on_vllm": base.ratio(ADAPTERS, BASE, turns_each=2),
            "base_on_vllm_over_vllm": base.ratio(BASE, PLAIN, turns_each=2),
            "adapters_over_lora_on_vllm": lora.ratio(BESIDE_LORA, LORA),
            "tpot_beside_fills_on_vllm": fills.ratio(FILLS, NO_FILLS, _p99_tpot),
        },
        "waits": {name: _waits(fills, name) for name in (FILLS, NO_FILLS)},
        "engines": engines,
        "tokens": bench.plan.round_tokens,
        "rows": ROWS,
    }


def _costs(engine: Any) -> dict[str, float]:
    return {
        "start_seconds": engine.start_seconds,
        "resident_bytes": resident_bytes(engine.group),
    }


def _beside_base(bench: Bench) -> Turns:
    tokens = bench.plan.round_tokens
    base = bench.requests([None] * ROWS, tokens)
    adapters = bench.requests([*bench.names[:ROWS]], tokens)

    def on(*twins: bool, ia3: bool) -> Callable[[], Engine]:
        """In each turn the next of these processes, over and over."""
        turns = cycle(twins)
        return lambda: bench.vllm(ia3=ia3, twin=next(turns))

    each = ROWS * tokens
    sides = [
        Side(ADAPTERS, on(False, True, ia3=True), lambda engine: engine.run(adapters), each),
        Side(BASE, on(True, False, ia3=True), lambda engine: engine.run(base), each),
        Side(PLAIN, on(False, False, True, True, ia3=False), lambda e: e.run(base), each),
    ]
    return take_turns(sides, bench.plan.on_vllm_turns)


def _beside_lora(bench: Bench) -> Turns:
    """Half as many tokens: a round of LoRA takes several times as long as the others."""
    tokens = bench.plan.round_tokens // 2
    ours = bench.requests([*bench.names[:ROWS]], tokens)
    theirs = bench.requests([f"lora-{row % LORA_ADAPTERS}" for row in range(ROWS)], tokens)
    sides = [
        Side(BESIDE_LORA, lambda: bench.vllm(ia3=True), lambda e: e.run(ours), ROWS * tokens),
        Side(LORA, lambda: bench.vllm(lora=True), lambda e: e.run(theirs), ROWS * tokens),
    ]
    return take_turns(sides, bench.plan.on_vllm_lora_turns)


def _beside_fills(bench: Bench) -> Turns:
    """Requests that run, and beside them requests of one token that come one after the other: each
    of another adapter, whose slot has to be filled; or all of the same, which has its slot."""
    kept, *others = bench.names[:ROWS]
    cold = cycle(others)

    def ask(coming: Callable[[], str]) -> Callable[[Engine], Round]:
        return lambda engine: engine.run([*_running(bench, kept), *_coming(bench, coming)])

    def server() -> Engine:
        return bench.server_on_vllm(_SLOTS)

    each = _RUNNING * _TOKENS_OUT
    sides = [
        Side(FILLS, server, ask(lambda: next(cold)), each),
        Side(NO_FILLS, server, ask(lambda: kept), each),
    ]
    return take_turns(sides, bench.plan.fill_turns)


def _running(bench: Bench, adapter: str) -> list[Request]:
    return [Request(bench.prompts[row][:4], _TOKENS_OUT, adapter) for row in range(_RUNNING)]


def _coming(bench: Bench, adapter: Callable[[], str]) -> list[Request]:
    """As many as come while the others run, if a step takes a tenth of a second."""
    count = round(0.1 * _TOKENS_OUT / _EVERY_SECONDS)
    prompt = bench.prompts[-1][:4]
    return [Request(prompt, 1, adapter(), (1 + n) * _EVERY_SECONDS) for n in range(count)]


def _p99_tpot(_: str, each: Round) -> float:
    found: float = waits(each.answers[:_RUNNING], _TOKENS_OUT)["tpot_ms"]["p99"]
    return found


def _waits(fills: Turns, name: str) -> dict[str, Any]:
    """Of those that run, the time between tokens; of those that come, the time to the token."""
    rounds = [each for each in fills.rounds[name] if each is not None]
    running = [answer for each in rounds for answer in each.answers[:_RUNNING]]
    coming = [answer for each in rounds for answer in each.answers[_RUNNING:]]
    return waits(running, _TOKENS_OUT) | {
        "ttft_ms": waits(coming, 2)["ttft_ms"],
        "requests": len(coming),
    }
