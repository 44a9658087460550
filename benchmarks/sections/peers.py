"""Against what users would pick instead, all in process: vLLM on the CPU (the base, and 8 of its
LoRA adapters against 32 of ours), and transformers, static batch and continuous batching."""

import math
from collections.abc import Callable
from typing import Any

from benchmarks.bench import LORA_ADAPTERS, ROWS, Bench
from benchmarks.engines import Engine
from benchmarks.machine import has_bfloat16
from benchmarks.turns import Side, Turns, take_turns
from benchmarks.workload import LORA_RANK

GENERATE = "transformers generate (one static batch)"
BATCHING = "transformers continuous batching"
IN_FLIGHT = (32, 16, 1)


def measure(bench: Bench) -> dict[str, Any]:
    plan = bench.plan
    sides = [
        base_side(bench, "Infuse", bench.inprocess, ROWS),
        base_side(bench, "vLLM", bench.vllm, ROWS),
    ]
    if plan.slow_peers:
        tokens = ROWS * plan.vllm_tokens
        turns = math.ceil(plan.peer_turns / 2)
        ours = bench.requests([*bench.names[:ROWS]], plan.vllm_tokens)
        theirs = bench.requests(
            [f"lora-{row % LORA_ADAPTERS}" for row in range(ROWS)], plan.vllm_tokens
        )
        sides += [
            Side("Infuse, 32 adapters", lambda: bench.inprocess().run(ours), tokens, turns),
            Side("vLLM, 8 LoRA adapters", lambda: bench.vllm(lora=True).run(theirs), tokens, turns),
            base_side(bench, GENERATE, bench.generate, ROWS, turns),
            base_side(bench, BATCHING, bench.batching, ROWS, turns),
        ]
    found = {ROWS: take_turns(sides, plan.peer_turns)}
    found |= {
        rows: take_turns(
            [
                base_side(bench, "Infuse", bench.inprocess, rows),
                base_side(bench, "vLLM", bench.vllm, rows),
            ],
            plan.peer_turns,
        )
        for rows in IN_FLIGHT[1:]
    }
    return report(found) | {
        "tokens": plan.vllm_tokens,
        "lora_rank": LORA_RANK,
        "lora_adapters": LORA_ADAPTERS,
    }


def measure_bfloat16(bench: Bench) -> dict[str, Any]:
    """The same in bfloat16, where the processor computes it."""
    if not has_bfloat16():
        return {"skipped": "this processor has no bfloat16 arithmetic (AVX512-BF16 or AMX)"}
    found = {
        rows: take_turns(
            [
                base_side(bench, "Infuse", lambda: bench.inprocess("bfloat16"), rows),
                base_side(bench, "vLLM", lambda: bench.vllm("bfloat16"), rows),
            ],
            bench.plan.peer_turns,
        )
        for rows in IN_FLIGHT
    }
    return report(found) | {"tokens": bench.plan.vllm_tokens}


def base_side(
    bench: Bench, name: str, engine: Callable[[], Engine], rows: int, turns: int | None = None
) -> Side:
    requests = bench.requests([None] * rows, bench.plan.vllm_tokens)
    tokens = rows * bench.plan.vllm_tokens
    return Side(f"{name}, base, {rows} in flight", lambda: engine().run(requests), tokens, turns)


def report(found: dict[int, Turns]) -> dict[str, Any]:
    """All turns as one section, by how many were in flight."""
    speeds: dict[str, Any] = {}
    failed: dict[str, str] = {}
    ratios: dict[str, Any] = {}
    for rows, turns in found.items():
        each = turns.report()
        speeds |= each["tokens_per_second"]
        failed |= each["failed"]
        ratios[f"base_over_vllm_at_{rows}"] = turns.ratio(
            f"Infuse, base, {rows} in flight", f"vLLM, base, {rows} in flight"
        )
        ours = f"Infuse, base, {rows} in flight"
        for name, pair in {
            "adapters_over_lora": ("Infuse, 32 adapters", "vLLM, 8 LoRA adapters"),
            "base_over_generate": (ours, f"{GENERATE}, base, {rows} in flight"),
            "base_over_batching": (ours, f"{BATCHING}, base, {rows} in flight"),
        }.items():
            ratio = turns.ratio(*pair)
            if ratio is not None:
                ratios[name] = ratio
    return {"tokens_per_second": speeds, "failed": failed, "ratios": ratios}
