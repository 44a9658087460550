"""The base model as the example adapters see it: the served weights, prompts, greedy answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from infuse.server.engine.model_files import default_model_folder


@dataclass(frozen=True)
class Base:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls) -> "Base":
        """The server's default model in float32, expanded from its 4-bit (GGUF Q4_1) weights."""
        folder = default_model_folder()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval(), tokenizer)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, user: str) -> list[int]:
    """What `/v1/chat/completions` feeds the model for one user message: the template, no more."""
    messages = [{"role": "user", "content": user}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return list(encoded["input_ids"])


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The answer's tokens and the end of the assistant's turn."""
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int = 24,
) -> list[str]:
    """The greedy answer to each prompt, in order; `model` may be a PeftModel."""
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    found = [""] * len(rows)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        padded = tokenizer.pad({"input_ids": [rows[at] for at in chosen]}, return_tensors="pt")
        produced: Tensor = model.generate(**padded, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(
            produced[:, padded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for at, text in zip(chosen, texts, strict=True):
            found[at] = text
    return found
