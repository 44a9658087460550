"""What need not be computed again: a prompt's beginning, and answers that copy from the prompt."""

import math
from pathlib import Path
from statistics import median
from typing import Any

import typer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.bench import Bench
from benchmarks.engines import Request, Round
from benchmarks.engines.infuse_http import InfuseHttp
from benchmarks.turns import Side, ratio_of, report, take_turns
from benchmarks.workload import random_prompts

SHARED_TOKENS = 1000
OWN_TOKENS = 16
"""What follows the shared prompt, another in each request."""
LICENSE = Path(__file__).parents[2] / "LICENSE"
COPIES = 4
"""Paragraphs that are copied, one at a time and all at once."""
COPIED_TOKENS = 96


def measure_prefix(bench: Bench) -> dict[str, Any]:
    """Alternately a prompt whose first 1,000 tokens were never seen, and one that shares them."""
    server = bench.server("infuse-prefix", "--prefix-cache", plain=False)
    seconds: dict[str, list[float]] = {"miss": [], "hit": []}
    for turn in range(bench.plan.repeats):
        shared = random_prompts(bench.model, 1, SHARED_TOKENS, seed=100 + turn)[0]
        for kind, seed in (("miss", 2 * turn), ("hit", 2 * turn + 1)):
            own = random_prompts(bench.model, 1, OWN_TOKENS, seed=10_000 + seed)[0]
            answer = server.run([Request(shared + own, 2)]).answers[0]
            assert answer.first is not None
            seconds[kind].append(answer.first - answer.arrived)
    typer.echo(f"  miss {median(seconds['miss']):.3f} s, hit {median(seconds['hit']):.3f} s")
    pairs = [hit / miss for hit, miss in zip(seconds["hit"], seconds["miss"], strict=True)]
    return {
        "shared_tokens": SHARED_TOKENS,
        "own_tokens": OWN_TOKENS,
        "ttft_seconds": seconds,
        "ratios": {"hit_over_miss": ratio_of(pairs)},
        "failed": {},
    }


def measure_speculation(bench: Bench) -> dict[str, Any]:
    """Copies of paragraphs of the LICENSE, and stories, which copy nothing: with prompt lookup and
    without, on the same server."""
    copies, stories = copy_prompts(bench), story_prompts(bench)
    sides, texts = [], {}

    def side(name: str, requests: list[Request], speculate: bool) -> Side:
        def ask(server: InfuseHttp) -> Round:
            found = server.run(requests, speculation=speculate)
            texts[name] = [each.text for each in found.answers]
            return found

        turns = None if len(requests) == 1 else math.ceil(bench.plan.repeats / 3)
        return Side(name, bench.server, ask, len(requests) * COPIED_TOKENS, turns)

    pairs = {}
    for ratio, what, prompts in (
        ("lookup_over_plain_at_1", "1 copy", copies[:1]),
        (f"lookup_over_plain_at_{COPIES}", f"{COPIES} copies", copies),
        ("lookup_over_plain_of_stories", f"{COPIES} stories", stories),
    ):
        requests = [Request(prompt, COPIED_TOKENS) for prompt in prompts]
        pairs[ratio] = (f"{what}, with prompt lookup", f"{what}, without")
        sides += [
            side(name, requests, speculate)
            for name, speculate in zip(pairs[ratio], (True, False), strict=True)
        ]
    sides[0].ask(bench.server())  # What a guess costs is learnt while it runs.
    turns = take_turns(sides, bench.plan.repeats)
    return report(turns) | {
        "ratios": {ratio: turns.ratio(*pair) for ratio, pair in pairs.items()},
        "copied_tokens": COPIED_TOKENS,
        "same_texts": all(texts[guessed] == texts[plain] for guessed, plain in pairs.values()),
    }


def copy_prompts(bench: Bench) -> list[list[int]]:
    """A paragraph, and the order to write it again."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    paragraphs = LICENSE.read_text().split("\n\n")
    long_ones = [each for each in paragraphs if len(tokenizer(each).input_ids) > COPIED_TOKENS + 20]
    assert len(long_ones) >= COPIES, "the LICENSE has become short"
    texts = [f"Copy this text, word for word:\n\n{each}" for each in long_ones[:COPIES]]
    return [_as_chat(tokenizer, text) for text in texts]


def story_prompts(bench: Bench) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    heroes = ("dragon", "fisherman", "robot", "princess", "baker", "cat", "pilot", "giant")
    return [_as_chat(tokenizer, f"Tell me a story about a {hero}.") for hero in heroes[:COPIES]]


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return ids
