"""What a user of PEFT does: one model, `set_adapter` and `generate` for one request at a time."""

import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines import Answer, Request, Round
from benchmarks.engines.lines import Run, serve


def make(model: str, dtype: str, adapters: dict[str, str]) -> Run:
    """`adapters`: folders by name."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    # Go on past end tokens, as every engine here does; min_new_tokens would ban them.
    base.generation_config.eos_token_id = None
    (first, folder), *others = adapters.items()
    tuned = PeftModel.from_pretrained(base, folder, first)
    for name, folder in others:
        tuned.load_adapter(folder, name)
    tuned.eval()

    @torch.inference_mode()
    def run(requests: list[Request], _: int | None) -> Round:
        began = time.perf_counter()
        answers = []
        for each in requests:
            tuned.set_adapter(each.adapter)
            ids = torch.tensor([each.prompt])
            out = tuned.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=each.tokens_out,
                do_sample=False,
            )
            text = tokenizer.decode(out[0, len(each.prompt) :], skip_special_tokens=True)
            answers.append(Answer(text, 0.0, time.perf_counter() - began))
        return Round(began, time.perf_counter() - began, answers)

    return run


if __name__ == "__main__":
    serve(make)
