"""What HTTP costs: the same requests streamed, and asked without HTTP, of the same two processes in
turns; and the server under a public load generator that knows nothing of it.
"""

import json
import os
import subprocess
from typing import Any

from benchmarks import peers
from benchmarks.bench import ROWS, Bench
from benchmarks.turns import Side, Turns, report, take_turns

STREAMED = "HTTP, streaming"
NEAR = "HTTP, streaming, each token read on the same cores"
INPROCESS = "in process"
_KEPT = (
    "completed",
    "failed",
    "request_throughput",
    "output_throughput",
    "max_concurrency",
    "median_ttft_ms",
    "p95_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p95_tpot_ms",
    "p99_tpot_ms",
)


def measure(bench: Bench) -> dict[str, Any]:
    plan = bench.plan
    requests = bench.requests([*bench.names[:ROWS]], plan.vllm_tokens)
    tokens = ROWS * plan.vllm_tokens

    def beside_inprocess(name: str, turns: int, elsewhere: bool) -> Turns:
        sides = [
            Side(name, bench.inprocess, lambda each: each.over_http(requests, elsewhere), tokens),
            Side(
                INPROCESS,
                lambda: bench.inprocess(twin=True),
                lambda each: each.run(requests),
                tokens,
            ),
        ]
        return take_turns(sides, turns, crossed=True)

    streamed = beside_inprocess(STREAMED, plan.http_turns, elsewhere=True)
    near = beside_inprocess(NEAR, 2, elsewhere=False)
    return report(streamed, near) | {
        "ratios": {
            "streaming_over_in_process": streamed.ratio(STREAMED, INPROCESS),
            "near_over_in_process": near.ratio(NEAR, INPROCESS),
        },
        "rows": ROWS,
        "tokens": plan.vllm_tokens,
    }


def measure_generator(bench: Bench) -> dict[str, Any]:
    """`vllm bench serve`, as it is, in a closed loop: base, then an adapter for each request."""
    server = bench.server()
    folder = peers.vllm_folder()
    found = {}
    for name, flags in {
        "base": [],
        "32 adapters": ["--lora-modules", *bench.names[:ROWS]],
    }.items():
        result = bench.scratch / "generator.json"
        command = [
            *(folder / "bin" / "python", "-c", peers.VLLM_BENCH_SERVE),
            *("--backend", "openai", "--base-url", server.url, "--model", "base"),
            *("--tokenizer", bench.model, "--dataset-name", "random", "--ignore-eos"),
            *("--random-input-len", bench.plan.tokens, "--random-output-len", bench.plan.tokens),
            *("--num-prompts", 2 * ROWS, "--max-concurrency", ROWS, "--temperature", 0),
            *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,95,99"),
            *("--disable-tqdm", "--save-result", "--result-filename", result),
            *flags,
        ]
        try:
            run = subprocess.run(
                [str(part) for part in command],
                env=os.environ | peers.vllm_environment(folder),
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"failed": {"vllm bench serve": str(error)}}
        if run.returncode != 0:
            return {"failed": {"vllm bench serve": run.stderr.strip()[-300:]}}
        told = json.loads(result.read_text())
        found[name] = {key: told[key] for key in _KEPT if key in told}
    return {"tool": f"vllm bench serve ({peers.VLLM})", "runs": found, "failed": {}}
