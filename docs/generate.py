"""Writes the pages that say what the code says: `python docs/generate.py`.

They are the pages of `docs/reference/` but those of models, and the list of decisions.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from infuse.adapters import errors as adapter_errors
from infuse.adapters.registry import RegistryStats
from infuse.server.cli import app
from infuse.server.commands.settings import grouped, in_words
from infuse.server.config_file import flag_of
from infuse.server.engine import EngineStats
from infuse.server.engine import errors as engine_errors
from infuse.server.errors import ApiError, ErrorDetail, ErrorInfo, error_body
from infuse.server.observability.metrics import Metrics, build_info
from infuse.server.on_ray.settings import DeploySettings

DOCS = Path(__file__).parent
SERVER = DOCS.parent / "server"
_WRITTEN = "Written by `python docs/generate.py`; do not edit."
_OTHER_VARIABLES = {
    "`INFUSE_URL`, `INFUSE_API_KEY`": "Where [`infuse adapters`, `infuse merges` and `infuse "
    "chat`](cli.md) find the server, and the key that they send.",
    "`INFUSE_CACHE_DIR`": "Where converted and compiled models are kept, and local copies of what "
    "is in a bucket. Default: `~/.cache/infuse`.",
    "`HF_TOKEN`, `AWS_*`, `GOOGLE_*`, `AZURE_*`": "Credentials for the hub and for buckets, as "
    "their own tools read them.",
    "`OTEL_*`": "Where [traces](../guide/production.md#traces) and "
    "[metrics](../guide/production.md#metrics-over-otlp) are sent, and which of them, as "
    "OpenTelemetry's SDK reads them.",
    "`FORWARDED_ALLOW_IPS`": "Addresses of [proxies](../guide/operations.md#behind-a-proxy) "
    "that may say in `X-Forwarded-For` who their client is. Default: this machine's.",
    "`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`": "How long threads that compute wait for each other "
    "before they sleep. Infuse sets the first one where you set neither "
    "([decision 28](../decisions/0028-short-waits.md)).",
}


def pages() -> dict[Path, str]:
    """Every page that is written here, with its text."""
    return {
        DOCS / "reference" / "settings.md": settings_page(),
        DOCS / "reference" / "errors.md": errors_page(),
        DOCS / "reference" / "metrics.md": metrics_page(),
        DOCS / "reference" / "cli.md": cli_page(),
        DOCS / "decisions" / "README.md": decisions_page(),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def page(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts) + "\n"


# Settings.


def settings_page() -> str:
    fields = DeploySettings.model_json_schema()["properties"]
    head = ["flag", "default", "what it does"]
    parts = []
    for title, names in grouped(DeploySettings).items():
        rows = table(head, _settings_rows({name: fields[name] for name in names}))
        parts += [f"## {title}", rows] if title else [rows]
    return page(
        "# Settings",
        _WRITTEN,
        "Each is a flag of `infuse serve`, `infuse deploy` and `infuse warm`, and an environment "
        "variable, and a key of the config file: `--max-model-len` is `INFUSE_MAX_MODEL_LEN` and "
        "`max-model-len`. A flag wins over its variable, the variable over the file, and an empty "
        "variable counts as none. A switch is turned off by `--no-…`, as in `--no-prefix-cache`, "
        "by `INFUSE_PREFIX_CACHE=false`, or by `prefix-cache = false` in the file. What is under "
        "Replicas is for `infuse deploy`, whose replicas each have all the others.",
        *parts,
        "## Other variables",
        table(
            ["variable", "what it does"],
            _OTHER_VARIABLES.items(),
        ),
    )


def _settings_rows(fields: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, field in fields.items():
        default = field["default"]
        value = _value(default if isinstance(default, bool) else in_words(name, default))
        yield f"`--{flag_of(name)}`", value, f"{field['description']} {_range(field)}"


def _value(default: Any) -> str:
    match default:
        case None | "":
            return "–"
        case bool():
            return "on" if default else "off"
        case _:
            return f"`{default}`"


def _range(field: dict[str, Any]) -> str:
    """What a value must keep to."""
    if "enum" in field:
        return f"One of {', '.join(f'`{each}`' for each in field['enum'])}."
    kinds = [field, *field.get("anyOf", [])]
    bounds = {key: value for kind in kinds for key, value in kind.items()}
    words = {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
    }
    said = [text.format(f"{bounds[key]:,}") for key, text in words.items() if key in bounds]
    return f"({', '.join(said)})" if said else ""


# Errors.


@dataclass(frozen=True, order=True)
class Refusal:
    """One way in which the server refuses, as its code has it."""

    status: int
    code: str
    when: str
    """What our own error says of itself, or the message."""


def errors_page() -> str:
    found = sorted({each for path in SERVER.rglob("*.py") for each in refusals(path)})
    parts = []
    for status, group in groupby(found, lambda each: each.status):
        kind = json.loads(error_body(ApiError(status, "")))["error"]["type"]
        rows = [
            [f"`{code}`", " ".join(each.when for each in same if each.when != "…")]
            for code, same in groupby(group, lambda each: each.code)
        ]
        parts += [
            f"## {status}",
            f"`type` is `{kind}`.",
            table(["code", "when, or the message"], rows),
        ]
    shape = {
        f"`{prefix}{name}`": field.description or ""
        for prefix, model in {"": ErrorInfo, "details[].": ErrorDetail}.items()
        for name, field in model.model_fields.items()
    }
    return page(
        "# HTTP errors", _WRITTEN, _SHAPE, table(["field", ""], shape.items()), _HEADERS, *parts
    )


def refusals(path: Path) -> Iterator[Refusal]:
    """Each `ApiError(status, message, code=…)` in a file, and each line of a table of errors."""
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    yield from _refusals_in(tree, "", dict(functions))


def _refusals_in(node: ast.AST, when: str, known: dict[str, ast.AST]) -> Iterator[Refusal]:
    """`when`: what the errors of the surrounding `case` say of themselves. `known`: what names
    stand for; a walk in the source's order keeps the value that was assigned last."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            known[name] = value
        case ast.match_case():
            classes = [each for each in ast.walk(node.pattern) if isinstance(each, ast.MatchClass)]
            when = " ".join(_ERRORS.get(each.cls.id, "") for each in classes)
        case ast.Call(func=ast.Name(id="ApiError"), args=[ast.Constant(status), message]):
            for each in node.keywords:
                if each.arg == "code" and isinstance(each.value, ast.Constant):
                    yield Refusal(status, each.value.value, when or _text(message, known))
        case ast.AnnAssign(target=ast.Name(id="SOURCE_ERRORS"), value=ast.Dict() as errors):
            for name, answer in zip(errors.keys, errors.values, strict=True):
                yield Refusal(*ast.literal_eval(answer), _ERRORS[name.id])
    for child in ast.iter_child_nodes(node):
        yield from _refusals_in(child, when, known)


