"""Checks at start-up that the engine computes the same logits as the plain model.

The plain model's logits of a few texts are computed before anything in the model is changed. When
the engine is set up, the same texts run through its runner and KV cache: rows of unequal length
together, prompts in chunks, decode steps, the base and an adapter side by side.
"""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.targets import Side, Target, resolve_targets
from infuse.adapters.errors import InvalidAdapter
from infuse.adapters.model.bank import BASE_SLOT
from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.storage.scratch import scratch_folder
from infuse.server.engine.native.cache.kv_cache import KVCache
from infuse.server.engine.native.forward.runner import Runner
from infuse.server.engine.native.model.packing import noting_reads
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step
from infuse.server.engine.request import GenerationRequest, SamplingParams

log = logging.getLogger(__name__)

_LENGTHS = (3, 19, 12)
"""Tokens of the short prompts, which are compared at all positions."""
_LONG = 40
"""The least number of tokens of the long prompt, which is compared at its last positions."""
_ANSWER = 4
"""Tokens that follow each prompt in decode steps."""
_WORK = {"cpu": 4e11, "cuda": 4e14}
"""The most that the long prompt may cost, in tokens times parameters: some seconds. A window that
would need more is not reached, and the log says so."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window_size")
"""The fields of a config that name an attention window."""
_PLAIN = (nn.Linear, Conv1D)
_ADAPTER_SLOT = 1
_ERROR = 1e-3
_ROUNDINGS = 16
"""How far logits may differ, as a share of the greatest (float32) or in roundings of other dtypes:
kernels sum in another order, and deep models amplify that (decision 33)."""


class Unfaithful(Exception):
    """A runner does not compute what the plain model does; the message says what differs."""


@dataclass(frozen=True)
class _Text:
    """A prompt and an answer, both fixed beforehand."""

    prompt: list[int]
    answer: list[int]
    slot: int
    scored: bool
    """Whether the prompt's own positions are compared too."""
    wanted: list[torch.Tensor] = field(default_factory=list)
    """The plain model's logits `[positions, vocab]`, once they are computed."""

    def __str__(self) -> str:
        whose = "an adapter" if self.slot else "the base"
        return f"{len(self.prompt)} tokens of {whose}"


