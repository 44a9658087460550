"""Against what users would pick instead, all in process: vLLM on the CPU (the base, and 8 of its
LoRA adapters against 32 of ours), and transformers, static batch and continuous batching."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.bench import LORA_ADAPTERS, ROWS, Bench
from benchmarks.engines import Engine
from benchmarks.machine import has_bfloat16
from benchmarks.turns import Side, Turns, report, take_turns
from benchmarks.workload import LORA_RANK

GENERATE = "transformers generate (one static batch)"
BATCHING = "transformers continuous batching"
ADAPTERS = "Infuse, 32 adapters"
LORA = "vLLM, 8 LoRA adapters"
IN_FLIGHT = (32, 16, 1)


def measure(bench: Bench) -> dict[str, Any]:
    plan = bench.plan
    found = _beside_vllm(bench, "float32")
    bench.stop("vllm")
    slow = [_lora(bench), _transformers(bench)] if plan.slow_peer_turns else []
    return _report(found, slow) | {
        "tokens": plan.vllm_tokens,
        "lora_rank": LORA_RANK,
        "lora_adapters": LORA_ADAPTERS,
    }


def _lora(bench: Bench) -> Turns:
    tokens = bench.plan.vllm_tokens
    ours = bench.requests([*bench.names[:ROWS]], tokens)
    theirs = bench.requests([f"lora-{row % LORA_ADAPTERS}" for row in range(ROWS)], tokens)
    sides = [
        Side(ADAPTERS, bench.inprocess, lambda engine: engine.run(ours), ROWS * tokens),
        Side(LORA, lambda: bench.vllm(lora=True), lambda vllm: vllm.run(theirs), ROWS * tokens),
    ]
    turns = take_turns(sides, bench.plan.lora_turns)
    bench.stop("vllm-lora")
    return turns


def _transformers(bench: Bench) -> Turns:
    sides = [
        base_side(bench, "Infuse", bench.inprocess, ROWS),
        base_side(bench, GENERATE, bench.generate, ROWS),
        base_side(bench, BATCHING, bench.batching, ROWS),
    ]
    return take_turns(sides, bench.plan.slow_peer_turns)


def measure_bfloat16(bench: Bench) -> dict[str, Any]:
    """The same in bfloat16, where the processor computes it."""
    if not has_bfloat16():
        return {"skipped": "this processor has no bfloat16 arithmetic (AVX512-BF16 or AMX)"}
    return _report(_beside_vllm(bench, "bfloat16")) | {"tokens": bench.plan.vllm_tokens}


def _beside_vllm(bench: Bench, dtype: str) -> dict[int, Turns]:
    """By how many are in flight."""
    return {
        rows: take_turns(
            [
                base_side(bench, "Infuse", lambda: bench.inprocess(dtype), rows),
                base_side(bench, "vLLM", lambda: bench.vllm(dtype), rows),
            ],
            bench.plan.peer_turns,
        )
        for rows in IN_FLIGHT
    }


def base_side(bench: Bench, name: str, engine: Callable[[], Engine], rows: int) -> Side:
    requests = bench.requests([None] * rows, bench.plan.vllm_tokens)
    tokens = rows * bench.plan.vllm_tokens
    return Side(_base(name, rows), engine, lambda running: running.run(requests), tokens)


def _base(name: str, rows: int) -> str:
    return f"{name}, base, {rows} in flight"


def _report(by_rows: dict[int, Turns], slow: Sequence[Turns] = ()) -> dict[str, Any]:
    """All turns as one section: beside vLLM, by how many were in flight, and beside the slow."""
    ratios = {
        f"base_over_vllm_at_{rows}": turns.ratio(_base("Infuse", rows), _base("vLLM", rows))
        for rows, turns in by_rows.items()
    }
    ours = _base("Infuse", ROWS)
    for turns in slow:
        for name, pair in {
            "adapters_over_lora": (ADAPTERS, LORA),
            "base_over_generate": (ours, _base(GENERATE, ROWS)),
            "base_over_batching": (ours, _base(BATCHING, ROWS)),
        }.items():
            ratio = turns.ratio(*pair)
            if ratio is not None:
                ratios[name] = ratio
    return report(*by_rows.values(), *slow) | {"ratios": ratios}
