"""Made up requests: ordinary ones with a field of the document, of a wrong kind, or broken."""

import json
import random
from dataclasses import dataclass
from typing import Any

from tests.api.archives import CONFIG, WEIGHTS, form_of, tar_of, zip_of

WRONG = (None, True, -1, 0, 2**64, 1e308, "", "\ud800", "é" * 300, [], {}, [[]], {"a": [None] * 9})
JSON_TYPE = {"Content-Type": "application/json"}
LONGEST = 8
"""Tokens of an answer, where a made up request is not refused."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    sent: dict[str, Any]
    """Arguments of httpx."""
    scratch: str
    """The only adapter that it may make or change."""
    key: str | None = None
    """The Authorization header, where it is not the tenant's."""


def malformed(document: dict[str, Any], tenant: str, choose: random.Random) -> Request:
    """A request of a tenant that nobody should send. It is not always refused."""
    scratch = f"{tenant}/scratch"
    kind = choose.choice(["field", "field", "field", "text", "file", "key", "path"])
    path, plain = choose.choice(list(_plain(tenant, scratch).items()))
    if kind == "field":
        body = plain | _field(document, path, choose)
        content = json.dumps(body).encode()
        return Request("POST", path, {"content": content, "headers": JSON_TYPE}, scratch)
    if kind == "text":
        content = json.dumps(plain).encode()
        cut = content[: choose.randrange(len(content))]
        sent = choose.choice([cut, cut + b"\xff", b"[" * 5000, b"", b"null", b"{}"])
        headers = choose.choice([JSON_TYPE, {"Content-Type": "text/plain"}, {}])
        return Request("POST", path, {"content": sent, "headers": headers}, scratch)
    if kind == "file":
        query = choose.choice([{}, {"dry_run": "true"}, {"dry_run": "perhaps"}])
        sent = {"data": {"name": scratch}, "files": _broken(choose), "params": query}
        return Request("POST", "/v1/adapters", sent, scratch)
    if kind == "key":
        key = choose.choice(["", "Bearer", "Bearer nobody", "Basic eDp5", f"Bearer {'x' * 5000}"])
        return Request("POST", path, {"json": plain}, scratch, key)
    method = choose.choice(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    paths = ["/", "/v1", f"{path}/", "/v1/adapters/%00", "/v1/adapters/a@1", "/v1/merges/../keys"]
    paths += [f"/v1/adapters/{scratch}", "/v1/models/nobody", f"/v1/adapters?limit={2**70}"]
    return Request(method, choose.choice(paths), {"json": plain}, scratch)


def _plain(tenant: str, scratch: str) -> dict[str, dict[str, Any]]:
    """Path -> a body that is right."""
    name = f"{tenant}/a0"
    return {
        "/v1/completions": {"model": name, "prompt": "Once upon", "max_tokens": LONGEST},
        "/v1/chat/completions": {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi."}],
            "max_tokens": LONGEST,
        },
        "/v1/rank": {"model": name, "inputs": [{"prompt": "Two", "choices": [" plus", " and"]}]},
        "/v1/adapters/combine": {"name": scratch, "adapters": [{"name": name}], "method": "ties"},
    }


def _field(document: dict[str, Any], path: str, choose: random.Random) -> dict[str, Any]:
    """A field of the body, with a wrong value or with its example."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    name = choose.choice(list(fields))
    example = fields[name]["examples"][0]
    is_kept = name in ("model", "name", "max_tokens", "max_completion_tokens")
    return {name: choose.choice([*WRONG, *([] if is_kept else [example] * len(WRONG))])}


def _broken(choose: random.Random) -> dict[str, bytes]:
    """An adapter's files, packed in some way, with a byte changed or the end missing."""
    files = {CONFIG: b'{"peft_type": "IA3", "target_modules": ["k_proj"]}', WEIGHTS: bytes(200)}
    packed = choose.choice([form_of, zip_of, tar_of])(files)
    parts = packed if isinstance(packed, dict) else {"archive": packed}
    name = choose.choice(list(parts))
    data = bytearray(parts[name])
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    parts[name] = bytes(data[: choose.choice([None, len(data) // 2])])
    return parts
