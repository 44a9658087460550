"""Configs as PEFT changes them: when it adds an adapter, sums several, or saves one."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infuse.adapters.checkpoint.config import IA3Config, Names
from infuse.adapters.checkpoint.peft_defaults import FEEDFORWARD_MODULES, TARGET_MODULES
from infuse.adapters.checkpoint.targets import ALL_LINEAR, BaseModules, Side, Target
from infuse.adapters.errors import WrongCall, WrongType

BOTH_SIDES = "infuse_both_sides"
"""Our own config field: modules that are rescaled on both sides, which PEFT cannot express."""


def config_of(given: object) -> IA3Config:
    """Return our config for PEFT's config object, or for ours. Raises WrongType, InvalidAdapter."""
    if isinstance(given, IA3Config):
        return given
    if not callable(getattr(given, "to_dict", None)):
        raise WrongType(
            f"A config is an IA3Config, adapters' or PEFT's, not {type(given).__name__}"
        )
    values: Mapping[str, Any] = given.to_dict()  # type: ignore[attr-defined]
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in values.items()}
    return IA3Config.parse(json.dumps(plain).encode())


def settled(config: IA3Config, targets: Sequence[Target], modules: BaseModules) -> IA3Config:
    """Return the config with what PEFT fills in when it adds an adapter: its default modules, and
    `fan_in_fan_out`."""
    names, inputs = config.target_modules, config.feedforward_modules
    if names is None:
        names = TARGET_MODULES[modules.model_type]
    elif isinstance(names, str) and names.lower() == ALL_LINEAR:
        names = [target.module for target in targets]
    if inputs is None:
        inputs = FEEDFORWARD_MODULES[modules.model_type]
    last = modules.skeleton.get_submodule(targets[-1].module)
    return config.model_copy(
        update={
            "target_modules": names,
            "feedforward_modules": inputs,
            "fan_in_fan_out": isinstance(last, Conv1D),
        }
    )


def united(configs: Sequence[IA3Config]) -> IA3Config:
    """Return the config of a weighted sum, with all modules of all its adapters. Raises WrongCall.

    PEFT `IA3Model.add_weighted_adapter`.
    """
    return configs[0].model_copy(
        update={
            field: _united([getattr(config, field) for config in configs])
            for field in ("target_modules", "feedforward_modules")
        }
    )


def _united(several: Sequence[Names]) -> Names:
    patterns = [names for names in several if isinstance(names, str)]
    if len(patterns) == len(several):
        return "|".join(f"({pattern})" for pattern in patterns)
    if patterns:
        raise WrongCall(
            "All adapter configs should have the same type for target and feedforward modules: "
            "lists of names, or regular expressions"
        )
    return sorted({name for names in several for name in names or ()})


def names_of_targets(targets: Collection[Target]) -> dict[str, Any]:
    """Return the config fields that name these targets, module by module."""
    outputs = {target.module for target in targets if target.side is Side.OUTPUT}
    inputs = {target.module for target in targets if target.side is Side.INPUT}
    both = sorted(inputs & outputs)
    return {
        "target_modules": sorted(outputs | inputs),
        "feedforward_modules": sorted(inputs - outputs),
    } | ({BOTH_SIDES: both} if both else {})


def saved_form(config: IA3Config, model: PreTrainedModel) -> IA3Config:
    """Return the config that `PeftModel.save_pretrained` writes."""
    kind = type(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    base = config.base_model_name_or_path or model.__dict__.get("name_or_path") or None
    return config.model_copy(
        update={
            "inference_mode": True,
            "base_model_name_or_path": base,
            "auto_mapping": mapping if config.task_type is None else None,
        }
    )