class Fidelity:
    """Compares runners with the plain model. Made before anything in the model is changed."""

    def __init__(
        self,
        ia3: IA3Slots,
        tokenizer: PreTrainedTokenizerFast,
        decoder_start: tuple[int, ...] | None,
        *,
        max_model_len: int,
        max_rows: int,
        kept: Path | None = None,
    ) -> None:
        """`kept`: a file that says which ways of running an earlier start found to be equal. They
        are not compared again. The model's code may raise any exception."""
        self._ia3 = ia3
        self._tokenizer = tokenizer
        self._decoder_start = decoder_start
        self._max_rows = max_rows
        self._random = torch.Generator().manual_seed(0)
        self._vectors = self._random_vectors()
        self.windows = {w for w in windows_of(ia3.base) if w < max_model_len}
        self._kept = kept
        self._equal: list[str] = []
        """The ways of running that were compared and are equal."""
        self.read: set[str] = set()
        """The linear layers whose weights other code of the model reads."""
        self._is_known = self._find()
        if not self._is_known:
            self._texts = self._make_texts(max_model_len)
            with noting_reads(ia3.base) as self.read:
                self._take_wanted()

    def _random_vectors(self) -> dict[Target, torch.Tensor]:
        """Make an adapter on PEFT's default targets or, without any, on all linear layers."""
        modules = self._ia3.modules_of_base
        for config in (IA3Config(), IA3Config(target_modules="all-linear", feedforward_modules=[])):
            try:
                targets = resolve_targets(config, modules)
            except InvalidAdapter:
                continue
            # Subclasses of nn.Linear may return more than one tensor (phimoe's router).
            plain = [t for t in targets if type(self._ia3.base.get_submodule(t.module)) in _PLAIN]
            return {
                target: 0.75 + torch.rand(modules.size(target), generator=self._random) / 2
                for target in plain
            }
        return {}

    def _make_texts(self, max_model_len: int) -> list[_Text]:
        base = self._ia3.base
        parameters = sum(parameter.numel() for parameter in base.parameters())
        affordable = int(_WORK[base.device.type] / max(1, parameters))
        answer = min(_ANSWER, max_model_len - 1)
        longest = max([_LONG, *(window + window // 2 + _ANSWER for window in self.windows)])
        longest = min(longest, max(_LONG, affordable), max_model_len - answer)
        slots = [BASE_SLOT, _ADAPTER_SLOT if self._vectors else BASE_SLOT]
        texts = []
        for number, length in enumerate((*_LENGTHS, longest)):
            prompt = self._tokens(min(length, max_model_len - answer))
            scored = number < len(_LENGTHS) and self._decoder_start is None
            texts.append(_Text(prompt, self._tokens(answer), slots[number % 2], scored))
        self.unreached = sorted(window for window in self.windows if window >= longest)
        return texts

    def _tokens(self, count: int) -> list[int]:
        """Choose random tokens. Special tokens that the config names are left out: padding has no
        position in some models."""
        config = self._ia3.base.config.get_text_config()
        named: set[Any] = {v for k, v in vars(config).items() if k.endswith("_token_id") and v}
        named |= {0} if getattr(config, "pad_token_id", None) == 0 else set()
        found: list[int] = []
        while len(found) < count:
            [token] = torch.randint(0, config.vocab_size, (1,), generator=self._random).tolist()
            if token not in named:
                found.append(token)
        return found

    @torch.inference_mode()
    def _take_wanted(self) -> None:
        for text in self._texts:
            with _rescaled(self._ia3.base, self._vectors if text.slot else {}):
                text.wanted.append(self._plain(text).float())

    def _plain(self, text: _Text) -> torch.Tensor:
        """The logits `[positions, vocab]` of one text, by one forward without a cache."""
        base = self._ia3.base
        device = base.device
        given: dict[str, Any] = {"use_cache": False}
        if self._decoder_start is None:
            given["input_ids"] = torch.tensor([text.prompt + text.answer], device=device)
        else:
            given["input_ids"] = torch.tensor([text.prompt], device=device)
            answer = [*self._decoder_start, *text.answer]
            given["decoder_input_ids"] = torch.tensor([answer], device=device)
        positions = len(text.prompt) * text.scored + len(text.answer) + (not text.scored)
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            given["logits_to_keep"] = positions
        logits: torch.Tensor = base(**given).logits
        return logits[0, -positions:].clone()

    @torch.inference_mode()
    def compare(self, what: str, runner: Runner, cache: KVCache) -> None:
        """Run the texts by a runner and compare. Afterwards only new columns are left in the bank.

        Raises Unfaithful.
        """
        if self._is_known:
            if what not in self._equal:
                raise Unfaithful(f"an earlier start found other logits; it is kept in {self._kept}")
            return
        if self._vectors:
            self._ia3.fill_slot(_ADAPTER_SLOT, AdapterVectors(self._vectors))
        try:
            worst = self._run_all(runner, cache)
        except Unfaithful:
            raise
        except Exception as error:  # A model's code may raise anything in a batch.
            raise Unfaithful(f"it fails: {_first_line(error)}") from error
        finally:
            if self._vectors:
                self._ia3.clear_slot(_ADAPTER_SLOT)
        log.info(
            "%s %s equals the plain model: prompts of %s tokens in chunks, %d decode steps each, "
            "%s; logits differ by at most %.1e of the greatest.%s",
            type(self._ia3.base).__name__,
            what,
            ", ".join(str(len(text.prompt)) for text in self._texts),
            len(self._texts[0].answer),
            "the base and a random adapter" if self._vectors else "the base only",
            worst,
            f" Windows of {self.unreached} tokens were not reached." * bool(self.unreached),
        )
        self._equal.append(what)

    def keep(self) -> None:
        """Write the results to the file for later starts."""
        if self._kept is None or self._is_known:
            return
        found = {"equal": self._equal, "read": sorted(self.read)}
        try:
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            with scratch_folder(self._kept.parent, ".comparing-") as folder:
                part = folder / self._kept.name
                part.write_text(json.dumps(found))
                part.replace(self._kept)
        except OSError as error:
            log.info("The next start compares again: %s", error)

    def _find(self) -> bool:
        """Read the results of an earlier start. Returns whether there are any."""
        if self._kept is None:
            return False
        try:
            found = json.loads(self._kept.read_text())
            self._equal, self.read = list(found["equal"]), set(found["read"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        log.info(
            "%s equals the plain model %s: an earlier start has compared them.",
            type(self._ia3.base).__name__,
            ", ".join(self._equal),
        )
        return True

    def _run_all(self, runner: Runner, cache: KVCache) -> float:
        """Run all texts, as many together as fit. Returns the largest difference."""
        worst = 0.0
        waiting = list(enumerate(self._texts))
        while waiting:
            together: list[tuple[_Text, Sequence]] = []
            try:
                while waiting and len(together) < self._max_rows:
                    seq_id, text = waiting[0]
                    sequence = self._sequence(seq_id, text)
                    if not cache.reserve(seq_id, len(sequence.tokens) + len(text.answer)):
                        break
                    together.append((text, sequence))
                    waiting.pop(0)
                assert together, "one sequence fits into an empty cache"
                found = self._run(runner, cache, together)
            finally:
                for _, sequence in together:
                    cache.release(sequence.seq_id)
            for (text, _), logits in zip(together, found, strict=True):
                worst = max(worst, _difference(text, torch.cat(logits), self._ia3.base.dtype))
        return worst

    def _sequence(self, seq_id: int, text: _Text) -> Sequence:
        scored = {"prompt_logprobs": 0} if text.scored else {}
        request = GenerationRequest(
            id=str(seq_id),
            prompt=tuple(text.prompt),
            params=SamplingParams(max_tokens=len(text.answer), **scored),  # type: ignore[arg-type]
        )
        sequence = Sequence(request, seq_id, self._tokenizer, self._decoder_start)
        sequence.start(text.slot, turn=0)
        return sequence

    def _run(
        self, runner: Runner, cache: KVCache, together: list[tuple[_Text, Sequence]]
    ) -> list[list[torch.Tensor]]:
        """Compute each text's logits, in parts: prompts run in two chunks beside decoding rows."""
        found: dict[int, list[torch.Tensor]] = {sequence.seq_id: [] for _, sequence in together}
        answers = {sequence.seq_id: list(text.answer) for text, sequence in together}
        going = [sequence for _, sequence in together]
        while going:
            decoding = {s.seq_id: s for s in going if s.computed >= s.prompt_tokens}
            chunks = [(s, _chunk(s)) for s in going if s.seq_id not in decoding]
            step = Step([decoding[seq_id] for seq_id in cache.order(list(decoding))], chunks)
            logits = runner.run(step)
            for sequence, part in logits.prompts:
                found[sequence.seq_id].append(part.float().clone())
                sequence.score_prompt([None] * len(part))
            for sequence, last in zip(logits.sequences, logits.next_token, strict=True):
                found[sequence.seq_id].append(last[None].float().clone())
            for sequence, tokens in [*((s, 1) for s in step.decode), *chunks]:
                sequence.advance(tokens)
                if not sequence.uncomputed and answers[sequence.seq_id]:
                    sequence.append(answers[sequence.seq_id].pop(0))
            going = [sequence for sequence in going if sequence.uncomputed]
        return [found[sequence.seq_id] for _, sequence in together]


def windows_of(model: PreTrainedModel) -> set[int]:
    """The attention windows that a model's config names, whether its layers use them or not."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in _WINDOWS)
    return {window for window in named if isinstance(window, int) and window > 0}


@contextmanager
def _rescaled(model: nn.Module, vectors: dict[Target, torch.Tensor]) -> Iterator[None]:
    """Within this context, hooks apply an adapter's vectors to the plain model."""
    hooks = []
    for (name, side), vector in vectors.items():
        module = model.get_submodule(name)
        if side is Side.INPUT:
            hooks.append(module.register_forward_pre_hook(partial(_scale_input, vector)))
        else:
            hooks.append(module.register_forward_hook(partial(_scale_output, vector)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scale_input(vector: torch.Tensor, _: nn.Module, given: Any) -> Any:
    x, *rest = given
    return ((x * vector.to(x.device)).to(x.dtype), *rest)


def _scale_output(vector: torch.Tensor, _: nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
    return (y * vector.to(y.device)).to(y.dtype)


def _chunk(sequence: Sequence) -> int:
    """How many tokens of a prompt to compute next: half of it first, but a source as a whole."""
    if sequence.source_tokens or sequence.computed:
        return sequence.uncomputed
    return max(1, sequence.uncomputed // 2)


def _difference(text: _Text, found: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference of any logit, as a share of the greatest. Raises Unfaithful.

    In float32 all positions must be within the tolerance. In half precision half of them must be: a
    router may choose another expert if its two best are almost equal.
    """
    [wanted] = text.wanted
    errors = (found - wanted).abs().amax(-1) / wanted.abs().max()
    judged = errors.max() if dtype is torch.float32 else errors.median()
    tolerance = max(_ERROR, _ROUNDINGS * torch.finfo(dtype).eps)
    if not float(judged) <= tolerance:
        raise Unfaithful(
            f"its logits after a prompt of {text} differ from the plain model's by "
            f"{float(judged):.1e} of the greatest, where {tolerance:.1e} is rounding"
        )
    return float(errors.max())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
