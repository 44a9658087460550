"""What must be true of adapters, in a dictionary: the model that an adapter's life is tested by."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.config import WEIGHTS_FILE
from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.derive.combine import Recipe, combine
from infuse.adapters.derive.merge import BaseCheckpoint
from infuse.adapters.errors import (
    AdapterDisabled,
    AdapterError,
    CombinedNotFinite,
    UnknownAdapter,
    UnknownRevision,
)
from infuse.adapters.storage.revision import Details
from tests.factories import save_adapter, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "queries": {"target_modules": ["q_proj"], "feedforward_modules": []},
    "outward": {"target_modules": ["down_proj", "k_proj"], "feedforward_modules": []},
}
_TIE = 1e-3
"""Logits that lie closer than this may change their order with the order of additions."""

Vectors = Mapping[Target, torch.Tensor]


class Effect:
    """What an adapter, or several mixed, does to the base."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors

    @classmethod
    def saved_by_peft(cls, folder: Path) -> "Effect":
        """Read as PEFT writes it: `(out, 1)` scales what comes out, `(1, in)` what goes in."""
        vectors = {}
        for key, tensor in load_file(folder / WEIGHTS_FILE).items():
            module = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
            side = Side.OUTPUT if tensor.shape[1] == 1 else Side.INPUT
            vectors[Target(module, side)] = tensor.flatten()
        return cls(vectors)

    @cached_property
    def identity(self) -> str:
        return AdapterVectors(self.vectors).digest

    @property
    def is_tame(self) -> bool:
        """Not so large that float32 itself decides what is generated."""
        return all(float(vector.abs().max()) < 8 for vector in self.vectors.values())


BASE = Effect({})


def mix(effects: Sequence[Effect], recipe: Recipe) -> Effect:
    """The formulas of docs/guide/combine-and-merge.md; for TIES and DARE our own code, which is
    held to PEFT's elsewhere.

    Raises CombinedNotFinite.
    """
    if recipe.method not in ("linear", "product", "task_arithmetic"):
        return Effect(combine([AdapterVectors(e.vectors) for e in effects], recipe).vectors)
    mixed = {}
    for target in {target for effect in effects for target in effect.vectors}:
        some = next(e.vectors[target] for e in effects if target in e.vectors)
        absent = torch.full_like(some, 0.0 if recipe.missing == "zero" else 1.0)
        weighted = [
            (weight, effect.vectors.get(target, absent).double())
            for weight, effect in zip(recipe.weights, effects, strict=True)
        ]
        if recipe.method == "linear":
            total = sum(weight * vector for weight, vector in weighted)
        elif recipe.method == "task_arithmetic":
            total = 1 + sum(weight * (vector - 1) for weight, vector in weighted)
        else:
            total = torch.ones_like(some).double()
            for weight, vector in weighted:
                total = total * (1 + weight * (vector - 1))
        assert isinstance(total, torch.Tensor)
        mixed[target] = total.float()
        if not mixed[target].isfinite().all():
            raise CombinedNotFinite(target.module)
    return Effect(mixed)


