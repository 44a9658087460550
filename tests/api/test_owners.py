"""Adapters whose names hold a slash, as on the hub: everywhere that a name goes."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner, Result

from infuse.server.cli import app
from tests.api.archives import CONFIG, WEIGHTS, form_of, read_adapter
from tests.api.conftest import RunningServer
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, Serve, complete, error_of, text_of
from tests.api.stores import place as place
from tests.api.stores import serve as serve
from tests.api.test_streaming import eventually

NAME = "my-org/support.de"


def test_such_an_adapter_lives_as_any_other(serve: Serve, adapter_folders: dict[str, Path]) -> None:
    mlp, queries = adapter_folders["mlp"], adapter_folders["queries"]
    with serve() as client:
        upload(client, "plain", mlp)
        upload(client, "my-org", queries)
        added = upload(client, NAME, mlp)
        assert (added.status_code, added.json()["name"]) == (201, NAME)
        assert added.headers["location"] == f"{ADAPTERS}/{NAME}"
        assert client.get(added.headers["location"]).json()["name"] == NAME
        assert error_of(upload(client, NAME, mlp), 409)["code"] == "adapter_exists"

        text = text_of(client, "plain")
        answer = complete(client, NAME)
        assert answer.headers["infuse-adapter"] == f"{NAME}@1"
        assert answer.json()["choices"][0]["text"] == text
        assert text_of(client, "my-org") != text
        assert f'adapter="{NAME}"' in client.get("/metrics").text

        for slash in ("/", "%2F"):
            path = f"{ADAPTERS}/{NAME.replace('/', slash)}"
            form = form_of(read_adapter(queries if slash == "/" else mlp))
            revision = client.put(path, files=form).json()["revision"]
            assert client.get(path).json()["revision"] == revision
            assert client.patch(path, json={"description": slash}).json()["description"] == slash
            listed = client.get(f"{path}/revisions").json()["data"]
            assert [each["revision"] for each in listed] == list(range(revision, 0, -1))
            for file in (CONFIG, WEIGHTS):
                assert client.get(f"{path}/files/{file}").status_code == 200
            back = client.post(f"{path}/rollback", json={"revision": revision - 1})
            assert back.json()["revision"] == revision + 1
            model = client.get(f"/v1/models/{NAME.replace('/', slash)}")
            assert (model.json()["id"], model.json()["parent"]) == (NAME, "tiny")
        assert text_of(client, f"{NAME}@1") == text
        names = [each["name"] for each in client.get(ADAPTERS).json()["data"]]
        assert names == ["my-org", NAME, "plain"]
        page = client.get(ADAPTERS, params={"limit": 1, "after": "my-org"}).json()
        assert (page["data"][0]["name"], page["next"]) == (NAME, NAME)
        assert NAME in [each["id"] for each in client.get("/v1/models").json()["data"]]
    with serve() as client:
        assert text_of(client, f"{NAME}@1") == text
        assert client.delete(f"{ADAPTERS}/my-org%2Fsupport.de").status_code == 204
        assert client.get(f"{ADAPTERS}/{NAME}").status_code == 404
        assert client.get(f"{ADAPTERS}/my-org").status_code == 200


def test_it_is_combined_mixed_merged_and_asked_for_by_clients(
    serve: Serve, adapter_folders: dict[str, Path]
) -> None:
    with serve() as client:
        upload(client, NAME, adapter_folders["mlp"])
        parts = [{"name": f"{NAME}@1", "weight": 1.0}]
        recipe = {"name": "my-org/new", "adapters": parts, "method": "linear"}
        made = client.post(f"{ADAPTERS}/combine", json=recipe)
        assert made.headers["location"] == f"{ADAPTERS}/my-org/new"
        assert made.json()["recipe"]["adapters"][0]["name"] == f"{NAME}@1"
        assert text_of(client, "my-org/new") == text_of(client, NAME)
        mixed = {"model": "tiny", "prompt": "x", "max_tokens": 1, "adapters": parts}
        assert client.post("/v1/completions", json=mixed).status_code == 200
        job = client.post("/v1/merges", json={"adapter": NAME}).json()
        assert job["recipe"]["adapters"][0]["name"] == f"{NAME}@1"
        path = f"/v1/merges/{job['id']}"
        assert eventually(lambda: client.get(path).json()["state"] == "succeeded")
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as official:
            assert official.models.retrieve(NAME).id == NAME
            assert official.completions.create(model=NAME, prompt="x", max_tokens=1).model == NAME


REFUSED = ["/a", "a/", "a//b", "a/b/c", "../a", "a/..", "./a", "a/.b", "a/b@1", "a\\b", "a%2Fb"]


@pytest.mark.parametrize("name", [*REFUSED, "a/files", "a/revisions", "a/rollback", "a/vectors"])
def test_a_name_that_leads_elsewhere_is_refused(
    client: httpx.Client, adapter_folders: dict[str, Path], name: str
) -> None:
    answer = upload(client, name, adapter_folders["mlp"])
    assert error_of(answer, 400)["details"][0]["field"] == "name"
    recipe: dict[str, Any] = {"name": name, "adapters": [{"name": "mlp"}], "method": "linear"}
    assert error_of(client.post(f"{ADAPTERS}/combine", json=recipe), 400)
    assert error_of(complete(client, name), 404)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "mlp/x/y", 404),
        ("GET", "mlp/files/x/y", 404),
        ("GET", "mlp/revisions/x", 404),
        ("GET", "..%2F..%2Fetc", 404),
        ("GET", "mlp%2F..%2Fqueries", 404),
        ("DELETE", "mlp/files", 404),
    ],
)
def test_a_path_means_one_thing(client: httpx.Client, method: str, path: str, status: int) -> None:
    """What follows a name is that adapter's part, or nothing."""
    url = httpx.URL(client.base_url).copy_with(raw_path=f"{ADAPTERS}/{path}".encode())
    assert client.request(method, url).status_code == status
    assert client.get(f"{ADAPTERS}/mlp").status_code == 200


