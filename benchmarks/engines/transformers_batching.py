"""transformers' continuous batching, its manager kept between rounds as a server would keep it."""

import time

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from benchmarks.engines import Answer, Request, Round
from benchmarks.engines.lines import Run, serve


def make(model: str, dtype: str, rows: int, tokens: int) -> Run:
    """A cache for `rows` rows, and steps of at most `tokens`: by default both take most of the
    memory, and what is computed over all of it takes twice as long."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    base.eval()
    batching = ContinuousBatchingConfig(
        num_blocks=rows, max_batch_tokens=tokens, allow_block_sharing=False
    )

    def run(requests: list[Request], _: int | None) -> Round:
        # An end token that no model has: go on past end tokens, as every engine here does.
        config = GenerationConfig(
            max_new_tokens=requests[0].tokens_out,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        began = time.perf_counter()
        results = base.generate_batch(
            [each.prompt for each in requests],
            generation_config=config,
            continuous_batching_config=batching,
            persistent_manager=True,
        )
        tokens = [each.generated_tokens for each in results.values()]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        seconds = time.perf_counter() - began
        wrong = [len(each) for each in tokens if len(each) != requests[0].tokens_out]
        if wrong or len(tokens) != len(requests):
            raise RuntimeError(f"{len(tokens)} answers of {len(requests)}, of lengths {wrong}")
        return Round(began, seconds, [Answer(text, 0.0, seconds) for text in texts])

    return run


if __name__ == "__main__":
    serve(make)
