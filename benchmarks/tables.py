"""docs/performance.md as text, from the JSON and nothing else."""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.plots import pictures_of
from benchmarks.targets import Results, Verdict, verdicts

_INTRODUCTION = """\
# Performance

Written by `python -m benchmarks.report` from `benchmarks/results/`; do not edit. `make bench`
measures again (three quarters of an hour on two cores, after a first run that installs vLLM and
registers 10,000 adapters), `make bench-quick` tries adapters, vLLM and load in minutes.

All engines of a section run on one machine in one run, each in a process of its own, and answer the
same prompts in turns, in changing order. The rounds of a turn go on in slices of a tenth of a
second, all engines but one being stopped, and only the time in which an engine ran counts
([decision 25](decisions/0025-slices-of-time.md)); adapters and base take each other's server from
turn to turn. What two sides gave in one turn is a pair. "Measured on" says which commit a section
is of. So a ratio means something, and a speed by itself little. Model: SmolLM2-135M-Instruct in
float32, greedy, end tokens passed over, random prompts; IA3 on keys, values and `down_proj` (PEFT's
default), LoRA of rank 8 on the same modules. Infuse runs with `--compile`, as vLLM compiles by
default. Prefix caches and prompt lookup are off except where they are what is measured."""

_JUDGED = """\
A target is reached where the 95% bound of the median that makes it harder keeps the limit: the
lower bound for "at least", the upper one for "at most" (order statistics, no assumption on the
distribution; with fewer than 5 pairs, or one measurement, the figure itself). Continuous batching
in transformers has a cache of the size that the batch needs: by default it takes most of the
memory, and was half as fast. It falls behind with the length of the answers: with 32 + 32 tokens
Infuse was 3.3 times as fast (2 pairs, measured once, with AVX2). Where there is AVX512, torch's own
products come nearer to what the processor can, and so do all peers."""

_ELSEWHERE = """\
Before b4c019e two turns in which two sides had each other's server were one pair."""

_TITLES = {
    "adapters": "Adapters beside the base",
    "peers": "Against vLLM on the CPU, and transformers",
    "bfloat16": "Against vLLM in bfloat16",
    "on-vllm": "Our adapters on vLLM",
    "http": "Over HTTP, and without",
    "load": "Waiting, by load",
    "generator": "Under a public load generator",
    "prefix": "A prompt's beginning that was seen before",
    "speculation": "Prompt lookup on a copying task",
    "long-prompt": "Short prompts beside one as long as the window",
    "memory": "Memory, by adapters in use",
    "replicas": "Several servers on one store",
}


