"""Random JSON schemas in mixed batches of 32: every answer parses and validates."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from infuse.server.engine import FinishReason
from tests.engine.harness import Harness
from tests.factories import tiny_model

ROWS = 32
FREE = 12
"""Rows of each batch without a schema."""
NAMES = ["name", "age", "größe", "a b", 'say "so"', "$id", "tags", "x"]


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose answers are short: a tiny model's tokens are bytes."""
    kinds = [_text, _whole, _number, _simple, _fixed, _formatted]
    if depth > 0:
        kinds += [_object, _object, _object, _list, _either]
    schema = rng.choice(kinds)(rng, depth - 1)
    if rng.random() < 0.2:
        schema |= {"title": "A title", "description": "What it is.", "default": None}
    return schema


def _text(rng: random.Random, _: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        pattern = rng.choice(["^[a-z]{2,5}$", "^(yes|no)$", "^[A-Z][0-9]{3}$", "^é?a{1,3}$"])
        return {"type": "string", "pattern": pattern}
    least = rng.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(8)}


def _whole(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randrange(-1000, 1000)
    limit = rng.choice(["maximum", "exclusiveMaximum"])
    return {"type": "integer", "minimum": least, limit: least + rng.randrange(1, 5000)}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "number", "minimum": rng.randrange(10), "maximum": rng.randrange(10, 1000)}


def _simple(rng: random.Random, _: int) -> dict[str, Any]:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])


def _fixed(rng: random.Random, _: int) -> dict[str, Any]:
    values = [1, -2.5, True, None, "yes", "größe", 'say "so"\n', [1, "a"], {"a": {"b": []}}]
    if rng.random() < 0.3:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _formatted(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(["date", "ipv4", "uuid", "time", "date-time"])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randrange(5))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        first = [random_schema(rng, depth) for _ in range(rng.randrange(1, 3))]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}
    least = rng.randrange(2)
    most = least + rng.randrange(3)
    return {
        "type": "array",
        "items": random_schema(rng, depth),
        "minItems": least,
        "maxItems": most,
    }


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"anyOf": [random_schema(rng, depth), random_schema(rng, depth)]}
    names = {"type": "object", "properties": {"next": {"$ref": "#/$defs/it"}}}
    return names | {"$defs": {"it": random_schema(rng, 0)}, "additionalProperties": False}


def rooted(schema: dict[str, Any]) -> dict[str, Any]:
    """With the definitions where references look for them."""
    found: dict[str, Any] = {}

    def lift(each: Any) -> Any:
        if isinstance(each, list):
            return [lift(one) for one in each]
        if not isinstance(each, dict):
            return each
        if "$defs" in each:
            name = f"it{len(found)}"
            found[name] = each["$defs"]["it"]
            return {
                "type": "object",
                "properties": {"next": {"$ref": f"#/$defs/{name}"}},
                "additionalProperties": False,
            }
        return {key: lift(value) for key, value in each.items()}

    lifted = lift(schema)
    return {**lifted, "$defs": found} if found else lifted


@pytest.mark.parametrize(
    "schemas", [40, pytest.param(500, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_answers_validate_and_rows_without_a_schema_are_untouched(
    start: Callable[..., Harness], schemas: int
) -> None:
    harness = start(tiny_model("llama", max_position_embeddings=2048), {}, max_rows=ROWS)
    rng = random.Random(schemas)
    for _ in range(schemas // (ROWS - FREE)):
        asked = [rooted(random_schema(rng)) for _ in range(ROWS - FREE)]
        free = [run_batch(harness, each) for each in ([None] * len(asked), asked)]
        assert free[0] == free[1]
    harness.assert_idle()


def run_batch(harness: Harness, schemas: list[dict[str, Any] | None]) -> list[list[int]]:
    """Check the answers of a batch; give the tokens of its rows without a schema."""
    with harness.held():
        for row in range(FREE):
            temperature = row % 2 * 0.9
            harness.submit(f"free-{row}", [9 + row], max_tokens=60, temperature=temperature, seed=1)
        for row, schema in enumerate(schemas):
            grammars = harness.engine.grammars
            grammar = None if schema is None else grammars.compile("json", schema, str(schema))
            limit = 60 if schema is None else 1500
            harness.submit(
                str(row),
                [9 + row],
                max_tokens=limit,
                temperature=1.0,
                seed=row,
                ignore_eos=schema is None,
                grammar=grammar,
            )
    harness.wait()
    for row, schema in enumerate(schemas):
        answer = harness.answers.pop(str(row))
        if schema is not None:
            assert answer.finish is FinishReason.STOP, (schema, answer.text, answer.error)
            checks = Draft202012Validator(
                schema, format_checker=Draft202012Validator.FORMAT_CHECKER
            )
            checks.validate(json.loads(answer.text))
    return [harness.answers.pop(f"free-{row}").tokens for row in range(FREE)]