def _text(message: ast.AST, known: Mapping[str, ast.AST]) -> str:
    """A message as the code writes it, with `…` for what it fills in."""
    match message:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, {}) for part in parts)
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name in known:
            return _text(known[name], {})
        case ast.FunctionDef(body=[*_, ast.Return(value=text)]):
            return _text(text, {})
        case ast.Call(func=ast.Name(id="str"), args=[ast.Call(func=ast.Name(id=name))]):
            return _ERRORS[name]
        case _:
            return "…"


def _drawn(module: ModuleType) -> dict[str, str]:
    """The tree of errors at the top of a module: class -> what it says of it, as a sentence."""
    lines = re.findall(r"[├└]── (\w+)\s+(.+)", module.__doc__ or "")
    return {name: f"{text[0].upper()}{text[1:]}." for name, text in lines}


_ERRORS = _drawn(adapter_errors) | _drawn(engine_errors)
_SHAPE = """\
Every error has OpenAI's shape, also as an event within a stream. Only the routes of
[Anthropic's](../guide/generation.md#anthropics-messages-api) and
[Ollama's](../guide/generation.md#ollamas-api) APIs have theirs, with the same statuses.

```json
{"error": {"message": "…", "type": "…", "param": "…", "code": "…",
           "details": [{"field": "…", "problem": "…", "fix": "…"}]}}
```"""
_HEADERS = """\
429 and 503 carry `Retry-After` in seconds, 401 `WWW-Authenticate`, 405 `Allow`, and 412 the
adapter's `ETag` of now. `invalid_request` is for a body or a query with faults, which `details`
lists; `request_timeout` also for a body that comes too slowly. A 400 for one field may have no
code: `param` names the field, and the message says how to mend it. A 500 without a code is a
fault of the server, whose log says more. In the tables `…` stands for what differs."""


# Metrics.


