"""transformers' `generate` on one static batch of prompts of one length: nothing is padded."""

import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines import Answer, Request, Round
from benchmarks.engines.lines import Run, serve


def make(model: str, dtype: str) -> Run:
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = tokenizer.pad_token_id or 0
    base.eval()

    @torch.inference_mode()
    def run(requests: list[Request], _: int | None) -> Round:
        began = time.perf_counter()
        ids = torch.tensor([each.prompt for each in requests])
        out = base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=requests[0].tokens_out,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        seconds = time.perf_counter() - began
        return Round(began, seconds, [Answer(text, 0.0, seconds) for text in texts])

    return run


if __name__ == "__main__":
    serve(make)
