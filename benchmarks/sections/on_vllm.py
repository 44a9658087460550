"""Our adapters on vLLM: beside its base, beside vLLM without our workers, and beside its LoRA."""

from typing import Any

from benchmarks.bench import LORA_ADAPTERS, ROWS, Bench
from benchmarks.engines import Engine
from benchmarks.turns import Side, report, take_turns

ADAPTERS = "vLLM with our workers, 32 adapters"
BASE = "vLLM with our workers, base"
PLAIN = "vLLM, base"
LORA = "vLLM, 8 LoRA adapters"
_LORA_TURNS = 4
"""A round of it takes several times as long as the others."""


def measure(bench: Bench) -> dict[str, Any]:
    tokens, turns = bench.plan.round_tokens, bench.plan.on_vllm_turns
    if not turns:
        return {"skipped": "not in a quick run"}
    base = bench.requests([None] * ROWS, tokens)
    adapters = bench.requests([*bench.names[:ROWS]], tokens)
    lora = bench.requests([f"lora-{row % LORA_ADAPTERS}" for row in range(ROWS)], tokens)

    def rescaling() -> Engine:
        return bench.vllm(ia3=True)

    each = ROWS * tokens
    sides = [
        Side(ADAPTERS, rescaling, lambda engine: engine.run(adapters), each),
        Side(BASE, rescaling, lambda engine: engine.run(base), each),
        Side(PLAIN, bench.vllm, lambda engine: engine.run(base), each),
        Side(LORA, lambda: bench.vllm(lora=True), lambda e: e.run(lora), each, _LORA_TURNS),
    ]
    taken = take_turns(sides, turns)
    bench.stop("vllm", "vllm-ia3", "vllm-lora")
    return report(taken) | {
        "ratios": {
            "adapters_over_base_on_vllm": taken.ratio(ADAPTERS, BASE),
            "base_on_vllm_over_vllm": taken.ratio(BASE, PLAIN),
            "adapters_over_lora_on_vllm": taken.ratio(ADAPTERS, LORA),
        },
        "tokens": tokens,
        "rows": ROWS,
    }
