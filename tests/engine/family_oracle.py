"""PEFT on a model of any family, decoder-only or encoder-decoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from infuse.server.engine import FinishReason, TokenLogprob
from tests.adapters.oracle import with_peft
from tests.driver import Driver


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

    def assert_answered(self, engine: Driver, asked: Mapping[str, list[int]]) -> None:
        """The answers to these prompts, by request id, are whole and PEFT's greedy ones."""
        for request_id, prompt in asked.items():
            answer = engine.answers[request_id]
            assert answer.finish is FinishReason.LENGTH
            wanted = self.logprobs(prompt, answer.tokens).argmax(-1).tolist()
            assert answer.tokens == wanted, prompt

    def assert_scored(
        self, prompt: list[int], scored: Sequence[TokenLogprob | None] | None
    ) -> None:
        """The prompt's tokens have PEFT's log-probabilities; the first one has none."""
        assert scored is not None
        assert scored[0] is None
        wanted = self.logprobs(prompt[:1], prompt[1:])
        for position, token in enumerate(scored[1:]):
            assert token is not None
            expected = wanted[position, prompt[position + 1]].item()
            assert token.logprob == pytest.approx(expected, abs=1e-4)
