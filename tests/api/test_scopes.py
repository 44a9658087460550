"""Scopes of keys: a tenant does not see, name, use, time or exhaust what is another's."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.adapters.storage.store import AdapterStore
from infuse.server.services import Services
from infuse.server.settings import Settings
from tests.api.archives import form_of, read_adapter
from tests.api.conftest import run_by_modules, run_server
from tests.api.oracle import upload
from tests.api.test_auth import error_of
from tests.api.test_streaming import eventually
from tests.issuers import AUDIENCE, LocalIssuer, local_issuer

ADAPTERS, MERGES, USAGE = "/v1/adapters", "/v1/merges", "/v1/usage"
COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"
RESPONSES = "/v1/responses"
MINE, THEIRS, NOBODYS = "acme/support", "globex/offers", "globex/absent"
ABSENT_MERGE = "merge-20261124061500123456-9f3a"

KEYS: dict[str, dict[str, Any]] = {
    "acme app": {"roles": ["generate"], "scope": {"adapters": {"use": ["acme/*"]}}},
    "acme admin": {
        "roles": ["generate", "admin"],
        "scope": {"adapters": {"use": ["acme/*"], "change": ["acme/*"]}, "sources": ["hf://acme/"]},
    },
    "globex app": {"roles": ["generate"], "scope": {"adapters": {"use": ["globex/*"]}}},
    "globex admin": {"roles": ["admin"], "scope": {"adapters": {"change": ["globex/*"]}}},
    "acme token": {
        "roles": ["generate", "admin"],
        "claims": {"sub": ["acme token"]},
        "scope": {"adapters": {"use": ["acme/*"], "change": ["acme/*"]}},
    },
    "ops": {"roles": ["generate", "admin"]},
    "prometheus": {"roles": ["metrics"]},
    "reader": {
        "roles": ["generate", "admin"],
        "scope": {"adapters": {"see": ["acme/*"], "use": ["globex/?ffers"]}},
    },
}


def key_of(name: str) -> str:
    return f"key-of-{name.replace(' ', '-')}-for-tests"


def write_keys(path: Path, keys: dict[str, dict[str, Any]]) -> Path:
    entries = [
        {"name": name, **rest} | ({} if "claims" in rest else {"key": key_of(name)})
        for name, rest in keys.items()
    ]
    path.write_text(json.dumps(entries))
    return path


def as_key(client: httpx.Client, name: str) -> httpx.Client:
    """A client of the same server with this key."""
    return as_bearer(client, key_of(name))


def as_bearer(client: httpx.Client, given: str) -> httpx.Client:
    """A client of the same server with this key or token."""
    headers = {"Authorization": f"Bearer {given}"}
    return httpx.Client(base_url=client.base_url, timeout=60, headers=headers)


@dataclass(frozen=True)
class House:
    """A server on which two tenants have an adapter and a merge each."""

    client: httpx.Client
    services: Services
    folders: dict[str, Path]
    merges: dict[str, str]
    """Who made a merge -> its id."""
    issuer: LocalIssuer

    def by(self, name: str) -> httpx.Client:
        """A client with the key or token of this name; with a wrong key where there is none."""
        if "claims" in KEYS.get(name, {}):
            return as_bearer(self.client, self.issuer.token(sub=name))
        return as_key(self.client, name)


@pytest.fixture(scope="module")
def house(
    model_folder: Path, adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch, local_issuer() as issuer:
        settings = Settings(
            model=str(model_folder),
            served_model_name="tiny",
            adapters_dir=folder / "store",
            keys_file=write_keys(folder / "keys.json", KEYS),
            oidc_issuer=issuer.url,
            oidc_audience=AUDIENCE,
            source_prefixes="hf://acme/,hf://globex/",
        )
        run_by_modules(patch)
        with run_server(settings) as (url, services), httpx.Client(base_url=url) as client:
            house = House(client, services, adapter_folders, {}, issuer)
            for admin, name, kind in (
                ("acme admin", MINE, "mlp"),
                ("globex admin", THEIRS, "queries"),
            ):
                with house.by(admin) as tenant:
                    assert upload(tenant, name, adapter_folders[kind]).status_code == 201
                    job = tenant.post(MERGES, json={"adapter": name}).json()["id"]
                    path = f"{MERGES}/{job}"
                    ended = eventually(lambda path=path: tenant.get(path).json()["progress"] == 1)
                    assert ended
                    house.merges[admin] = job
            with house.by("globex app") as tenant:
                assert tenant.post(COMPLETIONS, **body(model=THEIRS, prompt="x")).is_success
            yield house


# Every route, with every kind of key and another's names


Probe = Callable[[str], dict[str, Any]]
"""A name -> a request that names it."""


def body(**fields: Any) -> dict[str, Any]:
    return {"json": {"max_tokens": 1} | fields}


def generating(path: str, **fields: Any) -> list[Probe]:
    """Every way in which a body names adapters."""
    return [
        lambda name: {"url": path, **body(model=name, **fields)},
        lambda name: {"url": path, **body(model=f"{name}@1", **fields)},
        lambda name: {"url": path, **body(model=f"{name}@x", **fields)},
        lambda name: {"url": path, **body(model=name, strength=0.5, **fields)},
        lambda name: {"url": path, **body(model="tiny", adapters=[{"name": name}], **fields)},
        lambda name: {
            "url": path,
            **body(model="tiny", adapters=[{"name": f"{name}@1"}], **fields),
        },
    ]


def as_ollama(path: str, **fields: Any) -> list[Probe]:
    options = {"num_predict": 1}
    return [
        lambda name: {"url": path, "json": {"model": name, "options": options} | fields},
        lambda name: {"url": path, "json": {"model": f"{name}@1", "options": options} | fields},
        lambda name: {
            "url": path,
            "json": {"model": "tiny", "adapters": [{"name": name}]} | fields,
        },
    ]


def named(suffix: str = "", **content: Any) -> list[Probe]:
    return [
        lambda name: {"url": f"{ADAPTERS}/{name}{suffix}", **content},
        lambda name: {"url": f"{ADAPTERS}/{name.replace('/', '%2F')}{suffix}", **content},
    ]


def weighing(name: str) -> dict[str, Any]:
    return {"adapters": [{"name": name}], "method": "linear"}


def combining(name: str, new: str) -> dict[str, Any]:
    return {"name": new} | weighing(name)


FORM = {"data": {}, "files": {"config": b"{}", "weights": b""}}
NAMES_NOTHING: list[Probe] = []
ROUTES: dict[tuple[str, str], list[Probe]] = {
    ("GET", "/health"): NAMES_NOTHING,
    ("GET", "/health/live"): NAMES_NOTHING,
    ("GET", "/tokenizer_info"): NAMES_NOTHING,
    ("POST", "/v1/embeddings"): NAMES_NOTHING,
    ("GET", "/health/ready"): NAMES_NOTHING,
    ("GET", "/metrics"): NAMES_NOTHING,
    ("GET", "/debug/batch"): NAMES_NOTHING,
    ("GET", "/debug/slowest"): NAMES_NOTHING,
    ("GET", USAGE): [
        lambda name: {"url": USAGE, "params": {"adapter": name}},
        lambda name: {"url": USAGE, "params": {"key": name}},
        lambda name: {"url": USAGE, "params": {"adapter": name, "format": "csv"}},
    ],
    ("GET", "/v1/models"): [
        lambda name: {"url": "/v1/models", "params": {"after": name}},
        lambda name: {"url": "/v1/models", "params": {"after_id": name}},
    ],
    ("GET", "/v1/models/{model}"): [
        lambda name: {"url": f"/v1/models/{name}"},
        lambda name: {"url": f"/v1/models/{name}@1"},
        lambda name: {"url": f"/v1/models/{name}@x"},
    ],
    ("POST", COMPLETIONS): generating(COMPLETIONS, prompt="x"),
    ("POST", CHAT): generating(CHAT, messages=[{"role": "user", "content": "Hi"}]),
    ("POST", RESPONSES): generating(RESPONSES, input="Hi", max_tokens=None, max_output_tokens=1),
    ("GET", f"{RESPONSES}/{{id}}"): NAMES_NOTHING,
    ("DELETE", f"{RESPONSES}/{{id}}"): NAMES_NOTHING,
    ("POST", MESSAGES): generating(MESSAGES, messages=[{"role": "user", "content": "Hi"}]),
    ("POST", f"{MESSAGES}/count_tokens"): [
        lambda name: {
            "url": f"{MESSAGES}/count_tokens",
            "json": {"model": name, "messages": [{"role": "user", "content": "Hi"}]},
        },
    ],
    ("POST", "/api/chat"): as_ollama("/api/chat", messages=[{"role": "user", "content": "Hi"}]),
    ("POST", "/api/generate"): [
        *as_ollama("/api/generate", prompt="Hi"),
        *as_ollama("/api/generate", prompt=""),
    ],
    ("POST", "/api/show"): [
        lambda name: {"url": "/api/show", "json": {"model": name}},
        lambda name: {"url": "/api/show", "json": {"model": f"{name}@1"}},
    ],
    ("GET", "/api/tags"): NAMES_NOTHING,
    ("GET", "/api/ps"): NAMES_NOTHING,
    ("GET", "/api/version"): NAMES_NOTHING,
    ("POST", "/v1/rank"): generating("/v1/rank", inputs=[{"prompt": "a", "choices": [" b"]}]),
    ("POST", "/tokenize"): [
        lambda name: {"url": "/tokenize", "json": {"model": name, "prompt": "a"}},
        lambda name: {"url": "/tokenize", "json": {"model": f"{name}@1", "prompt": "a"}},
    ],
    ("POST", "/detokenize"): [
        lambda name: {"url": "/detokenize", "json": {"model": name, "tokens": [5]}},
        lambda name: {"url": "/detokenize", "json": {"model": f"{name}@1", "tokens": [5]}},
    ],
    ("GET", ADAPTERS): [lambda name: {"url": ADAPTERS, "params": {"after": name}}],
    ("POST", ADAPTERS): [
        lambda name: {"url": ADAPTERS, "data": {"name": name}, "files": FORM["files"]},
        lambda name: {"url": ADAPTERS, "json": {"name": name, "source": "hf://globex/a"}},
        lambda name: {"url": f"{ADAPTERS}?dry_run=true", "json": {"source": f"hf://{name}"}},
    ],
    ("POST", f"{ADAPTERS}/combine"): [
        lambda name: {"url": f"{ADAPTERS}/combine", "json": combining(name, "acme/new")},
        lambda name: {"url": f"{ADAPTERS}/combine", "json": combining(f"{name}@1", "acme/new")},
        lambda name: {"url": f"{ADAPTERS}/combine", "json": combining(MINE, name)},
    ],
    ("GET", f"{ADAPTERS}/{{name}}/vectors"): [*named("/vectors"), *named("/vectors?revision=1")],
    ("POST", f"{ADAPTERS}/vectors"): [
        lambda name: {"url": f"{ADAPTERS}/vectors", "json": weighing(name)},
        lambda name: {"url": f"{ADAPTERS}/vectors", "json": weighing(f"{name}@1")},
    ],
    ("POST", f"{ADAPTERS}/similarity"): [
        lambda name: {"url": f"{ADAPTERS}/similarity", "json": {"adapters": [MINE, name]}},
        lambda name: {"url": f"{ADAPTERS}/similarity", "json": {"adapters": [f"{name}@1"]}},
    ],
    ("GET", f"{ADAPTERS}/{{name}}"): named(),
    ("PUT", f"{ADAPTERS}/{{name}}"): [
        *named(files=FORM["files"]),
        *named("?dry_run=true", json={"source": "hf://acme/a"}),
        *named(files=FORM["files"], headers={"If-Match": '"1-0"'}),
    ],
    ("PATCH", f"{ADAPTERS}/{{name}}"): [*named(json={"enabled": False}), *named(json={"x": 1})],
    ("DELETE", f"{ADAPTERS}/{{name}}"): [*named(headers={"If-Match": '"1-0"'}), *named()],
    ("GET", f"{ADAPTERS}/{{name}}/revisions"): named("/revisions"),
    ("POST", f"{ADAPTERS}/{{name}}/rollback"): named("/rollback", json={"revision": 1}),
    ("GET", f"{ADAPTERS}/{{name}}/files/{{file}}"): [
        *named("/files/adapter_config.json"),
        *named("/files/tokenizer.json"),
    ],
    ("GET", MERGES): [lambda name: {"url": MERGES, "params": {"after": name}}],
    ("POST", MERGES): [
        lambda name: {"url": MERGES, "json": {"adapter": name}},
        lambda name: {"url": MERGES, "json": {"adapters": [{"name": MINE}, {"name": name}]}},
    ],
    ("GET", f"{MERGES}/{{id}}"): [lambda merge: {"url": f"{MERGES}/{merge}"}],
    ("GET", f"{MERGES}/{{id}}/archive"): [lambda merge: {"url": f"{MERGES}/{merge}/archive"}],
    ("DELETE", f"{MERGES}/{{id}}"): [lambda merge: {"url": f"{MERGES}/{merge}"}],
}
"""How each route can be made to name an adapter or a merge."""
KINDS = {
    "no key": None,
    "acme app": "globex admin",
    "acme admin": "globex admin",
    "acme token": "globex admin",
    "globex app": "acme admin",
    "prometheus": "globex admin",
}
"""Kind of caller -> whose things are another's for it. A key without a scope may see all."""


