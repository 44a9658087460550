"""Find the modules of a base model that a config adapts, and their sides, exactly as PEFT does."""

import copy
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, Self

import regex
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.peft_defaults import FEEDFORWARD_MODULES, TARGET_MODULES
from infuse.adapters.errors import Fault, InvalidAdapter

ALL_LINEAR = "all-linear"
_MAX_PATTERN = 2000
"""How many characters a regular expression may have."""
_MAX_REPEAT = 100
"""The largest product of counts in one: `regex` expands them, and `((a{999}){999}){999}` would
fill the memory."""
_MATCH_SECONDS = 1.0
"""How long all regular expressions of one config together may take."""
_REMEMBERED = 128
"""How many configs' targets are remembered."""

_Names = tuple[str, ...] | str | None
"""`config.Names`, hashable."""


class Side(StrEnum):
    INPUT = "input"
    """The vector scales the module's input (feed-forward)."""
    OUTPUT = "output"
    """The vector scales the module's output (keys, values)."""


class Target(NamedTuple):
    module: str
    side: Side


@dataclass(frozen=True, slots=True)
class BaseModules:
    """The modules of a base model, noted before anything in it is wrapped or packed."""

    model_type: str
    names: tuple[str, ...]
    """All modules, in `named_modules` order."""
    sizes: dict[str, tuple[int, int]]
    """(in, out) features of the modules that IA3 can adapt."""
    input_embedding: str | None
    output_embedding: str | None
    head: frozenset[str]
    """Modules behind the model's trunk, the output embedding among them: only the tokens whose
    logits are wanted reach them (`logits_to_keep`)."""
    skeleton: nn.Module = field(repr=False, compare=False)
    """The model without its weights."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        try:
            embeddings = model.get_input_embeddings()
        except NotImplementedError:
            embeddings = None  # A model of images, for example, has none.
        names, sizes, read, output = [], {}, None, None
        for name, module in model.named_modules():
            if name:
                names.append(name)
            if isinstance(module, nn.Linear):
                sizes[name] = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                sizes[name] = (module.weight.shape[0], module.weight.shape[1])
            if module is embeddings and read is None:
                read = name
            if module is head and output is None:
                output = name
        kind = model.config.model_type
        trunk = f"{model.base_model_prefix}."
        whole = model.base_model is model
        behind = {n for n in names if n == output or not (whole or f"{n}.".startswith(trunk))}
        skeleton = _without_weights(model)
        return cls(kind, tuple(names), sizes, read, output, frozenset(behind), skeleton)

    def __hash__(self) -> int:
        return hash((self.model_type, self.names))

    def size(self, target: Target) -> int:
        """The length of a target's vector."""
        inputs, outputs = self.sizes[target.module]
        return inputs if target.side is Side.INPUT else outputs

    @property
    def embeddings(self) -> frozenset[str]:
        """The input and output embeddings, as far as the model has them."""
        names = (self.input_embedding, self.output_embedding)
        return frozenset(name for name in names if name is not None)

    @property
    def task_type(self) -> str:
        """PEFT's name of the model's task."""
        config: Any = self.skeleton.config
        return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"

    def state_of(self, module: str) -> dict[str, torch.Tensor]:
        """Return a module's parameters and persistent buffers by name, without values."""
        state: dict[str, torch.Tensor] = self.skeleton.get_submodule(module).state_dict()
        return state


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy a model with parameters and persistent buffers on the meta device."""
    instead: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.state_dict(keep_vars=True).values()]:
        if isinstance(tensor, torch.Tensor):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            instead[id(tensor)] = nn.Parameter(empty, False) if is_parameter else empty
    return copy.deepcopy(model, instead)


def resolve_targets(config: IA3Config, modules: BaseModules) -> tuple[Target, ...]:
    """Return a config's targets in a base model.

    PEFT `BaseTuner.inject_adapter` and `IA3Model._check_target_module_feedforward`.

    Raises InvalidAdapter: nothing matches, a match is no linear layer, a regular expression is
    malformed or takes too long.
    """
    return _resolve(
        _hashable(config.target_modules),
        _hashable(config.feedforward_modules),
        _hashable(config.exclude_modules),
        tuple(config.modules_to_save or ()),
        modules,
    )


def _hashable(names: list[str] | str | None) -> tuple[str, ...] | str | None:
    return tuple(names) if isinstance(names, list) else names


@lru_cache(_REMEMBERED)
def _resolve(
    targets: _Names,
    feedforward: _Names,
    excluded: _Names,
    saved: tuple[str, ...],
    modules: BaseModules,
) -> tuple[Target, ...]:
    """`resolve_targets`, cached: many adapters have the same config, and requests wait for this."""
    targets = _names_or_default("target_modules", targets, TARGET_MODULES, modules)
    feedforward = _names_or_default(
        "feedforward_modules", feedforward, FEEDFORWARD_MODULES, modules
    )
    clock = _Clock()
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = tuple(name for name in modules.sizes if name != modules.output_embedding)
    is_target = _NameMatcher("target_modules", targets, clock)
    is_excluded = _NameMatcher("exclude_modules", excluded or (), clock)
    is_saved = _SavedMatcher(saved, clock)
    matched = [
        name
        for name in modules.names
        if not is_excluded(name) and not is_saved(name) and is_target(name)
    ]
    faults = [
        Fault("target_modules", _no_linear(name, modules), "name linear layers only")
        for name in matched
        if name not in modules.sizes
    ]
    if not matched:
        suffixes = sorted({name.rpartition(".")[2] for name in modules.sizes})
        fix = f"the base model's linear layers end in: {', '.join(suffixes)}"
        faults = [Fault("target_modules", "matches no module of the base model", fix)]
    if faults:
        raise InvalidAdapter(faults)
    is_input = _FeedforwardMatcher(feedforward, clock)
    return tuple(Target(name, Side.INPUT if is_input(name) else Side.OUTPUT) for name in matched)


def _no_linear(name: str, modules: BaseModules) -> str:
    kind = type(modules.skeleton.get_submodule(name)).__name__
    return f"'{name}' is no linear layer but a {kind}"


def _names_or_default(
    field: str,
    names: _Names,
    defaults: dict[str, list[str]],
    modules: BaseModules,
) -> tuple[str, ...] | str:
    if names is not None:
        return names
    if modules.model_type not in defaults:
        problem = f"PEFT has no default for the model type '{modules.model_type}'"
        raise InvalidAdapter([Fault(field, problem, f"set {field} in the config and train again")])
    return tuple(defaults[modules.model_type])


class _Clock:
    """The time that all regular expressions of one config share, and what each field has used."""

    def __init__(self) -> None:
        self.end = time.monotonic() + _MATCH_SECONDS
        self.spent: defaultdict[str, float] = defaultdict(float)

    @property
    def slowest(self) -> str:
        return max(self.spent, key=self.spent.__getitem__)


class _Pattern:
    """A regular expression from an upload: its size, and the time of all its uses, are limited.

    `regex` can interrupt a running match, and lets other threads run meanwhile; `re` cannot.
    """

    def __init__(self, field: str, pattern: str, clock: _Clock, whole: bool = True) -> None:
        """`whole`: the pattern must match a whole name, not only its beginning."""
        self._field = field
        self._clock = clock
        if len(pattern) > _MAX_PATTERN:
            raise self._refusal(f"is longer than {_MAX_PATTERN} characters")
        counts = re.findall(r"\{([0-9]*),?([0-9]*)\}", pattern)
        if len(counts) != pattern.count("{"):
            raise self._refusal("has braces that are no count, {n} or {n,m}")
        if prod(max(1, *(int(n or 1) for n in count)) for count in counts) > _MAX_REPEAT:
            raise self._refusal(f"repeats something more than {_MAX_REPEAT} times in all")
        try:
            # PEFT uses `re`, so what `re` cannot read was never trained. It also has neither
            # recursion nor fuzzy matches.
            re.compile(pattern)
            compiled = regex.compile(pattern, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise self._refusal(f"is no regular expression: {error}") from None
        self._match = compiled.fullmatch if whole else compiled.match

    def matches(self, name: str) -> bool:
        began = time.monotonic()
        left = self._clock.end - began
        try:
            if left > 0:
                return self._match(name, timeout=left, concurrent=True) is not None
        except TimeoutError:
            pass  # Raised below, for the field that used most of the time.
        finally:
            self._clock.spent[self._field] += time.monotonic() - began
        problem = f"takes more than {_MATCH_SECONDS:.0f} s to match"
        raise _refusal(self._clock.slowest, problem)

    def _refusal(self, problem: str) -> InvalidAdapter:
        return _refusal(self._field, problem)


def _refusal(field: str, problem: str) -> InvalidAdapter:
    return InvalidAdapter([Fault(field, problem, "list the modules' names instead")])


class _NameMatcher:
    """Matches as `target_modules` and `exclude_modules` do: exact names or `.suffix`; a string is a
    regular expression for the whole name."""

    def __init__(self, field: str, names: Iterable[str], clock: _Clock) -> None:
        self._pattern = _Pattern(field, names, clock) if isinstance(names, str) else None
        self._exact = frozenset(names)
        self._suffixes = tuple(f".{name}" for name in self._exact)

    def __call__(self, name: str) -> bool:
        if self._pattern is not None:
            return self._pattern.matches(name)
        return name in self._exact or name.endswith(self._suffixes)


class _FeedforwardMatcher:
    """Matches as `feedforward_modules` do: by bare `endswith`, so `proj` matches `down_proj`."""

    def __init__(self, names: tuple[str, ...] | str, clock: _Clock) -> None:
        field = "feedforward_modules"
        self._pattern = _Pattern(field, names, clock) if isinstance(names, str) else None
        self._ends = names if isinstance(names, tuple) else ()

    def __call__(self, name: str) -> bool:
        if self._pattern is not None:
            return self._pattern.matches(name)
        return name.endswith(self._ends)


class _SavedMatcher:
    """Matches as `modules_to_save` do, which are never targets: each is a regular expression for a
    part of the path."""

    def __init__(self, names: tuple[str, ...], clock: _Clock) -> None:
        self._patterns: list[_Pattern] = []
        for name in names:
            if time.monotonic() > clock.end:
                raise _refusal("modules_to_save", f"takes more than {_MATCH_SECONDS:.0f} s to read")
            pattern = rf"(^|.*\.){name}($|\..*)"
            self._patterns.append(_Pattern("modules_to_save", pattern, clock, whole=False))

    def __call__(self, name: str) -> bool:
        return any(pattern.matches(name) for pattern in self._patterns)
