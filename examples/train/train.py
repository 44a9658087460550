"""Trains the example adapters: `python -m examples.train.train [TASK ...]` (all without one)."""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from examples.train.card import Measured, score_adapter, score_base, write_card
from examples.train.model import Base, answer_ids, answers, prompt_ids
from examples.train.tasks import TASKS, Example, Recipe, Split, Task
from infuse.server.engine.model_files import DEFAULT_MODEL

ADAPTERS = Path(__file__).parents[1] / "adapters"
EXPECTED = ADAPTERS / "expected.json"
IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default: 0)")
    parser.add_argument("--heldout", type=int, default=120, help="held-out examples (default: 120)")
    arguments = parser.parse_args()
    unknown = set(arguments.tasks) - set(TASKS)
    if unknown:
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    for name in arguments.tasks or TASKS:
        make_adapter(TASKS[name], arguments.seed, arguments.heldout)


def make_adapter(task: Task, seed: int, heldout: int) -> None:
    """Trains one adapter, scores it beside the base, and writes its folder and card."""
    folder = ADAPTERS / task.name
    base = Base.load()
    examples = task.generate(Split.TRAIN, task.recipe.steps * task.recipe.batch, seed)
    test = task.generate(Split.HELDOUT, heldout, seed)
    base_scores = score_base(task, base, test)
    torch.manual_seed(seed)
    model = get_peft_model(base.model, task.recipe.config)
    started = time.monotonic()
    tokens = train(model, base.tokenizer, examples, task.recipe)
    seconds = time.monotonic() - started
    save(model, folder)
    measured = Measured(
        base=base_scores,
        adapter=score_adapter(task, model, base.tokenizer, test),
        examples=len(examples),
        tokens=tokens,
        seconds=seconds,
        vectors=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seed=seed,
    )
    write_card(task, measured, folder)
    write_expected(task, model, base.tokenizer)


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], recipe: Recipe
) -> int:
    """One pass over the examples with AdamW and a cosine decay; returns the tokens seen."""
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(vectors, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, recipe.steps)
    )
    tokens = 0
    started = time.monotonic()
    for step, (ids, mask, wanted) in enumerate(batches(tokenizer, examples, recipe.batch)):
        loss = answer_loss(model, ids, mask, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vectors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += int(mask.sum())
        if step % 10 == 9:
            speed = tokens / (time.monotonic() - started)
            print(
                f"step {step + 1}/{recipe.steps}  loss {loss.item():.3f}  {speed:.0f} tokens/s",
                flush=True,
            )
    return tokens


def learning_rate_share(step: int, steps: int, warmup: int = 5) -> float:
    """A short linear warmup, then a cosine from 1 down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def answer_loss(model: PeftModel, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross entropy of the answer tokens.

    `ids`, `mask` and `wanted` are [rows, length]; `wanted` is IGNORED outside answers. The output
    embedding is the largest matrix by far, so it runs on the answer positions only.
    """
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    answered = wanted[:, 1:] != IGNORED
    logits = causal.lm_head(hidden[:, :-1][answered])
    return cross_entropy(logits, wanted[:, 1:][answered])


def batches(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], size: int, window: int = 8
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, mask, wanted) [rows, length]; rows of like length share a batch, to pad little.

    Rows are sorted by length within windows of `window` batches, and a window's batches come in
    random order.
    """
    rows = [
        (prompt_ids(tokenizer, example.prompt), answer_ids(tokenizer, example.answer))
        for example in examples
    ]
    for start in range(0, len(rows), size * window):
        near = sorted(rows[start : start + size * window], key=lambda row: sum(map(len, row)))
        for at in torch.randperm(math.ceil(len(near) / size)).tolist():
            yield pad(near[at * size : (at + 1) * size])


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        mask[row, :end] = 1
        wanted[row, len(prompt) : end] = torch.tensor(answer)
    return ids, mask, wanted


def save(model: PeftModel, folder: Path) -> None:
    """Writes the two files; the base is named neutrally, not by a path of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = DEFAULT_MODEL
    model.save_pretrained(folder)


def write_expected(task: Task, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keeps PEFT's greedy answers to the shown prompts for the server's end-to-end test."""
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    expected[task.name] = [
        {
            "messages": [{"role": "user", "content": prompt}],
            "answer": answers(model, tokenizer, [prompt], max_new_tokens=64)[0],
        }
        for prompt in task.shown
    ]
    EXPECTED.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