def page(results: Results, elsewhere: Sequence[Results] = ()) -> str:
    """`elsewhere`: what was measured on other processors."""
    parts = [_INTRODUCTION, "## Targets", _JUDGED, targets(verdicts(results))]
    if "profile" in results:
        parts += ["## Where a step's time goes", profile(results["profile"])]
    for name, title in _TITLES.items():
        if name in results:
            parts += [f"## {title}", *section(name, results[name])]
            parts += [f"![{title}](performance/{file}.svg)" for file in pictures_of(name, results)]
    parts += ["## Measured on", stamps(results)]
    for others in elsewhere:
        parts += ["## On another processor", _ELSEWHERE, targets(verdicts(others)), stamps(others)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets(found: Sequence[Verdict]) -> str:
    return table(
        ["", "target", "median", "95% bound", "pairs", "reached"],
        [
            [
                f"{each.target.number}. {each.target.what}",
                f"{'≥' if each.target.direction == 'at least' else '≤'} {each.target.limit:g}",
                "–" if each.median is None else f"{each.median:.3f}",
                "–" if each.judged is None or each.pairs < 5 else f"{each.judged:.3f}",
                str(each.pairs or "–"),
                {None: each.reason, True: "yes", False: "**no**"}[each.reached],
            ]
            for each in found
        ],
    )


def section(name: str, found: dict[str, Any]) -> list[str]:
    """Whatever a section has: the paragraphs of it."""
    parts = []
    if "skipped" in found:
        parts.append(f"Not measured: {found['skipped']}.")
    if found.get("tokens_per_second"):
        parts.append(speeds(found["tokens_per_second"]))
    if "tokens" in found:
        parts.append(f"Prompts of {found['tokens']} tokens, and as many generated.")
    special = _SPECIAL.get(name)
    if special is not None and not (found.get("failed") and "ratios" not in found):
        parts += special(found)
    parts += [f"Failed: {who}: {why}" for who, why in found.get("failed", {}).items()]
    return parts


def speeds(found: dict[str, Any]) -> str:
    return table(
        ["", "tokens/s, median", "quartiles", "rounds"],
        [
            [
                name,
                f"{each['median']:.1f}",
                f"{each['lower_quartile']:.1f} to {each['upper_quartile']:.1f}",
                str(len(each["rounds"])),
            ]
            for name, each in found.items()
        ],
    )


def bfloat16(found: dict[str, Any]) -> list[str]:
    """The ratios, which no target is about."""
    ratios = found.get("ratios", {})
    medians = [
        f"{ratio['median']:.2f} with {name.rpartition('_')[2]}" for name, ratio in ratios.items()
    ]
    return [f"Infuse over vLLM: {', '.join(medians)} in flight (medians)."] if medians else []


def prefix(found: dict[str, Any]) -> list[str]:
    middle = {kind: 1e3 * median(each) for kind, each in found["ttft_seconds"].items()}
    return [
        f"{found['shared_tokens']} tokens in common, {found['own_tokens']} of each request's own: "
        f"first token after {middle['miss']:.0f} ms on a miss, {middle['hit']:.0f} ms on a hit "
        "(medians)."
    ]


def http(found: dict[str, Any]) -> list[str]:
    names = {
        "streaming_over_in_process": "streaming",
        "near_over_in_process": "with each token read",
    }
    told = ", ".join(
        f"{name} {ratio['median']:.3f}"
        for key, name in names.items()
        if (ratio := found["ratios"].get(key)) is not None
    )
    return [
        "Two servers that answer over HTTP and past it, in every second turn the other way round. "
        "The client leaves what is streamed with the kernel until there is much of it or the "
        "answer ends, as if it computed on another machine; in one pair it reads each token. "
        f"Over in process: {told} (medians)."
    ]


def on_vllm(found: dict[str, Any]) -> list[str]:
    return [
        "Beside vLLM, a pair is the geometric mean of two turns, in which each side had both "
        "places and both processes. Beside LoRA with half as many tokens. While slots are filled: "
        "milliseconds between the tokens of requests that run, and until the token of those that "
        "come, each for an adapter that has no slot yet, or all for one that has.",
        waits(found["waits"]),
        "All processes of an engine, from the command to the first answer, and once it has been "
        "measured:",
        table(
            ["", "start, seconds", "resident, MB"],
            [
                [name, f"{each['start_seconds']:.0f}", f"{each['resident_bytes'] / 1e6:.0f}"]
                for name, each in found["engines"].items()
            ],
        ),
    ]


def speculation(found: dict[str, Any]) -> list[str]:
    same = "the same" if found["same_texts"] else "NOT the same"
    return [
        f"{found['copied_tokens']} tokens: paragraphs of the LICENSE, to be copied, and stories, "
        f"which copy nothing. With and without, the texts are {same}."
    ]


def load(found: dict[str, Any]) -> list[str]:
    rate = found["saturation_requests_per_second"]
    return [
        f"Saturation in a closed loop of 32: {rate:.2f} requests/s. Poisson arrivals at parts of "
        "it, each request with an adapter drawn by Zipf from all registered ones, over HTTP; "
        "milliseconds.",
        waits({f"{float(part):.0%}": each for part, each in found["loads"].items()}),
    ]


def long_prompt(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['short_prompts']} prompts come 50 ms after one that fills the window "
        f"of {found['window']} tokens. Milliseconds that the short ones wait, where prompts are "
        "computed in chunks (the default) and at once:",
        waits(found["waits"]),
        "And the long one:",
        waits(found["long_waits"]),
    ]


