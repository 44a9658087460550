"""PEFT's `adapter_config.json`: read, checked, and written back unchanged."""

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from infuse.adapters.errors import Fault, InvalidAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TEXT_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    "added_tokens.json",
    CHAT_TEMPLATE_FILE,
)
"""Files that may lie beside an adapter's two. `added_tokens.json` repeats `tokenizer.json`."""
README_FILE = "README.md"
SIGNATURE_FILE = "model.sig"
FILES = (CONFIG_FILE, WEIGHTS_FILE, *TEXT_FILES, README_FILE, SIGNATURE_FILE)
"""All files of an adapter that are kept."""

Names = list[str] | str | None
"""Module names or suffixes; or one regular expression; or None, PEFT's default for the model."""


class IA3Config(BaseModel):
    """PEFT's `IA3Config`. Unknown fields are kept unchanged."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    peft_type: Literal["IA3"] = "IA3"
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    @field_validator("target_modules", "exclude_modules", "feedforward_modules", mode="before")
    @classmethod
    def _sets_are_lists(cls, names: object) -> object:
        """Accept sets, which PEFT's own config has."""
        return sorted(names) if isinstance(names, set) else names

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> Self:
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, list) and isinstance(feedforward, list):
            # PEFT 0.14 and later shorten the targets alone, and then refuse what they have written.
            known = frozenset(targets)
            stray = sorted(name for name in feedforward if known.isdisjoint(_ends_of(name)))
            if stray:
                raise ValueError(
                    f"feedforward_modules must be a subset of target_modules; not in it: {stray}"
                )
        return self

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a config file's bytes. Raises InvalidAdapter with every fault."""
        return cls._check(_json_object(data))

    @classmethod
    def _check(cls, values: dict[str, Any]) -> Self:
        kind = values.get("peft_type")
        if kind != "IA3":
            problem = f"{CONFIG_FILE} describes {_shown(kind)}, and Infuse serves IA3 adapters only"
            raise InvalidAdapter([Fault("peft_type", problem, "train with peft.IA3Config")])
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = {_field(e["loc"]): _problem(e["msg"]) for e in error.errors()}
            faults = [Fault(field, problem, _fix(problem)) for field, problem in problems.items()]
            raise InvalidAdapter(faults) from None

    def dump(self) -> bytes:
        """Return the file as PEFT writes it."""
        return json.dumps(dict(self), indent=2, sort_keys=True).encode()


def _ends_of(name: str) -> list[str]:
    """Return a module's name, and what follows each of its dots: the first 64, as no model nests
    more deeply."""
    parts = name.split(".", 64)
    return [".".join(parts[start:]) for start in range(len(parts))]


def _json_object(data: bytes) -> dict[str, Any]:
    fix = "write the file with PEFT's save_pretrained"
    if len(data) > MAX_CONFIG_BYTES:
        problem = f"{len(data)} bytes is more than a config's limit of {MAX_CONFIG_BYTES}"
        raise InvalidAdapter([Fault(CONFIG_FILE, problem, fix)])
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter([Fault(CONFIG_FILE, f"is no JSON: {error}", fix)]) from None
    if not isinstance(values, dict):
        raise InvalidAdapter([Fault(CONFIG_FILE, "is no JSON object", fix)])
    return values


def check_texts(config: IA3Config) -> None:
    """Raises InvalidAdapter where a config's text cannot be sent in an answer: JSON can contain
    half of a surrogate pair, which is no character."""
    fix = "write whole characters"
    faults = [
        Fault(name[:80].encode(errors="backslashreplace").decode(), problem, fix)
        for name, value in dict(config).items()
        if (problem := _undecodable(name) or _undecodable(value))
    ]
    if faults:
        raise InvalidAdapter(faults)


def _undecodable(value: object) -> str | None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"has half of a surrogate pair, {error.object[error.start : error.end]!r}"
    except RecursionError:
        return "is nested too deeply"
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _field(location: tuple[int | str, ...]) -> str:
    return str(location[0]) if location else "feedforward_modules"


def _fix(problem: str) -> str:
    if "subset of target_modules" in problem:
        return "take them out of feedforward_modules, or add them to target_modules"
    return "write the file with PEFT's save_pretrained"


def _problem(message: str) -> str:
    return message.removeprefix("Value error, ")
