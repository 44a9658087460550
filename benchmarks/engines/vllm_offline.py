"""vLLM's `LLM`, run by the Python of an environment with vLLM: as it is, with its LoRA, or with our
workers and IA3 adapters."""

import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

from benchmarks.engines import Answer, Request, Round
from benchmarks.engines.lines import Run, serve

Folders = dict[str, str]
"""Of adapters, by name."""


def make(model: str, dtype: str, rows: int, window: int, adapters: Folders, ia3: Folders) -> Run:
    """`adapters`: LoRA adapters; with any, vLLM's LoRA is on. `ia3`: IA3 adapters; with any, our
    workers run, and each has a slot."""
    lora = {
        "enable_lora": True,
        "max_loras": len(adapters),
        "max_lora_rank": 8,
    }
    workers, fill = _rescaling(model, ia3) if ia3 else ({}, None)
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=window,
        max_num_seqs=rows,
        enable_prefix_caching=False,
        seed=0,
        **(lora if adapters else {}),
        **workers,
    )
    if fill is not None:
        fill(llm)
    slots = {name: number for number, name in enumerate(ia3, start=1)}
    of = {
        name: LoRARequest(name, number, str(Path(folder)))
        for number, (name, folder) in enumerate(adapters.items(), start=1)
    }

    def run(requests: list[Request], in_flight: int | None) -> Round:
        assert in_flight in (None, rows) or len(requests) <= rows
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=each.tokens_out,
                ignore_eos=True,
                extra_args={"ia3_slot": slots[each.adapter]} if each.adapter in slots else None,
            )
            for each in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=each.prompt) for each in requests]
        chosen = [None if each.adapter is None else of.get(each.adapter) for each in requests]
        began = time.perf_counter()
        results = llm.generate(
            prompts, params, use_tqdm=False, lora_request=chosen if adapters else None
        )
        seconds = time.perf_counter() - began
        answers = [Answer(each.outputs[0].text, 0.0, seconds) for each in results]
        return Round(began, seconds, answers)

    return run


def _rescaling(model: str, ia3: Folders) -> tuple[dict[str, Any], Any]:
    """The arguments of an engine with our workers, and what fills their slots."""
    # Only here: a peer's environment has vLLM, and not all that this imports.
    from infuse.adapters.checkpoint.checkpoint import effective_vectors, read_checkpoint
    from infuse.server.engine.vllm.llm import Slots, worker_arguments
    from infuse.server.engine.vllm.loading import describe_base
    from infuse.server.engine.vllm.targets import planned_targets

    base = describe_base(model)
    checkpoints = [read_checkpoint(Path(folder)) for folder in ia3.values()]
    known = [checkpoint.config for checkpoint in checkpoints]
    slots = Slots(planned_targets(base.modules, "", known), len(ia3))

    def fill(llm: LLM) -> None:
        for slot, checkpoint in enumerate(checkpoints, start=1):
            vectors = effective_vectors(checkpoint, base.modules)
            llm.collective_rpc("ia3_fill", args=(slot, slots.packed(vectors)))

    return worker_arguments(base.modules, slots), fill


if __name__ == "__main__":
    serve(make)