def waits(found: dict[str, Any]) -> str:
    percents = ("p50", "p95", "p99")
    return table(
        ["", "requests", *(f"TTFT {p}" for p in percents), *(f"TPOT {p}" for p in percents)],
        [
            [
                name,
                str(each["requests"]),
                *(f"{each[key][p]:.0f}" for key in ("ttft_ms", "tpot_ms") for p in percents),
            ]
            for name, each in found.items()
        ],
    )


def generator(found: dict[str, Any]) -> list[str]:
    runs = found["runs"]
    keys = list(next(iter(runs.values())))
    rows = [[key, *(f"{run[key]:.4g}" for run in runs.values())] for key in keys]
    return [f"`{found['tool']}`, unmodified, in a closed loop:", table(["", *runs], rows)]


def memory(found: dict[str, Any]) -> list[str]:
    parts = [name for name in found["in_use"][0] if name != "adapters"]
    return [
        f"{found['registered']} adapters are registered, and the server has slots for as many as "
        "are in use in the last row. MB; `resident` is what the process holds, the plan's parts "
        "are what it set aside.",
        table(
            ["in use", *parts],
            [
                [str(each["adapters"]), *(f"{each[part] / 1e6:.0f}" for part in parts)]
                for each in found["in_use"]
            ],
        ),
    ]


def replicas(found: dict[str, Any]) -> list[str]:
    named = {"plain_over_one": "Plain ones over one", "ray_over_plain": "Ray over plain ones"}
    told = ", ".join(
        f"{name} {ratio['median']:.3f}"
        for key, name in named.items()
        if (ratio := found["ratios"].get(key)) is not None
    )
    return [
        f"{found['servers']} servers, each with an even share of the machine's threads, asked in "
        f"turn; and as replicas of `infuse deploy`, whose proxy and Ray's own processes run on the "
        f"same cores. Sides take turns without slices: a side has many processes. {told} (medians)."
    ]


_SPECIAL: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "bfloat16": bfloat16,
    "on-vllm": on_vllm,
    "http": http,
    "prefix": prefix,
    "speculation": speculation,
    "load": load,
    "long-prompt": long_prompt,
    "generator": generator,
    "memory": memory,
    "replicas": replicas,
}

_OUTSIDE = ("sampling", "cache", "python", "waiting")
"""Parts of a step that are not the model's forward."""


def with_share(found: dict[str, Any]) -> dict[str, Any]:
    """The profile's steps, by name, with the ratio that a target is about: of the last one."""
    steps = {name: each for name, each in found.items() if "parts_ms" in each}
    parts = list(steps.values())[-1]["parts_ms"]
    share = sum(parts.get(part, 0.0) for part in _OUTSIDE) / sum(parts.values())
    return {"steps": steps, "ratios": {"outside": {"median": share, "pairs": 1}}}


def profile(found: dict[str, Any]) -> str:
    steps = found["steps"]
    names = list(dict.fromkeys(part for each in steps.values() for part in each["parts_ms"]))
    rows = [
        [part, *(f"{each['parts_ms'].get(part, 0.0):.1f}" for each in steps.values())]
        for part in names
    ]
    sums = [f"{sum(each['parts_ms'].values()):.1f}" for each in steps.values()]
    measured = [f"{each['step_ms']:.1f}" for each in steps.values()]
    head = ["milliseconds", *(f"{name}, {each['rows']} rows" for name, each in steps.items())]
    told = (
        "\n\nProducts by our own kernel have the adapters' vectors and the feed-forward's "
        "activation in them: both count as gemm there."
    )
    return table(head, [*rows, ["sum", *sums], ["the step, measured", *measured]]) + told


def stamps(results: Results) -> str:
    """One line for each section: a run may be of some only."""
    return table(
        ["section", "processor", "cores", "vector", "torch", "vLLM", "commit", "date", "took"],
        [
            [
                name,
                stamp["cpu"],
                str(stamp["cores"]),
                " ".join(stamp["vector"]),
                stamp["torch"],
                stamp["vllm"],
                stamp["commit"][:9] + ("+" if stamp["uncommitted_changes"] else ""),
                stamp["date"][:16],
                f"{results[name]['took_seconds']:.0f} s",
            ]
            for name in _TITLES
            if name in results and (stamp := results[name]["machine"])
        ],
    )
