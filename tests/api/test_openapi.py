"""The OpenAPI document is complete and true."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_type_hints

import httpx
import pytest

from infuse.adapters.errors import AdapterError, Fault
from infuse.server.engine.errors import EngineError
from infuse.server.errors import from_adapter_error, from_engine_error
from tests.api.conftest import RunningServer
from tests.api.documented import Document

Json = dict[str, Any]
E = TypeVar("E", bound=Exception)
EXAMPLES = ("example", "examples")
ERRORS = {
    "/v1/messages": "AnthropicErrorBody",
    "/v1/messages/count_tokens": "AnthropicErrorBody",
    "/api/chat": "OllamaErrorBody",
    "/api/generate": "OllamaErrorBody",
    "/api/show": "OllamaErrorBody",
    "/api/tags": "OllamaErrorBody",
    "/api/ps": "OllamaErrorBody",
    "/api/version": "OllamaErrorBody",
}
"""Paths whose errors do not have OpenAI's form."""
KEYED = (401, 403, 429, 503)
"""No key, one that may not or that asks too much at once; and the server may be stopping."""
BODY = (408, 413)
"""One that comes too slowly, or is too large."""
STATUSES = {
    ("post", "/v1/completions"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/v1/chat/completions"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/v1/responses"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("get", "/v1/responses/{id}"): {*KEYED, 404},
    ("delete", "/v1/responses/{id}"): {*KEYED, 404},
    ("post", "/v1/messages"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/v1/messages/count_tokens"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/api/chat"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/api/generate"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/api/show"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("get", "/api/tags"): {200, *KEYED},
    ("get", "/api/ps"): {200, *KEYED},
    ("get", "/api/version"): {200, *KEYED},
    ("post", "/v1/rank"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/tokenize"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("post", "/detokenize"): {200, 400, *KEYED, 404, *BODY, 500, 504, 507},
    ("get", "/tokenizer_info"): {200, *KEYED},
    ("post", "/v1/embeddings"): {200, 400, *KEYED, *BODY},
    ("get", "/v1/models"): {200, 400, *KEYED},
    ("get", "/v1/models/{model}"): {200, *KEYED, 404},
    ("post", "/v1/adapters"): {200, 201, 400, *KEYED, 409, *BODY, 502, 504, 507},
    ("get", "/v1/adapters"): {200, 400, *KEYED},
    ("post", "/v1/adapters/combine"): {201, 400, *KEYED, 404, 409, *BODY, 500, 507},
    ("get", "/v1/adapters/{name}/vectors"): {200, 400, *KEYED, 404, 500, 507},
    ("post", "/v1/adapters/vectors"): {200, 400, *KEYED, 404, *BODY, 500, 507},
    ("post", "/v1/adapters/similarity"): {200, 400, *KEYED, 404, *BODY, 500, 507},
    ("get", "/v1/adapters/{name}"): {200, 400, *KEYED, 404},
    ("put", "/v1/adapters/{name}"): {200, 400, *KEYED, 404, 412, *BODY} | {500, 502, 504, 507},
    ("patch", "/v1/adapters/{name}"): {200, 400, *KEYED, 404, 409, 412, *BODY, 500, 507},
    ("delete", "/v1/adapters/{name}"): {204, 400, *KEYED, 404, 412, 507},
    ("get", "/v1/adapters/{name}/revisions"): {200, 400, *KEYED, 404},
    ("post", "/v1/adapters/{name}/rollback"): {200, 400, *KEYED, 404, 412, *BODY, 500, 507},
    ("get", "/v1/adapters/{name}/files/{file}"): {200, 206, 400, *KEYED, 404, 416} | {500, 507},
    ("post", "/v1/merges"): {202, 400, *KEYED, 404, 409, *BODY, 500, 507},
    ("get", "/v1/merges"): {200, 400, *KEYED},
    ("get", "/v1/merges/{id}"): {200, 400, *KEYED, 404},
    ("delete", "/v1/merges/{id}"): {204, 400, *KEYED, 404},
    ("get", "/v1/merges/{id}/archive"): {200, 400, *KEYED, 404, 409},
    ("get", "/health"): {200, 503},
    ("get", "/health/live"): {200, 503},
    ("get", "/health/ready"): {200, 503},
    ("get", "/v1/usage"): {200, 400, *KEYED, 500},
    ("get", "/debug/batch"): {200, *KEYED},
    ("get", "/debug/slowest"): {200, 400, *KEYED},
    ("get", "/metrics"): {200, *KEYED},
}
"""Of each operation, what it may answer. That every answer of every test is among them is seen by
`tests.api.documented`."""


@pytest.fixture(scope="module")
def page(server: RunningServer) -> Json:
    return dict(httpx.get(f"{server.base_url}/openapi.json").json())


def operations(page: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def below(root: type[E]) -> Iterator[type[E]]:
    """The kinds of error that are raised: those that have no kinds below them."""
    for each in root.__subclasses__():
        yield from below(each) if each.__subclasses__() else [each]


def made(kind: type[E]) -> E:
    """An error with something in each of its fields."""
    some = {str: "x", int: 1, float: 1.0, Sequence[Fault]: [Fault("weights", "are missing")]}
    hints = get_type_hints(kind.__init__)
    return kind(*(some[hint] for name, hint in hints.items() if name != "return"))


def has_example(field: Json) -> bool:
    return any(key in each for each in (field, field.get("schema", {})) for key in EXAMPLES)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_page_shows_this_server_and_needs_no_other(client: httpx.Client, path: str) -> None:
    response = client.get(path)

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "Infuse" in response.text
    assert "/openapi.json" in response.text
    assert "//" not in re.sub("<!--.*?-->", "", response.text)
    used = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert len(used) >= 2
    for each in used:
        assert client.get(each).status_code == 200, each


def test_every_field_of_every_schema_is_described_with_an_example(page: Json) -> None:
    fields = {
        f"{schema}.{name}": field
        for schema, shape in page["components"]["schemas"].items()
        for name, field in shape.get("properties", {}).items()
    }

    assert len(fields) > 100
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert [name for name, field in fields.items() if not has_example(field)] == []


def test_every_parameter_is_described_with_an_example(page: Json) -> None:
    parameters = {
        f"{method} {path} {parameter['name']}": parameter
        for method, path, operation in operations(page)
        for parameter in operation.get("parameters", [])
    }

    assert "put /v1/adapters/{name} if-match" in parameters
    assert [name for name, each in parameters.items() if not each.get("description")] == []
    assert [name for name, each in parameters.items() if not has_example(each)] == []


def test_every_part_of_an_upload_is_described_with_an_example(page: Json) -> None:
    for method, path in (("post", "/v1/adapters"), ("put", "/v1/adapters/{name}")):
        body = page["paths"][path][method]["requestBody"]["content"]["multipart/form-data"]
        parts = body["schema"]["properties"]
        assert {"config", "weights", "archive"} <= parts.keys()
        assert ("name" in parts) == (method == "post")
        assert all(part["description"] and part["example"] for part in parts.values())


def test_every_field_of_a_source_is_described_with_an_example(page: Json) -> None:
    for method, path in (("post", "/v1/adapters"), ("put", "/v1/adapters/{name}")):
        body = page["paths"][path][method]["requestBody"]["content"]["application/json"]
        fields = body["schema"]["properties"]
        assert fields.keys() == ({"source", "name"} if method == "post" else {"source"})
        assert all(field["description"] and has_example(field) for field in fields.values())
        assert "not allowed" in page["paths"][path][method]["responses"]["403"]["description"]


def test_every_operation_says_what_it_does(page: Json) -> None:
    for method, path, operation in operations(page):
        assert operation["summary"], (method, path)
        assert operation["description"], (method, path)
        assert operation["tags"], (method, path)


def test_every_operation_names_each_of_its_statuses_and_no_other(page: Json) -> None:
    named = {
        (method, path): {int(status) for status in operation["responses"]}
        for method, path, operation in operations(page)
    }

    assert named == STATUSES


def test_every_error_of_ours_is_one_that_some_operation_names() -> None:
    errors = {from_adapter_error(made(each)).status for each in below(AdapterError)}
    errors |= {from_engine_error(made(each)).status for each in below(EngineError)}

    assert errors <= set.union(*STATUSES.values())


def test_every_error_has_the_form_of_its_api(page: Json) -> None:
    for method, path, operation in operations(page):
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                where = (method, path, status)
                form = {"$ref": f"#/components/schemas/{ERRORS.get(path, 'ErrorBody')}"}
                assert response["content"]["application/json"]["schema"] == form, where
                assert response["description"], where


def test_no_status_is_promised_that_never_comes(page: Json) -> None:
    assert all("422" not in operation["responses"] for _, _, operation in operations(page))
    assert "HTTPValidationError" not in page["components"]["schemas"]


def test_the_page_says_where_a_key_goes(page: Json) -> None:
    bearer, header = page["components"]["securitySchemes"].values()

    assert (bearer["type"], bearer["scheme"]) == ("http", "bearer")
    assert (header["type"], header["in"], header["name"]) == ("apiKey", "header", "x-api-key")
    for _, path, operation in operations(page):
        is_open = path.startswith("/health") or path == "/metrics"
        assert len(operation.get("security", [])) == (0 if is_open else 2), path


@pytest.mark.parametrize(
    ("path", "strays"),
    [("/v1/models", 1), ("/v1/adapters/a/b/c", 0), ("/v1/adapters/a/files/b/c", 0), ("/v2", 0)],
)
def test_a_404_is_documented_where_the_document_has_the_path(
    client: httpx.Client, path: str, strays: int
) -> None:
    """Though it says that there is nothing, as for a path that there is not."""
    document = Document(client.get("/openapi.json").json())
    answer = client.get("/v2")

    found = document.strays("GET", path, 404, answer.headers, answer.content)

    assert len(found) == strays
