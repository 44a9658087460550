"""Tokens of an OIDC issuer: which are valid, whose they are, and what a hostile issuer does."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc.jwk import ECKey

from infuse.server.engine import QueueFull
from infuse.server.keys.claims import covers
from infuse.server.keys.issuer import Issuer, IssuerUnavailable
from infuse.server.keys.key_file import BadKeysFile
from infuse.server.keys.keyring import Keyring, NoEntry
from infuse.server.keys.tokens import BadToken, Tokens
from tests.issuers import ALGORITHMS, AUDIENCE, LocalIssuer, local_issuer
from tests.keys.test_keyring import path as path
from tests.keys.test_keyring import write

APP = {"name": "app", "claims": {"sub": ["app"]}, "roles": ["generate"]}


@pytest.fixture
def issuer() -> Iterator[LocalIssuer]:
    with local_issuer() as issuer:
        yield issuer


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keyring(path: Path, issuer: LocalIssuer, clock: Clock) -> Keyring:
    write(path, APP)
    return Keyring(path, Tokens(Issuer(issuer.url, clock), AUDIENCE))


def name_of(keyring: Keyring, token: str) -> str | None:
    found = asyncio.run(keyring.find(token))
    return None if found is None else found.name


def refusal(keyring: Keyring, token: str) -> str:
    with pytest.raises(BadToken) as refused:
        name_of(keyring, token)
    for part in token.split("."):
        assert len(part) < 10 or part not in str(refused.value)
    return str(refused.value)


def encoded(part: dict[str, Any] | bytes) -> str:
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


# Which are valid


@pytest.mark.parametrize("kid", ALGORITHMS)
def test_a_valid_token_is_its_entry_s(keyring: Keyring, issuer: LocalIssuer, kid: str) -> None:
    assert name_of(keyring, issuer.token(kid)) == "app"
    assert name_of(keyring, issuer.token(kid, aud=["other", AUDIENCE])) == "app"


NOW = int(time.time())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"exp": NOW - 60}, "has expired"),
        ({"exp": None}, "lacks the claim exp"),
        ({"exp": "tomorrow"}, "claim exp is wrong"),
        ({"exp": float("nan")}, "claim exp is wrong"),
        ({"nbf": NOW + 3600}, "is for later"),
        ({"iat": NOW + 3600}, "claim iat is wrong"),
        ({"aud": "other"}, "is not for the audience 'infuse'"),
        ({"aud": ["other"]}, "is not for the audience 'infuse'"),
        ({"aud": {"infuse": True}}, "is not for the audience 'infuse'"),
        ({"aud": None}, "lacks the claim aud"),
        ({"iss": "https://other.example.com"}, "is not of the issuer http://127.0.0.1"),
        ({"iss": None}, "lacks the claim iss"),
        ({"sub": 7}, "claim sub is wrong"),
    ],
)
def test_a_token_with_a_wrong_claim_is_refused_with_which(
    keyring: Keyring, issuer: LocalIssuer, changes: dict[str, Any], problem: str
) -> None:
    assert problem in refusal(keyring, issuer.token(**changes))


def test_clocks_may_differ_by_half_a_minute(keyring: Keyring, issuer: LocalIssuer) -> None:
    now = int(time.time())

    assert name_of(keyring, issuer.token(exp=now - 10)) == "app"
    assert name_of(keyring, issuer.token(iat=now + 10, nbf=now + 10)) == "app"


def test_a_token_that_nobody_signed_is_refused(keyring: Keyring, issuer: LocalIssuer) -> None:
    _, claims, signature = issuer.token().split(".")

    for algorithm in ("none", "None", "NONE", "nOnE"):
        header = encoded({"alg": algorithm, "kid": "ec"})
        for each in ("", signature):
            assert "signed by none of RS256" in refusal(keyring, f"{header}.{claims}.{each}")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
@pytest.mark.parametrize("kid", ["rsa", "ec"])
def test_a_token_that_is_signed_by_the_public_key_as_a_password_is_refused(
    keyring: Keyring, issuer: LocalIssuer, kid: str, algorithm: str
) -> None:
    key = issuer.keys[kid]
    digest = getattr(hashlib, f"sha{algorithm[2:]}")
    claims = issuer.token().split(".")[1]
    signed = f"{encoded({'alg': algorithm, 'kid': kid})}.{claims}"
    for password in (
        key.as_pem(private=False),
        key.as_der(private=False),
        json.dumps(key.as_dict(private=False)).encode(),
    ):
        signature = encoded(hmac.new(password, signed.encode(), digest).digest())
        assert "signed by none of RS256" in refusal(keyring, f"{signed}.{signature}")


def test_a_secret_among_the_issuer_s_keys_signs_nothing(
    keyring: Keyring, issuer: LocalIssuer
) -> None:
    secret = b"a secret that both sides know....."
    issuer.published.append({"kty": "oct", "kid": "shared", "k": encoded(secret)})
    claims = issuer.token().split(".")[1]
    signed = f"{encoded({'alg': 'HS256', 'kid': 'shared'})}.{claims}"
    signature = encoded(hmac.new(secret, signed.encode(), hashlib.sha256).digest())

    assert "no key of the id" in refusal(keyring, f"{signed}.{signature}")


def test_a_token_that_brings_its_own_key_is_refused(keyring: Keyring, issuer: LocalIssuer) -> None:
    own = ECKey.generate_key("P-256", {"kid": "ec"})
    public = own.as_dict(private=False)
    before, issuer.keys["ec"] = issuer.keys["ec"], own
    signed = issuer.token()
    issuer.keys["ec"] = before
    _, claims, _ = signed.split(".")
    header = encoded({"alg": "ES256", "kid": "ec", "jwk": public})

    assert "signature is wrong" in refusal(keyring, signed)
    assert "signature is wrong" in refusal(keyring, f"{header}.{claims}.{signed.split('.')[2]}")


@pytest.mark.parametrize("purpose", [{"use": "enc"}, {"alg": "ES384"}, {"key_ops": ["encrypt"]}])
def test_a_key_for_something_else_signs_nothing(
    keyring: Keyring, issuer: LocalIssuer, purpose: dict[str, Any]
) -> None:
    issuer.published[1] |= purpose

    assert "signature is wrong" in refusal(keyring, issuer.token("ec"))


GARBAGE = [
    "..",
    "a.b.c",
    "é.é.é",
    "\x00.\x00.\x00",
    f"{encoded(b'[]')}.e30.AA",
    f"{encoded(b'7')}.e30.AA",
    f"{encoded(b'null')}.e30.AA",
    encoded(b'"alg kid b64"') + ".e30.AA",
    encoded({"alg": "ES256"}) + ".e30.AA",
    encoded({"alg": "ES256", "kid": 7}) + ".e30.AA",
    encoded({"alg": "ES256", "kid": ["ec"]}) + ".e30.AA",
    encoded({"alg": ["ES256"], "kid": "ec"}) + ".e30.AA",
    encoded({"alg": None, "kid": "ec"}) + ".e30.AA",
    encoded({"alg": "ES256", "kid": "ec", "crit": 7}) + ".e30.AA",
    encoded({"alg": "ES256", "kid": "ec", "crit": ["exp"], "exp": 7}) + ".e30.AA",
    encoded({"alg": "ES256", "kid": "ec", "b64": False, "crit": ["b64"]}) + ".e30.AA",
    encoded({"alg": "ES256", "kid": "ec", "jwk": 7}) + ".e30.AA",
    encoded({"alg": "ES256", "kid": "ec"}) + ".e30.",
    encoded({"alg": "ES256", "kid": "ec"}) + ".." + "A" * 86,
    encoded(b"[" * 380) + ".e30.AA",
]


@pytest.mark.parametrize("token", GARBAGE)
def test_what_is_no_token_is_refused(keyring: Keyring, token: str) -> None:
    assert refusal(keyring, token)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_token_that_was_changed_anywhere_is_refused(
    keyring: Keyring, issuer: LocalIssuer, place: int
) -> None:
    parts = issuer.token(sub="nobody").split(".")
    other = issuer.token(sub="app", jti="1").split(".")
    middle = len(parts[place]) // 2
    flipped = "A" if parts[place][middle] != "A" else "B"
    changed = [*parts]
    changed[place] = parts[place][:middle] + flipped + parts[place][middle + 1 :]

    refusal(keyring, ".".join(changed))
    refusal(keyring, ".".join([parts[0], other[1], parts[2]]))


def test_a_token_that_is_too_long_is_refused_before_it_is_read(
    keyring: Keyring, issuer: LocalIssuer
) -> None:
    assert name_of(keyring, issuer.token(groups=["x" * 100] * 80)) == "app"
    assert "longer than 16384 bytes" in refusal(keyring, issuer.token(groups=["x" * 100] * 200))


@given(st.lists(st.binary(max_size=40), min_size=3, max_size=3))
def test_no_bytes_break_the_check(parts: list[bytes]) -> None:
    tokens = Tokens(Issuer("https://issuer.example.com"), AUDIENCE)

    with pytest.raises(BadToken):
        asyncio.run(tokens.claims(".".join(map(encoded, parts))))


# Whose they are


@pytest.mark.parametrize(
    ("claims", "covered"),
    [
        ({"sub": "system:serviceaccount:acme:app"}, True),
        ({"sub": "system:serviceaccount:acme-2:app"}, False),
        ({"sub": "System:serviceaccount:acme:app"}, False),
        ({"sub": "x system:serviceaccount:acme:app"}, False),
        ({"sub": ["system:serviceaccount:acme:app"]}, True),
        ({"sub": {"system:serviceaccount:acme:app": 1}}, False),
        ({"sub": None}, False),
        ({}, False),
    ],
)
def test_a_claim_matches_as_a_whole(claims: dict[str, Any], covered: bool) -> None:
    assert covers({"sub": ("system:serviceaccount:acme:*",)}, claims) is covered


def test_all_claims_that_are_named_must_match_each_by_one_value() -> None:
    wanted = {"groups": ("acme", "acme-*"), "email_verified": ("true",)}

    assert covers(wanted, {"groups": ["staff", "acme-ml"], "email_verified": True})
    assert not covers(wanted, {"groups": ["staff", "acme-ml"], "email_verified": False})
    assert not covers(wanted, {"groups": ["staff", "not-acme"], "email_verified": True})
    assert not covers(wanted, {"groups": [["acme"]], "email_verified": True})
    assert not covers(wanted, {"groups": ["acme"]})


@pytest.mark.parametrize("name", ["scope", "scp"])
def test_a_scope_claim_is_a_list_of_words(name: str) -> None:
    assert covers({name: ("infuse.use",)}, {name: "openid infuse.use"})
    assert not covers({name: ("infuse.use",)}, {name: "openid not-infuse.use"})
    assert not covers({"sub": ("app",)}, {"sub": "some app"})


def test_a_token_is_that_of_the_first_entry_that_covers_it(
    keyring: Keyring, issuer: LocalIssuer, path: Path
) -> None:
    ops = {"name": "ops", "claims": {"groups": ["ops"]}, "roles": ["admin"]}
    everybody = {"name": "everybody", "claims": {"sub": ["*"]}, "roles": ["generate"]}
    ended = ops | {"name": "ended", "expires": "2026-01-01T00:00:00Z"}
    write(path, ended, ops, everybody)
    asyncio.run(keyring.look())

    assert name_of(keyring, issuer.token(groups=["staff", "ops"])) == "ops"
    assert name_of(keyring, issuer.token(groups=["staff"])) == "everybody"


def test_a_token_that_no_entry_covers_is_nobody_s(keyring: Keyring, issuer: LocalIssuer) -> None:
    with pytest.raises(NoEntry):
        name_of(keyring, issuer.token(sub="other"))


def test_an_entry_of_tokens_is_followed_as_one_of_keys(
    keyring: Keyring, issuer: LocalIssuer, path: Path
) -> None:
    token = issuer.token()
    assert name_of(keyring, token) == "app"

    write(path)
    asyncio.run(keyring.look())

    with pytest.raises(NoEntry):
        name_of(keyring, token)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"claims": {}}, "0.claims"),
        ({"claims": {"sub": []}}, "0.claims.sub"),
        ({"claims": {"sub": "app"}}, "0.claims.sub"),
        ({"claims": {"sub": [""]}}, "0.claims.sub.0"),
        ({"claims": {"": ["x"]}}, "0.claims"),
        ({"key": "0123456789abcdef"}, "0: a key has an id and a hash"),
    ],
)
def test_bad_claims_in_the_file_are_refused_with_the_place(
    path: Path, change: dict[str, Any], problem: str
) -> None:
    write(path, APP | change)

    with pytest.raises(BadKeysFile, match=problem):
        Keyring(path)


def test_without_an_issuer_a_token_opens_nothing_and_the_log_says_so(
    path: Path, issuer: LocalIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, APP)

    assert name_of(Keyring(path), issuer.token()) is None
    assert "with claims open nothing without an issuer" in caplog.text


def test_a_key_in_plain_may_look_like_a_token(keyring: Keyring, path: Path) -> None:
    write(path, {"name": "old", "key": "an.old.key.0123456789", "roles": ["admin"]})
    asyncio.run(keyring.look())

    assert name_of(keyring, "an.old.key.0123456789") == "old"
    assert name_of(keyring, "an.old-key-0123456789") is None


# The issuer's keys


def test_a_key_that_came_since_is_found(
    keyring: Keyring, issuer: LocalIssuer, clock: Clock
) -> None:
    issuer.publish("rsa")
    assert name_of(keyring, issuer.token("rsa")) == "app"
    issuer.publish("rsa", "ec")
    clock.now += 10

    assert name_of(keyring, issuer.token("ec")) == "app"
    assert issuer.asked == 2


def test_unknown_keys_have_the_issuer_asked_no_more_than_every_ten_seconds(
    keyring: Keyring, issuer: LocalIssuer, clock: Clock
) -> None:
    issuer.publish("rsa")
    for second in range(30):
        clock.now = second
        assert "no key of the id" in refusal(keyring, issuer.token("ec"))

    assert issuer.asked == 3


def test_a_key_that_the_issuer_revoked_is_refused(
    keyring: Keyring, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infuse.server.keys.issuer.LOOK_SECONDS", 0.01)
    token = issuer.token("ec")

    async def follow() -> None:
        following = asyncio.create_task(keyring.follow())
        assert await keyring.find(token) is not None
        issuer.publish("rsa")
        with pytest.raises(BadToken, match="no key of the id"):
            await use_on()
        following.cancel()

    async def use_on() -> None:
        while True:
            await keyring.find(token)
            await asyncio.sleep(0.01)

    asyncio.run(follow())


def test_an_issuer_that_is_down_leaves_the_keys_that_are_known(
    keyring: Keyring, issuer: LocalIssuer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.publish("rsa")
    assert name_of(keyring, issuer.token("rsa")) == "app"
    issuer.is_down = True
    issuer.publish("ec")

    for _ in range(3):
        clock.now += 10
        with pytest.raises(IssuerUnavailable):
            name_of(keyring, issuer.token("ec"))
        assert name_of(keyring, issuer.token("rsa")) == "app"
    assert keyring.lacks_issuer
    (error,) = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert "openid-configuration answers 503" in error

    issuer.is_down = False
    clock.now += 10
    assert name_of(keyring, issuer.token("ec")) == "app"
    assert not keyring.lacks_issuer


def test_an_issuer_that_was_down_at_the_start_is_asked_again(
    keyring: Keyring, issuer: LocalIssuer, clock: Clock
) -> None:
    issuer.is_down = True
    with pytest.raises(IssuerUnavailable):
        name_of(keyring, issuer.token())
    issuer.is_down = False
    clock.now += 10

    assert name_of(keyring, issuer.token()) == "app"


def test_an_issuer_that_hangs_holds_up_no_token_whose_key_is_known(
    keyring: Keyring, issuer: LocalIssuer, clock: Clock
) -> None:
    issuer.publish("rsa")
    assert name_of(keyring, issuer.token("rsa")) == "app"
    clock.now += 10
    issuer.open.clear()

    async def ask() -> None:
        waiting = [asyncio.create_task(keyring.find(issuer.token("ec"))) for _ in range(40)]
        while issuer.asked < 2:
            await asyncio.sleep(0.01)
        known = await keyring.find(issuer.token("rsa"))
        assert known is not None
        issuer.open.set()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in ended} == {BadToken, QueueFull}

    asyncio.run(ask())
    assert issuer.asked == 2


def test_an_issuer_that_hangs_is_given_up(
    keyring: Keyring, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infuse.server.keys.issuer.ANSWER_SECONDS", 0.05)
    issuer.open.clear()

    with pytest.raises(IssuerUnavailable):
        name_of(keyring, issuer.token())


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"issuer": "https://other.example.com"}, "is of the issuer 'https://other.example.com'"),
        ({"issuer": 7}, "its answer is wrong at issuer"),
        ({"jwks_uri": "file:///etc/passwd"}, "do not come over HTTPS"),
        ({"jwks_uri": "http://127.0.0.1:1/keys"}, "connect"),
        ({"jwks_uri": None}, "its answer is wrong at jwks_uri"),
        ({"more": "x" * (1 << 20)}, "sends more than 1048576 bytes"),
    ],
)
def test_an_issuer_that_means_no_good_is_named_in_the_log(
    keyring: Keyring,
    issuer: LocalIssuer,
    caplog: pytest.LogCaptureFixture,
    document: dict[str, Any],
    problem: str,
) -> None:
    issuer.document = document

    with pytest.raises(IssuerUnavailable):
        name_of(keyring, issuer.token())

    assert problem in caplog.text


def test_keys_of_an_issuer_that_cannot_be_used_are_passed_over(
    keyring: Keyring, issuer: LocalIssuer
) -> None:
    bad: list[dict[str, Any]] = [
        {},
        {"kty": "RSA", "kid": "x"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "y"},
        {"kty": "AKP", "kid": "z"},
        {"kty": 7, "kid": 7},
        {"kty": "OKP", "crv": "Ed25519", "x": issuer.published[2]["x"]},
    ]
    issuer.published = [*bad, *issuer.published]

    assert name_of(keyring, issuer.token()) == "app"
