"""The OpenAPI page: complete, and true."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer

Json = dict[str, Any]
EXAMPLES = ("example", "examples")
ERROR = {"$ref": "#/components/schemas/ErrorBody"}
ADMIN_ERRORS = {
    ("post", "/v1/adapters"): {"400", "409", "413", "502", "503", "504", "507"},
    ("get", "/v1/adapters"): {"400"},
    ("get", "/v1/adapters/{name}"): {"404"},
    ("put", "/v1/adapters/{name}"): {"400", "404", "412", "413", "502", "503", "504", "507"},
    ("delete", "/v1/adapters/{name}"): {"404", "412", "503", "507"},
    ("get", "/v1/adapters/{name}/files/{file}"): {"400", "404", "500", "503"},
    ("patch", "/v1/adapters/{name}"): {"400", "404", "409", "412", "500", "503", "507"},
    ("get", "/v1/adapters/{name}/revisions"): {"404"},
    ("post", "/v1/adapters/{name}/rollback"): {"400", "404", "412", "500", "503", "507"},
    ("post", "/v1/adapters/combine"): {"400", "404", "409", "500", "503", "507"},
    ("post", "/v1/merges"): {"400", "404", "409", "429", "500", "503", "507"},
    ("get", "/v1/merges"): {"400"},
    ("get", "/v1/merges/{id}"): {"404"},
    ("get", "/v1/merges/{id}/archive"): {"404", "409", "503"},
    ("delete", "/v1/merges/{id}"): {"404", "503"},
}


@pytest.fixture(scope="module")
def page(server: RunningServer) -> Json:
    return dict(httpx.get(f"{server.base_url}/openapi.json").json())


def operations(page: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def has_example(field: Json) -> bool:
    return any(key in each for each in (field, field.get("schema", {})) for key in EXAMPLES)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_page_loads_and_shows_this_server(client: httpx.Client, path: str) -> None:
    response = client.get(path)

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "Infuse" in response.text
    assert "/openapi.json" in response.text


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


@pytest.mark.parametrize(("method", "path"), ADMIN_ERRORS)
def test_an_admin_route_lists_the_errors_that_it_can_answer(
    page: Json, method: str, path: str
) -> None:
    responses = page["paths"][path][method]["responses"]

    failures = {status for status in responses if not status.startswith("2")}
    assert failures == ADMIN_ERRORS[method, path] | {"401", "403", "default"}


def test_every_admin_route_is_among_them(page: Json) -> None:
    rooms = ("/v1/adapters", "/v1/merges")
    admin = {(method, path) for method, path, _ in operations(page) if path.startswith(rooms)}

    assert admin == ADMIN_ERRORS.keys()


def test_every_error_has_the_one_shape(page: Json) -> None:
    for method, path, operation in operations(page):
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                where = (method, path, status)
                assert response["content"]["application/json"]["schema"] == ERROR, where
                assert response["description"], where


def test_no_status_is_promised_that_never_comes(page: Json) -> None:
    assert all("422" not in operation["responses"] for _, _, operation in operations(page))
    assert "HTTPValidationError" not in page["components"]["schemas"]


def test_the_page_says_where_a_key_goes(page: Json) -> None:
    [scheme] = page["components"]["securitySchemes"].values()

    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for _, path, operation in operations(page):
        assert ("security" in operation) == path.startswith("/v1/"), path
