"""What a user of PEFT does: one model, `set_adapter` and `generate` for one request at a time."""

import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.infuse import Round
from benchmarks.workload import Workload


class PeftSwap:
    def __init__(self, workload: Workload, model: Path) -> None:
        self._workload = workload
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        # Go on past end tokens, as the server does with ignore_eos; min_new_tokens would ban them.
        base.generation_config.eos_token_id = None
        first, *others = workload.adapters
        self._model = PeftModel.from_pretrained(base, workload.adapters_folder / first, first)
        for name in others:
            self._model.load_adapter(workload.adapters_folder / name, name)
        self._model.eval()

    @torch.inference_mode()
    def run(self) -> Round:
        tokens_out = self._workload.tokens_out
        texts = []
        started = time.perf_counter()
        for name, prompt in zip(self._workload.adapters, self._workload.prompts, strict=True):
            self._model.set_adapter(name)
            ids = torch.tensor([prompt])
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens_out,
                do_sample=False,
            )
            texts.append(self._tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
        return Round(time.perf_counter() - started, texts)