def asked(client: httpx.Client, method: str, probe: Probe, name: str) -> tuple[int, str, str]:
    """The answer, without the name that was asked for, the time and the request's id."""
    answer = client.request(method, **probe(name))
    varying = ("date", "retry-after", "x-request-id")
    headers = sorted((k, v) for k, v in answer.headers.items() if k not in varying)
    spellings = (name, name.replace("/", "%2F"), name.partition("/")[2])
    text, head = answer.text.replace(answer.headers["x-request-id"], "ID"), str(headers)
    for each in spellings:
        text, head = text.replace(each, "NAME"), head.replace(each, "NAME")
    return answer.status_code, text, head


@pytest.fixture
def routes(house: House) -> set[tuple[str, str]]:
    paths = house.client.get("/openapi.json").json()["paths"]
    return {(method.upper(), path) for path, operations in paths.items() for method in operations}


def test_every_route_stands_in_the_matrix(routes: set[tuple[str, str]]) -> None:
    assert routes == ROUTES.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_what_is_another_s_answers_as_what_does_not_exist(
    house: House, kind: str, route: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, path = route
    owner = KINDS[kind] or "globex admin"
    theirs, absent = (MINE, "acme/nothing") if owner == "acme admin" else (THEIRS, NOBODYS)
    if path.startswith(f"{MERGES}/"):
        theirs, absent = house.merges[owner], ABSENT_MERGE
    looked_up = note_look_ups(monkeypatch, theirs)

    with house.by(kind) as client:
        for probe in ROUTES[route]:
            found = asked(client, method, probe, theirs)
            assert found == asked(client, method, probe, absent)
            assert owner.partition(" ")[0] not in found[1] + found[2]

    assert not looked_up, "the time of an answer would tell"


def note_look_ups(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The methods by which the store is asked for an adapter from now on."""
    looked_up: list[str] = []

    def noting(method: str) -> Callable[..., Any]:
        plain = getattr(AdapterStore, method)

        def noted(store: AdapterStore, asked: Any, *rest: Any) -> Any:
            if name in (asked, getattr(asked, "name", None)):
                looked_up.append(method)
            return plain(store, asked, *rest)

        return noted

    for method in ("current", "revision", "revisions", "details", "read", "__contains__"):
        monkeypatch.setattr(AdapterStore, method, noting(method))
    return looked_up


@pytest.mark.parametrize("route", [each for each in ROUTES if ROUTES[each]], ids=" ".join)
def test_a_key_without_a_scope_is_told_the_two_apart(house: House, route: tuple[str, str]) -> None:
    """So the matrix asks for what there is."""
    method, path = route
    if method == "DELETE" or path in (ADAPTERS, "/v1/models", MERGES, COMPLETIONS):
        # Deleted, it would be gone for other tests; a list begins after any name.
        return
    names = (THEIRS, NOBODYS)
    if path.startswith(f"{MERGES}/"):
        names = (house.merges["globex admin"], ABSENT_MERGE)

    with house.by("ops") as client:
        probe = ROUTES[route][0]
        found, absent = (asked(client, method, probe, name) for name in names)
        client.patch(f"{ADAPTERS}/{THEIRS}", json={"enabled": True})
        client.delete(f"{ADAPTERS}/acme/new")

    assert found != absent


@pytest.mark.parametrize("kind", ["acme app", "acme admin", "acme token"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/api/tags",
        "/api/ps",
        ADAPTERS,
        MERGES,
        USAGE,
        "/metrics",
        "/debug/batch",
        "/debug/slowest",
    ],
)
@pytest.mark.parametrize(
    "query", ["", "?limit=1", "?limit=1000", "?after=a", "?limit=1&after=acme"]
)
def test_a_list_has_nothing_of_another_tenant(
    house: House, kind: str, path: str, query: str
) -> None:
    with house.by(kind) as client:
        answer = client.get(path + query)

    assert "globex" not in answer.text + str(answer.headers)
    if answer.status_code == 200:
        lists = [answer.json().get(name) or [] for name in ("data", "models")]
        assert max(map(len, lists)) <= 2


def test_a_tenant_finds_what_is_its_own(house: House) -> None:
    with house.by("acme admin") as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["tiny", MINE]
        assert [each["name"] for each in client.get(ADAPTERS).json()["data"]] == [MINE]
        own = house.merges["acme admin"]
        assert [each["id"] for each in client.get(MERGES).json()["data"]] == [own]
        assert client.get(f"{MERGES}/{own}/archive").status_code == 200
        page = client.get("/v1/models", params={"limit": 1}).json()
        assert page["next"] == "tiny"
        last = client.get("/v1/models", params={"limit": 1, "after": "tiny"}).json()
        assert ([each["id"] for each in last["data"]], last["next"]) == ([MINE], None)
        assert client.post(COMPLETIONS, **body(model=MINE, prompt="x")).status_code == 200
        assert client.post(COMPLETIONS, **body(model="tiny", prompt="x")).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/debug/batch", "/debug/slowest"])
def test_what_shows_the_requests_of_all_keys_is_not_for_one_tenant(house: House, path: str) -> None:
    with house.by("acme admin") as client:
        assert error_of(client.get(path), 403)["code"] == "out_of_scope"
    with house.by("ops") as client:
        assert client.get(path).status_code == 200


# To use, to see and to change


def test_to_see_is_not_to_use_and_to_use_is_not_to_change(house: House) -> None:
    with house.by("reader") as client:
        assert client.get(f"{ADAPTERS}/{MINE}").status_code == 200
        assert client.get(f"{ADAPTERS}/{THEIRS}").status_code == 200, "what it may use"
        used = client.post(COMPLETIONS, **body(model=MINE, prompt="x"))
        changed = client.patch(f"{ADAPTERS}/{MINE}", json={"description": "x"})
        assert client.post(COMPLETIONS, **body(model=THEIRS, prompt="x")).status_code == 200

    assert error_of(used, 403)["code"] == error_of(changed, 403)["code"] == "out_of_scope"
    assert f"use the adapter '{MINE}'" in used.json()["error"]["message"]
    assert "adapters.change" in changed.json()["error"]["message"]


@pytest.mark.parametrize("name", [THEIRS, NOBODYS])
def test_to_change_what_may_not_be_seen_is_to_change_what_is_not_there(
    house: House, name: str
) -> None:
    with house.by("acme admin") as client:
        answers = [
            client.put(f"{ADAPTERS}/{name}", files=FORM["files"]),
            client.patch(f"{ADAPTERS}/{name}", json={}),
            client.post(f"{ADAPTERS}/{name}/rollback", json={"revision": 1}),
            client.delete(f"{ADAPTERS}/{name}"),
        ]

    for each in answers:
        assert error_of(each, 404)["message"] == f"There is no adapter named '{name}'."


def test_a_tenant_adds_adapters_of_its_names_alone(house: House) -> None:
    with house.by("acme admin") as client:
        other = upload(client, "acme-2", house.folders["mlp"])
        own = upload(client, "acme/two", house.folders["mlp"])
        assert client.delete(f"{ADAPTERS}/acme/two").status_code == 204

    assert error_of(other, 403)["code"] == "out_of_scope"
    assert own.status_code == 201


def test_a_tenant_pins_nothing(house: House) -> None:
    with house.by("acme admin") as client:
        refused = client.patch(f"{ADAPTERS}/{MINE}", json={"pinned": True})

    assert error_of(refused, 403)["param"] == "pinned"


def test_a_tenant_fetches_from_its_own_sources_alone(house: House) -> None:
    for admin, source in (("acme admin", "hf://globex/a"), ("globex admin", "hf://globex/a")):
        name = f"{admin.partition(' ')[0]}/fetched"
        with house.by(admin) as client:
            refused = client.post(ADAPTERS, json={"name": name, "source": source})
        assert error_of(refused, 403)["code"] == "source_not_allowed"


def test_who_made_an_adapter_of_what_is_told_where_the_key_may_see_it(house: House) -> None:
    with house.by("ops") as client:
        recipe = {"name": "acme/mixed", "adapters": [{"name": MINE}, {"name": THEIRS}]}
        made = client.post(f"{ADAPTERS}/combine", json=recipe | {"method": "linear"})
        assert made.status_code == 201
    with house.by("acme admin") as client:
        shown = client.get(f"{ADAPTERS}/acme/mixed").json()
        listed = client.get(f"{ADAPTERS}/acme/mixed/revisions").json()["data"][0]
        own = client.post(f"{ADAPTERS}/combine", json=combining(MINE, "acme/own")).json()
        for name in ("acme/mixed", "acme/own"):
            client.delete(f"{ADAPTERS}/{name}")

    for each in (shown, listed):
        assert (each["by"], each["recipe"]) == (None, None)
    assert own["by"] == "acme admin"
    assert own["recipe"]["adapters"][0]["name"] == f"{MINE}@1"


# How much


Limited = Callable[..., httpx.Client]


@pytest.fixture
def limited(start_server: Callable[..., tuple[str, Services]], tmp_path: Path) -> Iterator[Limited]:
    """A client whose key has these limits, of a server of its own."""
    clients = []

    def limited(roles: tuple[str, ...] = ("generate", "admin"), **scope: Any) -> httpx.Client:
        keys = {"limited": {"roles": roles, "scope": scope}, "ops": KEYS["ops"]}
        url, _ = start_server(keys_file=write_keys(tmp_path / "keys.json", keys), max_queue=8)
        clients.append(as_key(httpx.Client(base_url=url), "limited"))
        return clients[-1]

    yield limited
    for client in clients:
        client.close()


def complete(client: httpx.Client, prompt: Any = "x", **fields: Any) -> httpx.Response:
    return client.post(COMPLETIONS, **body(model="tiny", prompt=prompt, **fields))


def test_adapters_are_limited_in_number(limited: Limited, adapter_folders: dict[str, Path]) -> None:
    patterns = {"adapters": {"change": ["a/*"]}}
    client, mlp = limited(**patterns, max_adapters=2), adapter_folders["mlp"]
    with as_key(client, "ops") as ops:
        upload(ops, "b/1", mlp)
        upload(ops, "a/1", mlp)

    assert upload(client, "a/2", mlp).status_code == 201
    refused = upload(client, "a/3", mlp)
    combined = client.post(f"{ADAPTERS}/combine", json=combining("a/1", "a/3"))
    replaced = client.put(
        f"{ADAPTERS}/a/1", files=form_of(read_adapter(adapter_folders["queries"]))
    )

    for each in (refused, combined):
        error = error_of(each, 403)
        assert error["code"] == "quota_exceeded"
        assert "3 adapters" in error["message"]
        assert "allows 2" in error["message"]
    assert replaced.status_code == 200
    client.delete(f"{ADAPTERS}/a/1")
    assert upload(client, "a/3", mlp).status_code == 201


def test_adapters_are_limited_in_bytes_of_all_their_revisions(
    limited: Limited, adapter_folders: dict[str, Path]
) -> None:
    files = {kind: read_adapter(folder) for kind, folder in adapter_folders.items()}
    sizes = {kind: sum(map(len, each.values())) for kind, each in files.items()}
    client = limited(max_adapter_bytes=sizes["mlp"] + sizes["queries"])

    assert upload(client, "a", adapter_folders["mlp"]).status_code == 201
    assert upload(client, "same", adapter_folders["mlp"]).status_code == 201, "kept once"
    assert client.put(f"{ADAPTERS}/a", files=form_of(files["queries"])).status_code == 200
    refused = client.put(f"{ADAPTERS}/a", files=form_of(files["default"]))
    back = client.post(f"{ADAPTERS}/a/rollback", json={"revision": 1})

    assert error_of(refused, 403)["code"] == "quota_exceeded"
    assert back.status_code == 200


def test_merges_are_limited_in_number(limited: Limited, adapter_folders: dict[str, Path]) -> None:
    client = limited(max_merges=1)
    upload(client, "a", adapter_folders["mlp"])

    first = client.post(MERGES, json={"adapter": "a"})
    refused = client.post(MERGES, json={"adapter": "a"})

    assert first.status_code == 202
    assert error_of(refused, 403)["code"] == "quota_exceeded"


def test_uploads_of_one_key_leave_room_for_an_upload_of_another(
    start_server: Callable[..., tuple[str, Services]],
    tmp_path: Path,
    adapter_folders: dict[str, Path],
) -> None:
    keys = {"limited": KEYS["ops"], "ops": KEYS["ops"]}
    url, services = start_server(keys_file=write_keys(tmp_path / "keys.json", keys))
    uploads, most = services.uploads, services.settings.tenants_uploads_bytes
    with httpx.Client(base_url=url) as client:
        limited, other = as_key(client, "limited"), as_key(client, "ops")
        with uploads.share("limited") as first, uploads.share("limited") as second:
            first(most - 1000)
            second(1000)
            refused = upload(limited, "a", adapter_folders["mlp"])
            assert upload(other, "b", adapter_folders["mlp"]).status_code == 201
        assert upload(limited, "a", adapter_folders["mlp"]).status_code == 201

    assert error_of(refused, 503)["code"] == "too_many_uploads"


def test_requests_a_minute_are_limited_and_the_refused_are_told_when(limited: Limited) -> None:
    client = limited(requests_per_minute=3)

    answers = [client.get("/v1/models") for _ in range(4)]

    assert [each.status_code for each in answers] == [200, 200, 200, 429]
    error = error_of(answers[-1], 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
    assert "3 requests a minute" in error["message"]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    with as_key(client, "ops") as other:
        assert other.get("/v1/models").status_code == 200


def test_tokens_a_minute_are_limited_prompts_and_answers_together(limited: Limited) -> None:
    client = limited(tokens_per_minute=40)

    first = complete(client, [5] * 20, max_tokens=20, ignore_eos=True)
    refused = complete(client, [5] * 20)

    assert first.json()["usage"]["total_tokens"] == 40
    assert "40 tokens a minute" in error_of(refused, 429)["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert client.get("/v1/models").status_code == 200


def test_whose_tokens_are_used_up_is_refused_before_the_prompt_is_read(limited: Limited) -> None:
    client = limited(tokens_per_minute=10)
    too_long = [5] * 5000

    first = error_of(complete(client, too_long), 400)
    complete(client, [5] * 10)
    refused = complete(client, too_long)

    assert first["code"] == "context_length_exceeded"
    assert error_of(refused, 429)["code"] == "rate_limited"


def test_a_prompt_of_more_tokens_than_a_minute_has_is_answered_and_paid_back(
    limited: Limited,
) -> None:
    client = limited(tokens_per_minute=10)

    first, refused = complete(client, [5] * 30), complete(client, [5])

    assert first.status_code == 200
    assert int(refused.headers["retry-after"]) > 60


def test_requests_at_once_are_limited(limited: Limited) -> None:
    client = limited(max_requests_at_once=1)
    long = body(model="tiny", prompt="x", stream=True, ignore_eos=True, max_tokens=100)

    with client.stream("POST", COMPLETIONS, **long) as running:
        assert running.status_code == 200
        refused = client.get("/v1/models")

    assert error_of(refused, 429)["code"] == "too_many_requests"
    assert eventually(lambda: client.get("/v1/models").status_code == 200)


def test_the_share_of_the_queue_is_limited(limited: Limited) -> None:
    client = limited(max_queue_share=0.5)
    long = {"stream": True, "ignore_eos": True, "max_tokens": 100}

    with client.stream("POST", COMPLETIONS, **body(model="tiny", prompt=["x"] * 4, **long)):
        refused = complete(client)
        with as_key(client, "ops") as other:
            assert complete(other).status_code == 200
    too_many = complete(client, ["x"] * 5)

    assert "4 choices and prompts in the queue" in error_of(refused, 429)["message"]
    assert refused.headers["retry-after"] == "1"
    assert error_of(too_many, 400)["code"] == "scope_exceeded"
    assert eventually(lambda: complete(client, ["x"] * 4).status_code == 200)


def test_prompts_and_answers_are_limited_in_length(limited: Limited) -> None:
    client = limited(max_prompt_tokens=10, max_answer_tokens=5)
    conversation = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}

    assert complete(client, [5] * 10, max_tokens=5).status_code == 200
    prompt = error_of(complete(client, [5] * 11), 400)
    ranked = {"model": "tiny", "inputs": [{"prompt": [5] * 10, "choices": [[6]]}]}
    assert error_of(client.post("/v1/rank", json=ranked), 400)["code"] == "scope_exceeded"
    answer = error_of(complete(client, max_tokens=6), 400)
    default = complete(client, "x", max_tokens=None, ignore_eos=True).json()
    chat = client.post(CHAT, json=conversation | {"max_completion_tokens": 6})

    assert (prompt["code"], prompt["param"]) == ("scope_exceeded", "prompt")
    assert "has 11 tokens" in prompt["message"]
    assert "may send 10" in prompt["message"]
    assert (answer["code"], answer["param"]) == ("scope_exceeded", "max_tokens")
    assert default["usage"]["completion_tokens"] == 5
    assert error_of(chat, 400)["code"] == "scope_exceeded"


def test_a_scope_without_limits_of_its_own_limits_nothing(limited: Limited) -> None:
    client = limited(adapters={"use": ["*"]})

    assert all(complete(client, ["x"] * 8).status_code == 200 for _ in range(3))