def metrics_page() -> str:
    families = sorted(_families(), key=lambda family: family.name)
    rows = []
    for family in families:
        labels = sorted({each for sample in family.samples for each in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(
            [f"`{name}`", family.type, ", ".join(f"`{e}`" for e in labels), family.documentation]
        )
    return page(
        "# Metrics",
        _WRITTEN,
        "`GET /metrics` answers in Prometheus' text format. Where the server has keys, it needs "
        "one with the role `metrics` or `admin`. A histogram has `_bucket`, `_sum` and `_count`.",
        table(["name", "kind", "labels", "what it says"], rows),
        _LABELS,
    )


_LABELS = """\
`adapter` is the adapter's name, or the base's; `mixture` for several at once. The first hundred
names that requests use have series of their own, all further ones are `other`. `outcome` is `stop`,
`length`, `cancelled`, `constraint`, `timeout` or `error`. `route` is a path of the API as its
OpenAPI document writes it, or `other`. `promtool check metrics` accepts all but the names that
begin with `vllm:`, which inference gateways have set. The repository's folder `deploy/monitoring/`
has a dashboard of these, and [alerts](../guide/alerts.md)."""


def _families() -> Iterator[Metric]:
    """What a server exposes once a request has ended; values mean nothing."""
    required = [field.name for field in fields(EngineStats) if field.default is MISSING]
    engine = EngineStats(**dict.fromkeys(required, 1))
    registry = RegistryStats(**{field.name: 1 for field in fields(RegistryStats)})
    metrics = Metrics(lambda: engine, lambda: registry, build_info("native"))
    request = metrics.generation.request_started("base")
    request.started(0.0)
    request.token(1)
    metrics.http.requests.labels("GET", "/v1/models", "200").inc()
    metrics.http.seconds.labels("/v1/models").observe(0)
    metrics.http.refused_connections.labels("request_timeout").inc()
    request.finished("stop", 1, 2)
    for family in text_string_to_metric_families(metrics.expose().decode()):
        if not family.name.endswith("_created"):
            yield family


# The command line.


def cli_page() -> str:
    parts = []
    for names, command in _commands(typer.main.get_command(app), ("infuse",)):
        parts += [f"## {' '.join(names)}", *_command(names, command)]
    return page(
        "# Command line",
        _WRITTEN,
        "What went wrong is said on the standard error output. The exit status is 2 where the "
        "arguments, or the settings or the model of `infuse serve`, `infuse deploy` and `infuse "
        "warm`, cannot be used; 1 where the server refuses or cannot be reached, a merge fails, a "
        "keys file cannot be used, a model does not compile, or the model of a "
        "running server ends or hangs.",
        *parts,
    )


def _commands(command: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command that does something, with the words that call it."""
    inner = getattr(command, "commands", {})
    if not inner:
        yield names, command
    for name, each in inner.items():
        yield from _commands(each, (*names, name))


def _command(names: tuple[str, ...], command: Any) -> list[str]:
    about, _, example = (command.help or "").partition("Example: ")
    examples = "\n".join(example.replace("Example: ", "").split("\n\n"))
    rows = [row for row in map(_parameter, command.params) if row is not None]
    has_settings = names[-1] in ("serve", "deploy", "warm")
    takes = ["Every setting: [Settings](settings.md)."] if has_settings else []
    return [
        about,
        *([f"```console\n{examples}\n```"] if examples else []),
        *([table(["argument", "default", "what it is"], rows)] if rows else takes),
    ]


def _parameter(parameter: Any) -> list[str] | None:
    is_option = parameter.param_type_name == "option"
    name = parameter.opts[0] if is_option else parameter.name.upper()
    default = parameter.default if is_option else None
    if callable(default):
        default = default()
    variable = f" Or `{parameter.envvar}`." if is_option and parameter.envvar else ""
    return [f"`{name}`", _value(default), f"{parameter.help or ''}{variable}"]


# Decisions.


def decisions_page() -> str:
    rows = []
    for path in sorted((DOCS / "decisions").glob("0*.md")):
        title, said = path.read_text().split("\n\n")[:2]
        number, _, text = title.removeprefix("# ").partition(". ")
        found = _STATUS.fullmatch(" ".join(said.split()))
        assert found, f"{path} begins with a title, then its status: {_STATUS.pattern}"
        rows.append([number, f"[{text}]({path.name})", found["date"], found["status"]])
    return page(
        "# Decisions", _WRITTEN, _DECISIONS, table(["", "decision", "date", "status"], rows)
    )


_STATUS = re.compile(
    r"Status: (?P<status>(accepted|superseded by \[\d+\]\(\S+\))(; .+)?) "
    r"\((?P<date>\d{4}-\d{2}-\d{2})\)\."
)
_DECISIONS = """\
What cost something to decide: the context, the choice, what was measured, what would change it. A
decision stays within a page; long measurements, and what was tried without gain, are in the
[lab](../lab/README.md). The date is the day on which the page was first written. There is no 16."""


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
