"""`IA3Model` does for a notebook what PEFT's `IA3Model`, and `PeftModel` around it, do."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import (
    AdapterVectors,
    effective_vectors,
    read_checkpoint,
    write_checkpoint,
)
from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.peft_configs import config_of, names_of_targets, united
from infuse.adapters.checkpoint.targets import resolve_targets
from infuse.adapters.errors import (
    AdapterExists,
    CannotCombine,
    UnknownAdapter,
    WrongCall,
    WrongType,
)
from infuse.adapters.model.tuned_layer import BASE_NAME
from infuse.adapters.model.tuning import Tuning

NOT_SERVED = {
    "create_or_update_model_card": "write the README.md that you want beside the adapter's files",
    "get_layer_status": "peft_config, active_adapters and merged_adapters tell the same",
    "get_model_config": "model.config.to_dict()",
    "get_model_status": "peft_config, active_adapters and merged_adapters tell the same",
    "get_prompt": "IA3 has no prompt",
    "get_prompt_embedding_to_save": "IA3 has no prompt",
    "inject_adapter": "call add_adapter(name, config)",
    "prepare_model_for_gradient_checkpointing": "model.enable_input_require_grads()",
    "push_to_hub": "save_pretrained, then huggingface_hub.upload_folder",
    "supports_lora_conversion": "IA3 does not add to weights, so it cannot become a LoRA",
    "targeted_parameter_names": "IA3 targets modules: targeted_module_names",
    "tuner_layer_cls": "layers here are infuse.adapters.model.tuned_layer.TunedLayer",
    "uses_shared_state": "layers here share no vectors",
}
"""Names that PEFT's models have and this one has not, and what to use instead."""


