"""Tokens of an OIDC issuer over HTTP: they open what keys open, and errors say what is wrong."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.services import Services
from tests.api.test_adapters import PROMPT
from tests.api.test_auth import error_of
from tests.api.test_scopes import write_keys
from tests.api.test_streaming import eventually
from tests.issuers import AUDIENCE, LocalIssuer, local_issuer

ENTRIES: dict[str, dict[str, Any]] = {
    "everybody": {
        "claims": {"groups": ["staff"]},
        "roles": ["generate"],
        "scope": {"requests_per_minute": 3},
    },
    "scraper": {"claims": {"sub": ["prometheus"]}, "roles": ["metrics"]},
    "ops": {"roles": ["generate", "admin"]},
}
COMPLETION = {"json": PROMPT | {"model": "tiny", "max_tokens": 1}}
Ask = Callable[..., httpx.Response]


@pytest.fixture
def issuer() -> Iterator[LocalIssuer]:
    with local_issuer() as issuer:
        yield issuer


@pytest.fixture
def start(
    start_server: Callable[..., tuple[str, Services]], issuer: LocalIssuer, tmp_path: Path
) -> Callable[[], Ask]:
    """Start a server that takes tokens, and ask it."""

    def start() -> Ask:
        url, _ = start_server(
            keys_file=write_keys(tmp_path / "keys.json", ENTRIES),
            oidc_issuer=issuer.url,
            oidc_audience=AUDIENCE,
            log_level="debug",
        )

        def ask(given: str, path: str = "/v1/models", **content: Any) -> httpx.Response:
            method = "POST" if content else "GET"
            headers = {"Authorization": f"Bearer {given}"}
            return httpx.request(method, url + path, headers=headers, timeout=60, **content)

        return ask

    return start


def test_a_token_has_the_role_the_limits_and_the_name_of_its_entry(
    start: Callable[[], Ask], issuer: LocalIssuer
) -> None:
    ask = start()
    staff = [issuer.token(sub=name, groups=["staff"]) for name in ("ann", "ben")]

    assert ask(staff[0], "/v1/completions", **COMPLETION).status_code == 200
    assert "'admin'" in error_of(ask(staff[1], "/v1/adapters"), 403)["message"]
    assert [ask(each).status_code for each in (*staff, *staff)] == [200, 200, 429, 429]
    assert ask(issuer.token(sub="prometheus"), "/metrics").status_code == 200
    usage = ask("key-of-ops-for-tests", "/v1/usage").json()["data"]
    assert [(each["key"], each["requests"]) for each in usage] == [("everybody", 1)]


def test_what_is_wrong_with_a_token_is_said_in_words_and_in_the_header(
    start: Callable[[], Ask], issuer: LocalIssuer
) -> None:
    ask = start()

    expired = ask(issuer.token(exp=int(time.time()) - 60))
    garbage = ask("a.b.c")
    nobody = ask(issuer.token(sub="nobody"))

    error = error_of(expired, 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_token")
    assert error["message"] == "The token is not valid: it has expired."
    assert expired.headers["www-authenticate"] == (
        'Bearer error="invalid_token", error_description="The token is not valid: it has expired."'
    )
    assert error_of(garbage, 401)["code"] == "invalid_token"
    assert error_of(nobody, 403)["code"] == "unknown_claims"
    assert error_of(ask("no-token"), 401)["code"] == "invalid_api_key"


def test_a_server_starts_while_its_issuer_is_down(
    start: Callable[[], Ask], issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infuse.server.keys.issuer.PAUSE", 0.05)
    issuer.is_down = True
    ask = start()
    token = issuer.token(sub="prometheus")
    gauge = "infuse_oidc_issuer_unreachable"

    refused = ask(token, "/metrics")
    assert error_of(refused, 503)["code"] == "issuer_unavailable"
    assert "retry-after" in refused.headers
    metrics = ask("key-of-ops-for-tests", "/metrics")
    assert f"{gauge} 1.0" in metrics.text, "keys go on"

    issuer.is_down = False
    assert eventually(lambda: f"{gauge} 0.0" in ask(token, "/metrics").text)


def test_no_token_is_logged_or_shown(
    start: Callable[[], Ask], issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ask = start()
    tokens = [
        issuer.token(groups=["staff"]),
        issuer.token(sub="nobody"),
        issuer.token(aud="other"),
        issuer.token()[:-4] + "AAAA",
        issuer.token("rsa", exp=1),
    ]

    shown = [ask(each) for each in tokens]

    assert {each.status_code for each in shown} == {200, 401, 403}
    told = caplog.text + "".join(each.text + str(each.headers) for each in shown)
    for part in {part for each in tokens for part in each.split(".")}:
        assert part not in told
