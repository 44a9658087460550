"""PEFT on a model of any family, decoder-only or encoder-decoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.adapters.oracle import with_peft


class FamilyOracle:
    """A model with adapters put on by PEFT: one sequence at a time, and no cache."""

    def __init__(
        self,
        base: PreTrainedModel,
        adapters: Sequence[Path] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Grouped matrix products do not know float64.
        base.set_experts_implementation("eager")
        self._model: torch.nn.Module = with_peft(base, *adapters).to(dtype)
        crosses = base.config.is_encoder_decoder
        self._start = base.config.decoder_start_token_id if crosses else None

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """`[answer, vocab]`: what each token of the answer is chosen from."""
        if self._start is None:
            given = {"input_ids": torch.tensor([prompt + answer[:-1]])}
        else:
            given = {"input_ids": torch.tensor([prompt])}
            given["decoder_input_ids"] = torch.tensor([[self._start, *answer[:-1]]])
        logits: torch.Tensor = self._model(**given, use_cache=False).logits[0, -len(answer) :]
        return logits.double().log_softmax(-1)
