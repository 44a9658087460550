"""IA3Model through any sequence of calls, some of which fail: after each its state is PEFT's.

A call that fails must leave everything as it was. Where PEFT itself is left half-way, or its layers
disagree with each other, the oracle is brought in line again: each such place says so.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from peft import IA3Config, PeftModel
from peft.tuners.ia3.layer import IA3Layer
from safetensors.torch import load_file

from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.adapters.checkpoint.config import IA3Config as OurConfig
from infuse.adapters.errors import AdapterError, InvalidAdapter
from infuse.adapters.model.model import IA3Model
from tests.factories import save_adapter, tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "keys": {"target_modules": ["k_proj"], "feedforward_modules": []},
    "mlp": {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "regex": {"target_modules": r".*\.1\..*(k|down)_proj", "feedforward_modules": ".*down_proj"},
}
"""PEFT has one side for a module, so they agree about sides."""
NAMES = st.sampled_from(["a", "b", "c"])
ANY_NAME = st.sampled_from(["a", "b", "c", "nobody"])
SEVERAL = st.lists(ANY_NAME, min_size=1, max_size=3)
IDS = torch.randint(3, 128, (3, 5), generator=torch.Generator().manual_seed(3))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@cache
def folders() -> dict[str, Path]:
    root = Path(tempfile.mkdtemp())
    return {
        kind: save_adapter(tiny_llama(), root / kind, seed=seed, **config)
        for seed, (kind, config) in enumerate(KINDS.items())
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


class Twins(RuleBasedStateMachine):
    """Our model and PEFT's, to which the same is done."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = IA3Model.from_pretrained(tiny_llama(), folders()["default"], "a")
        self.peft = PeftModel.from_pretrained(tiny_llama(), folders()["default"], adapter_name="a")
        self.enabled = True

    @property
    def tuner(self) -> Any:
        return self.peft.base_model

    def layers(self) -> list[IA3Layer]:
        return [module for module in self.tuner.modules() if isinstance(module, IA3Layer)]

    def state(self) -> tuple[Any, ...]:
        """Return everything of our model that a call may change."""
        tensors = {key: tensor.clone() for key, tensor in self.ours.state_dict().items()}
        facts = (
            self.ours.active_adapters,
            self.ours.has_active_enabled_adapter,
            self.ours.peft_config,
            self.ours.merged_adapters,
            self.ours.targeted_module_names,
            self.ours.training,
            {name: p.requires_grad for name, p in self.ours.named_parameters()},
            {name: type(module) for name, module in self.ours.named_modules()},
            {name: len(module._forward_pre_hooks) for name, module in self.ours.named_modules()},
        )
        return tensors, copy.deepcopy(facts)

    def both(self, ours: Callable[[Any], object], theirs: Callable[[Any], object]) -> bool:
        """Call both; where ours refuses it has changed nothing, and the oracle is not asked."""
        before = self.state()
        try:
            ours(self.ours)
        except AdapterError as error:
            refusal = error
        else:
            theirs(self.peft)
            return True
        assert isinstance(refusal, ValueError | TypeError | InvalidAdapter)
        after = self.state()
        assert before[1] == after[1], refusal
        assert before[0].keys() == after[0].keys()
        assert all(same(before[0][key], after[0][key]) for key in after[0]), refusal
        return False

    @invariant()
    def states_are_equal(self) -> None:
        ours, theirs = self.ours.state_dict(), self.tuner.state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert same(tensor, theirs[key]), key
        assert self.ours.active_adapters == self.tuner.active_adapters
        assert self.ours.peft_config.keys() == self.peft.peft_config.keys()
        merged = {name for layer in self.layers() for name in layer.merged_adapters}
        assert set(self.ours.merged_adapters) == merged
        enabled = {not layer.disable_adapters for layer in self.layers()}
        assert enabled == {self.enabled}
        active = self.enabled and bool(self.ours.active_adapters)
        assert self.ours.has_active_enabled_adapter == active
        trains = {name for name, p in self.ours.named_parameters() if p.requires_grad}
        assert trains == {name for name, p in self.tuner.named_parameters() if p.requires_grad}

    def settle(self, name: str) -> None:
        """After an adapter was added: PEFT's new layers are enabled, also where all others are
        disabled, and its cast from half precision makes parameters that train."""
        self.tuner.set_requires_grad(name, False)
        for layer in self.layers():
            layer._disable_adapters = not self.enabled

    # Adapters come and go.

    @rule(name=NAMES, kind=st.sampled_from(list(KINDS)))
    def load(self, name: str, kind: str) -> None:
        """PEFT loads into an adapter that is there already; ours refuses."""
        if self.both(
            lambda ours: ours.load_adapter(folders()[kind], name),
            lambda peft: peft.load_adapter(folders()[kind], name),
        ):
            self.settle(name)

    @rule(name=NAMES, kind=st.sampled_from(list(KINDS)), cast=st.booleans())
    def add(self, name: str, kind: str, cast: bool) -> None:
        if self.both(
            lambda ours: ours.add_adapter(
                name, OurConfig(**KINDS[kind]), autocast_adapter_dtype=cast
            ),
            lambda peft: peft.add_adapter(
                name, IA3Config(**KINDS[kind]), autocast_adapter_dtype=cast
            ),
        ):
            self.settle(name)

    @rule(name=NAMES, config=st.sampled_from([{"target_modules": ["nothing"]}, {}, None]))
    def add_what_does_not_fit(self, name: str, config: dict[str, Any] | None) -> None:
        given = None if config is None else OurConfig(**config, exclude_modules=r".*")
        assert not self.both(lambda ours: ours.add_adapter(name, given), lambda _: None)

    @rule(name=ANY_NAME)
    def delete(self, name: str) -> None:
        if len(self.ours.adapter_names) == 1:
            return
        was_active = name in self.ours.active_adapters
        if not self.both(
            lambda ours: ours.delete_adapter(name), lambda peft: peft.delete_adapter(name)
        ):
            return
        if was_active:
            # Each of PEFT's layers takes the first adapter that it has; ours agree.
            for layer in self.layers():
                layer.set_adapter(self.ours.active_adapters)
            self.tuner.active_adapter = self.ours.active_adapters
        # PeftModel knows one active adapter, which may be the deleted one.
        self.peft.active_adapter = self.ours.active_adapters[0]

    @rule(names=SEVERAL, weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3), new=NAMES)
    def mix(self, names: list[str], weights: list[float], new: str) -> None:
        if self.both(
            lambda ours: ours.add_weighted_adapter(names, weights, new),
            lambda peft: peft.add_weighted_adapter(names, weights, new),
        ):
            self.settle(new)

    # Activating.

    @rule(name=ANY_NAME, frozen=st.booleans())
    def set_one(self, name: str, frozen: bool) -> None:
        self.both(
            lambda ours: ours.set_adapter(name, inference_mode=frozen),
            lambda peft: peft.set_adapter(name, inference_mode=frozen),
        )

    @rule(names=SEVERAL)
    def set_several(self, names: list[str]) -> None:
        self.both(
            lambda ours: ours.base_model.set_adapter(names),
            lambda peft: peft.base_model.set_adapter(names),
        )

    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        method = "enable_adapter_layers" if enabled else "disable_adapter_layers"
        self.both(
            lambda ours: getattr(ours, method)(), lambda peft: getattr(peft.base_model, method)()
        )
        self.enabled = enabled

    @rule(names=SEVERAL, trains=st.booleans())
    def let_train(self, names: list[str], trains: bool) -> None:
        self.both(
            lambda ours: ours.set_requires_grad(names, trains),
            lambda peft: peft.base_model.set_requires_grad(names, trains),
        )

    # Merging.

    @rule(names=st.none() | SEVERAL | st.just("a"), safe=st.booleans())
    def merge(self, names: Any, safe: bool) -> None:
        self.both(
            lambda ours: ours.merge_adapter(names, safe_merge=safe),
            lambda peft: peft.merge_adapter(names, safe_merge=safe),
        )

    @rule()
    def unmerge(self) -> None:
        self.both(lambda ours: ours.unmerge_adapter(), lambda peft: peft.unmerge_adapter())

    @rule(name=NAMES)
    def break_one(self, name: str) -> None:
        """Break one vector, so that a safe merge fails half-way and PEFT stays half merged."""
        for model in (self.ours, self.tuner):
            for key, parameter in model.named_parameters():
                if key.endswith(f"layers.1.self_attn.k_proj.ia3_l.{name}"):
                    parameter.data[0] = torch.inf

    @rule(dtype=DTYPES)
    def move(self, dtype: torch.dtype) -> None:
        self.both(lambda ours: ours.to(dtype), lambda peft: peft.to(dtype))

    # Running.

    @rule()
    @torch.no_grad()
    def forward(self) -> None:
        assert same(self.ours(IDS).logits, self.peft(IDS).logits)

    @rule()
    @torch.no_grad()
    def forward_of_the_base(self) -> None:
        with self.ours.disable_adapter(), self.peft.disable_adapter():
            assert same(self.ours(IDS).logits, self.peft(IDS).logits)

    @rule(names=st.lists(st.sampled_from(["a", "b", "c", "__base__", "nobody"]), max_size=4))
    @torch.no_grad()
    def forward_by_row(self, names: list[str]) -> None:
        """Each row equals PEFT with that adapter alone: PEFT's IA3 has no mixed batches."""
        found: list[torch.Tensor] = []
        if not self.both(
            lambda ours: found.append(ours(IDS, adapter_names=names).logits), lambda _: None
        ):
            return
        for row, name in enumerate(names):
            alone = copy.deepcopy(self.peft)
            if name == "__base__" or not self.enabled:
                alone.base_model.disable_adapter_layers()
            else:
                alone.base_model.set_adapter(name)
            expected = alone(IDS).logits
            tight = 1e-5 if expected.dtype == torch.float32 else 2e-2
            assert torch.allclose(found[0][row], expected[row], atol=tight, equal_nan=True)

    @rule()
    def rows_while_training(self) -> None:
        self.ours.train()
        assert not self.both(lambda ours: ours(IDS, adapter_names=["__base__"] * 3), lambda _: None)
        self.ours.eval()

    @rule()
    def generate(self) -> None:
        settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        ours = self.ours.generate(IDS, **settings)
        assert torch.equal(ours, self.peft.generate(input_ids=IDS, **settings))

    # Files.

    @rule(selected=st.none() | SEVERAL)
    def save(self, selected: list[str] | None) -> None:
        with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
            if not self.both(
                lambda model: model.save_pretrained(ours, selected_adapters=selected),
                lambda model: model.save_pretrained(theirs, selected_adapters=selected),
            ):
                return
            for name in selected or self.ours.adapter_names:
                ones, others = Path(ours, name), Path(theirs, name)
                tensors, wanted = (load_file(each / WEIGHTS_FILE) for each in (ones, others))
                assert tensors.keys() == wanted.keys()
                assert all(same(tensor, wanted[key]) for key, tensor in tensors.items())
                config = OurConfig.parse((ones / CONFIG_FILE).read_bytes())
                expected = OurConfig.parse((others / CONFIG_FILE).read_bytes())
                assert plain(config) == plain(expected)


def plain(config: OurConfig) -> dict[str, Any]:
    """Lists of names have no order, and our files name no version of PEFT."""
    values = {key: sorted(v) if isinstance(v, list) else v for key, v in dict(config).items()}
    values.pop("peft_version", None)
    return values


@pytest.mark.parametrize(
    "sequences", [20, pytest.param(1000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_after_any_calls_the_state_is_peft_s(sequences: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            Twins,
            settings=settings(
                max_examples=sequences,
                stateful_step_count=12,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
