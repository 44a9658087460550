"""Trains an IA3 adapter for an encoder-decoder, such as T5, on pairs of texts.

Example:
    python -m examples.train.seq2seq --model google/flan-t5-small --data pairs.jsonl --output out

A line of the data is {"input": "…", "output": "…"}.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from examples.train.train import IGNORED, learning_rate_share


@dataclass(frozen=True)
class Pair:
    input: str
    output: str


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub id or folder of the base")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines")
    parser.add_argument("--output", required=True, type=Path, help="the adapter's folder")
    parser.add_argument("--steps", type=int, default=200, help="(default: 200)")
    parser.add_argument("--batch", type=int, default=16, help="pairs a step (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    given = parser.parse_args(arguments)
    pairs = [Pair(**json.loads(line)) for line in given.data.read_text().splitlines() if line]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForSeq2SeqLM.from_pretrained(given.model, dtype=torch.float32)
    # PEFT's default targets: for T5 the keys and values of all attention, crossing included.
    model = get_peft_model(base, IA3Config(task_type="SEQ_2_SEQ_LM"))
    torch.manual_seed(given.seed)
    train(model, draw(tokenizer, pairs, given.batch, given.steps), given.learning_rate, given.steps)
    model.save_pretrained(given.output)


def train(
    model: PeftModel, batches: Iterator[dict[str, Tensor]], learning_rate: float, steps: int
) -> None:
    """AdamW and a cosine decay, on the outputs' tokens."""
    model.train()
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(vectors, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps)
    )
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vectors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)


def draw(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], size: int, steps: int
) -> Iterator[dict[str, Tensor]]:
    """`steps` random batches; inputs and labels are `[size, length]`."""
    for _ in range(steps):
        chosen = [pairs[int(at)] for at in torch.randint(len(pairs), (size,))]
        inputs = [pair.input for pair in chosen]
        outputs = [pair.output for pair in chosen]
        batch = tokenizer(inputs, padding=True, truncation=True, return_tensors="pt")
        wanted = tokenizer(text_target=outputs, padding=True, truncation=True, return_tensors="pt")
        labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, IGNORED)
        yield {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }


if __name__ == "__main__":
    main()