def test_what_the_api_itself_has_may_be_an_owner_s_name(
    client: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    for name in ("combine/rollback-1", "files/a", "combine"):
        assert upload(client, name, adapter_folders["mlp"]).status_code == 201
        assert client.get(f"{ADAPTERS}/{name}").json()["name"] == name
        assert client.get(f"{ADAPTERS}/{name}/files/{CONFIG}").status_code == 200
        assert client.get(f"{ADAPTERS}/{name}/revisions").status_code == 200
        assert client.delete(f"{ADAPTERS}/{name}").status_code == 204


# From the command line


def infuse(url: str, *arguments: object) -> Result:
    environment = {"INFUSE_URL": url}
    return CliRunner().invoke(app, ["adapters", *map(str, arguments)], env=environment)


def test_a_name_may_have_an_owner_and_leads_nowhere_else(
    server: RunningServer, adapter_folders: dict[str, Path]
) -> None:
    name, adapter = "my-org/support", adapter_folders["mlp"]
    assert infuse(server.base_url, "add", name, adapter).stdout == f"{name} is revision 1\n"
    assert (
        infuse(server.base_url, "add", name, adapter, "--replace").stdout
        == f"{name} is unchanged\n"
    )
    assert infuse(server.base_url, "revisions", name).stdout.startswith("1\t")
    assert infuse(server.base_url, "combine", "my-org/other", f"{name}@1=0.5").exit_code == 0
    assert infuse(server.base_url, "rollback", name, 1).stdout == f"{name} is unchanged\n"
    assert "my-org/other\t1\t" in infuse(server.base_url, "list").stdout
    for other in ("../adapters/my-org/support", "my-org/other/../support", "my-org/support?x"):
        assert infuse(server.base_url, "remove", other).exit_code == 1
    assert infuse(server.base_url, "remove", name).exit_code == 0
    assert infuse(server.base_url, "remove", "my-org/other").exit_code == 0
    assert "my-org" not in infuse(server.base_url, "list").stdout
