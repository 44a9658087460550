"""Plans which modules adapters may rescale: vLLM compiles its layers once, before any adapter is
known."""

from collections.abc import Collection, Iterable
from contextlib import suppress

from infuse.adapters.checkpoint.checkpoint import AdapterVectors, keys_of_vectors
from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.peft_defaults import FEEDFORWARD_MODULES, TARGET_MODULES
from infuse.adapters.checkpoint.targets import BaseModules, Side, Target, resolve_targets
from infuse.adapters.errors import Fault, InvalidAdapter
from infuse.server.engine.errors import UnsupportedModel

_INPUT = ":input"
_SHOWN = 5
"""How many modules an error names."""


def planned_targets(
    modules: BaseModules, names: str, known: Iterable[IA3Config] = ()
) -> tuple[Target, ...]:
    """Return the targets that adapters of this server may have.

    `names`: names of modules, separated by commas, as in PEFT's `target_modules` ("q_proj" is the
    `q_proj` of every layer; "all-linear" is every linear layer); "down_proj:input" is the input
    side. Empty: PEFT's defaults for the family, and what the `known` adapters rescale. Raises
    UnsupportedModel.
    """
    found = _named(names, modules) if names else [*_defaults(modules), *_of_all(known, modules)]
    if not found:
        raise UnsupportedModel(
            f"which modules of {modules.model_type} may adapters rescale? Name them with "
            "--ia3-targets, for example k_proj,v_proj,down_proj:input; PEFT has no defaults for it"
        )
    # In one order, whatever that of the adapters: the plan is a part of a compile cache's key.
    return tuple(sorted(set(found)))


def _named(names: str, modules: BaseModules) -> list[Target]:
    found: list[Target] = []
    for name in filter(None, map(str.strip, names.split(","))):
        side = Side.INPUT if name.endswith(_INPUT) else Side.OUTPUT
        found += (Target(each, side) for each in _modules_named(name.removesuffix(_INPUT), modules))
    return found


def _defaults(modules: BaseModules) -> Iterable[Target]:
    """What PEFT's defaults for the family rescale; nothing where it has none."""
    kind = modules.model_type
    if kind not in TARGET_MODULES:
        return ()
    config = {
        "target_modules": TARGET_MODULES[kind],
        "feedforward_modules": FEEDFORWARD_MODULES[kind],
    }
    return _of_all([IA3Config.model_validate(config)], modules)


def _of_all(configs: Iterable[IA3Config], modules: BaseModules) -> list[Target]:
    """What adapters with these configs rescale, but for those that do not fit the base."""
    found: list[Target] = []
    for config in configs:
        with suppress(InvalidAdapter):
            found += keys_of_vectors(config, resolve_targets(config, modules)).values()
    return found


def _modules_named(name: str, modules: BaseModules) -> list[str]:
    every = "all-linear"
    config = IA3Config.model_validate(
        {"target_modules": every if name == every else [name], "feedforward_modules": []}
    )
    try:
        return [target.module for target in resolve_targets(config, modules)]
    except InvalidAdapter as error:
        raise UnsupportedModel(f"--ia3-targets {name}: {error}") from error


def check_targets(vectors: AdapterVectors, planned: Collection[Target]) -> None:
    """Raises InvalidAdapter where an adapter does what vLLM cannot do here."""
    faults = []
    if vectors.saved:
        whole = ", ".join(sorted(vectors.saved)[:_SHOWN])
        faults.append(
            Fault(
                "modules_to_save",
                f"brings whole modules ({whole}), which the vLLM engine cannot exchange",
                "train without modules_to_save and added tokens, or serve with --engine native",
            )
        )
    missing = sorted(vectors.vectors.keys() - set(planned))
    if missing:
        shown = ", ".join(f"{target.module} ({target.side})" for target in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        names = dict.fromkeys(_setting(target) for target in missing)
        faults.append(
            Fault(
                "target_modules",
                f"rescales {shown}{more}, for which this server has no room",
                f"start it with --ia3-targets that also name {','.join(names)}",
            )
        )
    if faults:
        raise InvalidAdapter(faults)


def _setting(target: Target) -> str:
    last = target.module.rpartition(".")[2]
    return f"{last}{_INPUT}" if target.side is Side.INPUT else last
