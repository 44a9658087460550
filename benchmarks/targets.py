"""What Infuse set out to reach, and what the figures say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Results = Mapping[str, Any]
"""Sections by name, as the JSON has them."""


@dataclass(frozen=True, slots=True)
class Target:
    """A limit that a ratio must keep, by the bound of its median that makes it harder."""

    number: int
    """Of the list that it belongs to."""
    what: str
    section: str
    ratio: str
    limit: float
    direction: Literal["at least", "at most"] = "at least"


@dataclass(frozen=True, slots=True)
class Verdict:
    target: Target
    median: float | None
    """None where nothing was measured."""
    judged: float | None
    """What is held against the limit: the 95% bound, or where there is one measurement only, it."""
    pairs: int = 0
    reason: str = ""
    """Why there is none."""

    @property
    def reached(self) -> bool | None:
        if self.judged is None:
            return None
        if self.target.direction == "at least":
            return self.judged >= self.target.limit
        return self.judged <= self.target.limit


TARGETS = (
    Target(1, "32 rows, 32 adapters / 32 rows, base", "adapters", "adapters_over_base", 0.98),
    Target(1, "Zipf over 10,000 registered / base", "adapters", "many_over_base", 0.95),
    Target(
        1,
        "base rows with adapters in the batch / alone (no slower, within 2%)",
        "adapters",
        "base_beside_adapters_over_alone",
        0.98,
    ),
    Target(2, "base / vLLM, 32 in flight", "peers", "base_over_vllm_at_32", 1.15),
    Target(2, "base / vLLM, 16 in flight", "peers", "base_over_vllm_at_16", 1.15),
    Target(2, "base / vLLM, one in flight", "peers", "base_over_vllm_at_1", 1.0),
    Target(2, "32 adapters / vLLM's LoRA with 8", "peers", "adapters_over_lora", 2.0),
    Target(3, "base / transformers continuous batching", "peers", "base_over_batching", 4.0),
    Target(3, "base / transformers generate, static batch", "peers", "base_over_generate", 2.0),
    Target(3, "32 adapters / PEFT swapping them", "adapters", "adapters_over_peft", 12.0),
    Target(4, "HTTP with streaming / in process", "http", "streaming_over_in_process", 0.95),
    Target(
        4,
        "TTFT at half of the saturation, p99 / p50",
        "load",
        "ttft_p99_over_p50_at_half_load",
        3.0,
        "at most",
    ),
    Target(
        4, "not the model's forward, of a step at 32 rows", "profile", "outside", 0.05, "at most"
    ),
    Target(
        5,
        "TTFT of a shared 1,000-token prompt, hit / miss",
        "prefix",
        "hit_over_miss",
        0.15,
        "at most",
    ),
    Target(
        5, "prompt lookup on a copying task / off", "speculation", "lookup_over_plain_at_1", 1.5
    ),
    Target(6, "on vLLM: 32 adapters / base", "on-vllm", "adapters_over_base_on_vllm", 0.98),
    Target(6, "on vLLM: base / vLLM without us", "on-vllm", "base_on_vllm_over_vllm", 0.99),
    Target(6, "on vLLM: 32 / its LoRA with 8", "on-vllm", "adapters_over_lora_on_vllm", 2.0),
    Target(
        6,
        "on vLLM: TPOT p99 beside slots that are filled / without",
        "on-vllm",
        "tpot_beside_fills_on_vllm",
        1.1,
        "at most",
    ),
)


def verdicts(results: Results) -> list[Verdict]:
    return [verdict(target, results) for target in TARGETS]


def verdict(target: Target, results: Results) -> Verdict:
    section = results.get(target.section)
    if section is None:
        return Verdict(target, None, None, reason="not measured")
    ratio = section.get("ratios", {}).get(target.ratio)
    if ratio is None:
        failed = section.get("failed", {}).values()
        return Verdict(target, None, None, reason=next(iter(failed), "not measured"))
    side = "lower" if target.direction == "at least" else "upper"
    bound = ratio.get(f"{side}_95_bound_of_median")
    judged = ratio["median"] if bound is None else bound
    return Verdict(target, ratio["median"], judged, ratio["pairs"])
