"""vLLM's `LLM`, run by the Python of vLLM's own environment."""

import time
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

from benchmarks.engines import Answer, Request, Round
from benchmarks.engines.lines import Run, serve


def make(model: str, dtype: str, rows: int, window: int, adapters: dict[str, str]) -> Run:
    """`adapters`: LoRA folders by name; with any, vLLM's LoRA is on."""
    lora = {
        "enable_lora": True,
        "max_loras": len(adapters),
        "max_lora_rank": 8,
    }
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=window,
        max_num_seqs=rows,
        enable_prefix_caching=False,
        seed=0,
        **(lora if adapters else {}),
    )
    of = {
        name: LoRARequest(name, number, str(Path(folder)))
        for number, (name, folder) in enumerate(adapters.items(), start=1)
    }

    def run(requests: list[Request], in_flight: int | None) -> Round:
        assert in_flight in (None, rows) or len(requests) <= rows
        params = [
            SamplingParams(temperature=0, max_tokens=each.tokens_out, ignore_eos=True)
            for each in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=each.prompt) for each in requests]
        chosen = [None if each.adapter is None else of[each.adapter] for each in requests]
        began = time.perf_counter()
        results = llm.generate(
            prompts, params, use_tqdm=False, lora_request=chosen if adapters else None
        )
        seconds = time.perf_counter() - began
        answers = [Answer(each.outputs[0].text, 0.0, seconds) for each in results]
        return Round(began, seconds, answers)

    return run


if __name__ == "__main__":
    serve(make)