class Judge:
    """The plain base with hooks that multiply: says whether tokens are an effect's greedy ones."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._verdicts: dict[tuple[str, tuple[int, ...], tuple[int, ...]], bool] = {}

    def accepts(self, effect: Effect, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        key = (effect.identity, tuple(prompt), tuple(tokens))
        if key not in self._verdicts:
            logits = self.logits(effect, [*prompt, *tokens])[len(prompt) - 1 : -1]
            chosen = logits[range(len(tokens)), list(tokens)]
            self._verdicts[key] = bool((chosen > logits.max(dim=-1).values - _TIE).all())
        return self._verdicts[key]

    @torch.inference_mode()
    def logits(self, effect: Effect, ids: Sequence[int]) -> torch.Tensor:
        """`[tokens, vocab]`."""
        with _multiplied(self._base, effect.vectors):
            logits: torch.Tensor = self._base(torch.tensor([list(ids)])).logits[0]
        return logits


@contextmanager
def _multiplied(base: PreTrainedModel, vectors: Vectors) -> Iterator[None]:
    hooks = []
    for target, vector in vectors.items():
        module = base.get_submodule(target.module)
        if target.side is Side.INPUT:
            hooks.append(module.register_forward_pre_hook(_input_times(vector)))
        else:
            hooks.append(module.register_forward_hook(_output_times(vector)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _input_times(vector: torch.Tensor) -> Any:
    return lambda _, inputs: (inputs[0] * vector,)


def _output_times(vector: torch.Tensor) -> Any:
    return lambda _, __, output: output * vector


@dataclass(frozen=True)
class World:
    """What does not change: the base, and adapters that PEFT saved for it."""

    base: PreTrainedModel
    base_files: BaseCheckpoint
    folders: dict[str, Path]
    effects: dict[str, Effect]
    damaged: Path
    """A folder that must be refused: one value is no number."""
    judge: Judge

    @classmethod
    def saved_in(cls, root: Path) -> "World":
        base = tiny_model("llama", num_hidden_layers=1)
        base.save_pretrained(root / "base")
        folders = {
            kind: save_adapter(base, root / kind, seed=seed, **config)
            for seed, (kind, config) in enumerate(KINDS.items())
        }
        damaged = root / "damaged"
        shutil.copytree(folders["default"], damaged)
        weights = load_file(damaged / WEIGHTS_FILE)
        next(iter(weights.values()))[0] = torch.nan
        save_file(weights, damaged / WEIGHTS_FILE)
        return cls(
            base=base,
            base_files=BaseCheckpoint(root / "base"),
            folders=folders,
            effects={kind: Effect.saved_by_peft(folder) for kind, folder in folders.items()},
            damaged=damaged,
            judge=Judge(base),
        )


@dataclass
class Name:
    """A living name."""

    revisions: dict[int, Effect]
    """By number; the greatest is the current one."""
    details: Details = field(default_factory=Details)

    @property
    def number(self) -> int:
        return max(self.revisions)

    @property
    def effect(self) -> Effect:
        return self.revisions[self.number]


class Life:
    """All names, and what is to be expected of them."""

    def __init__(self, keep_revisions: int, most_pinned: int) -> None:
        self.alive: dict[str, Name] = {}
        self._last: dict[str, int] = {}
        """The last number that a name, alive or not, has given."""
        self._keep_revisions = keep_revisions
        self._most_pinned = most_pinned

    def note(self, name: str, effect: Effect) -> int:
        """The name does this from now on; returns the revision's number."""
        number = self._last[name] = self._last.get(name, 0) + 1
        revisions = self.alive.setdefault(name, Name({})).revisions
        revisions[number] = effect
        for old in sorted(revisions)[: -self._keep_revisions]:
            del revisions[old]
        return number

    def delete(self, name: str) -> None:
        del self.alive[name]

    def set(self, name: str, **details: Any) -> None:
        self.alive[name].details = replace(self.alive[name].details, **details)

    @property
    def pinned(self) -> list[str]:
        return [name for name, known in self.alive.items() if known.details.pinned]

    def may_pin(self, name: str) -> bool:
        return name in self.pinned or len(self.pinned) < self._most_pinned

    def asked_for(self, model: str) -> Effect | type[AdapterError]:
        """What answers a request for `name` or `name@number`, or how it is refused."""
        name, _, number = model.partition("@")
        if name not in self.alive:
            return UnknownAdapter
        known = self.alive[name]
        wanted = int(number) if number else known.number
        if wanted not in known.revisions:
            return UnknownRevision
        if not known.details.enabled:
            return AdapterDisabled
        return known.revisions[wanted]

    def mixed(self, models: Sequence[str], recipe: Recipe) -> Effect | type[AdapterError]:
        """What several together do; the first that is refused decides."""
        effects = []
        for model in models:
            found = self.asked_for(model)
            if not isinstance(found, Effect):
                return found
            effects.append(found)
        try:
            return mix(effects, recipe)
        except CombinedNotFinite:
            return CombinedNotFinite