class IA3Model(nn.Module):
    """A transformers model with IA3 adapters attached by name, as `peft.IA3Model`.

    A notebook that uses PEFT's class, or `PeftModel` around it, runs on this one::

        model = IA3Model.from_pretrained(AutoModelForCausalLM.from_pretrained("…"), "saved/by/peft")
        model.load_adapter("another/folder", "other")
        model.set_adapter(["default", "other"])                  # the product of both
        model(input_ids, adapter_names=["other", "__base__"])    # or each row its own

    Vectors are parameters: they move with the model's dtype and device, and train as PEFT's do.
    Every method either does all of what it says or raises and changes nothing. Where PEFT lets a
    wrong name pass, this raises UnknownAdapter. Not thread-safe.
    """

    prefix = "ia3_"

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: object = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,  # noqa: ARG002
    ) -> None:
        """With a config, a new adapter that changes nothing yet is attached and active. Raises
        WrongType for anything but a transformers model, InvalidAdapter."""
        if not isinstance(model, PreTrainedModel):
            raise WrongType(
                f"IA3Model takes a transformers PreTrainedModel, and {type(model).__name__} is "
                "none: its config, embeddings and generate are needed"
            )
        super().__init__()
        self._tuning = Tuning(model)
        self.model = model.requires_grad_(False)
        self.training = model.training
        self.active_adapter: str | list[str] = []
        if isinstance(peft_config, Mapping):
            peft_config = peft_config[adapter_name]
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=False)
            self.set_adapter(adapter_name, self.peft_config[adapter_name].inference_mode)

    def __getattr__(self, name: str) -> Any:
        """The base model's attributes are ours, as in PEFT."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in NOT_SERVED:
                raise AttributeError(f"IA3Model has no {name}: {NOT_SERVED[name]}") from None
            return getattr(super().__getattr__("model"), name)

    @property
    def base_model(self) -> Self:
        """This model itself: in PEFT, `base_model.model` is the base too."""
        return self

    def get_base_model(self) -> PreTrainedModel:
        """Return the base, with the layers of the adapters in it."""
        return self.model

    @property
    def peft_config(self) -> dict[str, IA3Config]:
        return {name: attached.config for name, attached in self._tuning.attached.items()}

    @property
    def active_peft_config(self) -> IA3Config:
        if not self.active_adapters:
            raise WrongCall("No adapter is active: call set_adapter")
        return self.peft_config[self.active_adapters[0]]

    @property
    def adapter_names(self) -> list[str]:
        return list(self._tuning.attached)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._tuning.selection.active)

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self._tuning.selection.enabled and bool(self.active_adapters)

    @property
    def targeted_module_names(self) -> list[str]:
        return self._tuning.wrapped

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged into the base's weights, in at least one layer."""
        return self._tuning.merged

    @property
    def modules_to_save(self) -> set[str] | None:
        configs = self.peft_config.values()
        return {name for config in configs for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.model, "dtype", None)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many numbers are trained now, and how many there are."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        some, all_ = self.get_nb_trainable_parameters()
        share = 100 * some / all_
        print(f"trainable params: {some:,d} || all params: {all_:,d} || trainable%: {share:.4f}")

    # Attaching.

    def add_adapter(
        self, adapter_name: str, peft_config: object, autocast_adapter_dtype: bool = True
    ) -> None:
        """Attach a new adapter for training: ones, and copies of its `modules_to_save`.

        It is not active yet. Raises AdapterExists, InvalidAdapter, WrongType.
        """
        self._check_new(adapter_name)
        config = config_of(peft_config)
        fresh = self._tuning.fresh(config)
        self._tuning.attach(adapter_name, config, fresh, autocast=autocast_adapter_dtype)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,  # noqa: ARG002
        *,
        subfolder: str = "",
    ) -> None:
        """Attach what PEFT's `save_pretrained` wrote to a folder. It is not active yet.

        `low_cpu_mem_usage` is PEFT's and changes nothing: vectors are small. Raises InvalidAdapter
        with all faults of the files, AdapterExists.
        """
        self._check_new(adapter_name)
        checkpoint = read_checkpoint(Path(model_id) / subfolder)
        loaded = effective_vectors(checkpoint, self._tuning.modules)
        config = checkpoint.config.model_copy(update={"inference_mode": not is_trainable})
        self._tuning.attach(adapter_name, config, loaded, autocast=autocast_adapter_dtype)
        if not is_trainable:
            self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,  # noqa: ARG003
        *,
        subfolder: str = "",
    ) -> Self:
        """A model with the adapter of a folder attached and active. Raises as `load_adapter`."""
        made = cls(model)
        made.load_adapter(
            model_id, adapter_name, is_trainable, autocast_adapter_dtype, subfolder=subfolder
        )
        made.set_adapter(adapter_name, inference_mode=not is_trainable)
        return made

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
    ) -> None:
        """Write adapters as `PeftModel.save_pretrained` does: `default` into the folder itself,
        others into one of their name in it. Raises WrongCall, UnknownAdapter."""
        folder = Path(save_directory)
        if not safe_serialization:
            raise WrongCall("Adapters are saved as safetensors only: a pickle can run code")
        names = self.adapter_names if selected_adapters is None else list(selected_adapters)
        checkpoints = {name: self._tuning.checkpoint(self._known(name)) for name in names}
        if folder.is_file():
            raise WrongCall(f"{folder} is a file; name a folder")
        for name, checkpoint in checkpoints.items():
            write_checkpoint(checkpoint, folder if name == "default" else folder / name)

    # Activating.

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or the product of several, active for every row.

        Their parameters train, unless `inference_mode`. Merged adapters are unmerged first. Raises
        UnknownAdapter, CannotCombine.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name, or_base=True)
        self._tuning.activate(names, trains=not inference_mode)
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else names

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was the last active one, the first of the others by name
        becomes active, as in PEFT. Raises UnknownAdapter; WrongCall while it is merged."""
        self._known(adapter_name)
        if adapter_name in self._tuning.merged:
            raise WrongCall(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please "
                "unmerge them first."
            )
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            if not left:
                left = sorted(name for name in self._tuning.attached if name != adapter_name)[:1]
                if left:
                    warnings.warn(
                        f"Adapter {adapter_name} was active which is now deleted. Setting active "
                        f"adapter to {left[0]}.",
                        stacklevel=2,
                    )
            self._tuning.select(left, trains=True)
            self.active_adapter = left
        self._tuning.drop(adapter_name)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Set whether these adapters train. Raises UnknownAdapter."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in [self._known(name) for name in names]:
            self._tuning.require_grad(name, requires_grad)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters. The next forward unmerges those that are merged."""
        self._tuning.enable(False)

    def enable_adapter_layers(self) -> None:
        self._tuning.enable(True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable all adapters within the block."""
        was_enabled = self._tuning.selection.enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if was_enabled:
                self.enable_adapter_layers()

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise WrongType("An adapter's name is a text of one character at least")
        if name in self._tuning.attached or name == BASE_NAME:
            raise AdapterExists(name)

    def _known(self, name: str, *, or_base: bool = False) -> str:
        if name not in self._tuning.attached and not (or_base and name == BASE_NAME):
            raise UnknownAdapter(name)
        return name

    # Running.

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the base model's forward. With `adapter_names`, row i uses the i-th adapter
        ("__base__": none), as in PEFT's mixed batches of LoRA."""
        with self._rows(adapter_names, args, kwargs):
            return self.model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Run the base model's `generate`. `adapter_names` are as in `forward`: one a prompt, also
        where it has several beams or returned sequences."""
        generate = cast(Callable[..., Any], self.model.generate)
        with self._rows(adapter_names, args, kwargs):
            return generate(*args, **kwargs)

    @contextmanager
    def _rows(
        self, names: Sequence[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        if names is not None:
            if not isinstance(names, list | tuple):
                raise WrongType(f"Got adapter names of type {type(names)}, expected a list of str.")
            if self.training:
                raise WrongCall("Cannot pass `adapter_names` when the model is in training mode.")
            for name in names:
                self._known(name, or_base=True)
            self._tuning.check_rows(names, args, kwargs)
        if not self._tuning.selection.enabled:
            self._tuning.unmerge("Adapters are disabled.")
        if names is None:
            yield
        else:
            with self._tuning.by_row(names):
                yield

    # Merging and mixing.

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Multiply these adapters' vectors, or the active ones', into the base's weights. Raises
        UnknownAdapter, WrongType; WrongCall where `safe_merge` finds a weight that is not finite.
        """
        self._tuning.merge(self._to_merge(adapter_names), safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Divide the base's weights by the merged vectors, which rounds as in PEFT."""
        self._tuning.unmerge("Unmerging.")

    def merge_and_unload(
        self,
        progressbar: bool = False,  # noqa: ARG002
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> PreTrainedModel:
        """Return the base with these adapters, or the active ones, in its weights; this model has
        no adapters then. `progressbar` is ignored. Raises what `merge_adapter` raises."""
        self._tuning.merge(self._to_merge(adapter_names), safe=safe_merge)
        self._tuning.leave_copies()
        self.active_adapter = []
        return self.model

    def unload(self) -> PreTrainedModel:
        """Return the base without the layers of adapters; what is merged stays in its weights."""
        self._tuning.undo()
        self.active_adapter = []
        return self.model

    def _to_merge(self, names: Sequence[str] | None) -> list[str]:
        if isinstance(names, str):
            raise WrongType(f"adapter_names should be a list of strings, got {names!r}.")
        if names is None:
            return [name for name in self.active_adapters if name != BASE_NAME]
        return [self._known(name) for name in names]

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Attach the sum of adapters' vectors times their weights; a missing vector counts as 0.

        It is not active. For a taken name PEFT silently does nothing, and it cuts the longer list:
        this raises AdapterExists and WrongCall; also UnknownAdapter, CannotCombine, and
        CombinedNotFinite where PEFT's sum is not finite.
        """
        self._check_new(adapter_name)
        if not adapters or len(adapters) != len(weights):
            raise WrongCall(f"{len(adapters)} adapters and {len(weights)} weights: give one each")
        parts = [self._tuning.attached[self._known(name)] for name in adapters]
        for part in parts:
            for module in part.saved:
                raise CannotCombine(module)
        vectors = self._tuning.weighted(adapters, weights)
        config = united([part.config for part in parts])
        if set(resolve_targets(config, self._tuning.modules)) != vectors.keys():
            # Adapters that disagree about a module's side.
            config = config.model_copy(update=names_of_targets(vectors.keys()))
        self._tuning.attach(adapter_name, config, AdapterVectors(vectors), autocast=False)
