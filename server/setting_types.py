"""The types of settings that are texts of a certain form, with their checks."""

import ipaddress
import json
import re
import ssl
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, StringConstraints

from infuse.adapters.errors import BadSource
from infuse.adapters.sources.source_url import parse_prefixes

BUCKET = "^(s3|gs|az)://[^/]"
QUOTABLE = r"[!#-\[\]-~]+"
"""What may stand within quotes in a header."""
_ISSUER = rf"https://{QUOTABLE}|http://(localhost|127\.0\.0\.1)(:\d+)?(/{QUOTABLE})?"
_ORIGIN = r"https?://[A-Za-z0-9.-]+(:\d+)?|https?://\[[0-9A-Fa-f:]+\](:\d+)?"
_PREFIX = r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+"


def _check_folder_or_bucket(value: object) -> object:
    """Refuse a URL of any other kind, which would be taken for a folder."""
    if isinstance(value, str) and "://" in value and not re.match(BUCKET, value):
        raise ValueError(
            f"'{value}' is no folder and no bucket: set a path, s3://…, gs://… or az://…"
        )
    return value


def _check_address(host: str) -> str:
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"'{host}' is no IP address and not localhost") from None
    return host


def _check_json_object(text: str) -> str:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"'{text}' is no JSON object; write {{\"name\": value}}")
    return text


def _check_prefixes(prefixes: str) -> str:
    try:
        parse_prefixes(prefixes)
    except BadSource as error:
        raise ValueError(str(error)) from None
    return prefixes


def _check_issuer(issuer: str) -> str:
    """Without TLS, whoever is between could give other keys than the issuer's."""
    if not re.fullmatch(_ISSUER, issuer):
        raise ValueError(f"'{issuer}' is no issuer's URL, which begins with https://")
    return issuer


def origins_of(text: str) -> tuple[str, ...]:
    """The origins that a setting names."""
    return tuple(each.strip() for each in text.split(",") if each.strip())


def _check_origins(text: str) -> str:
    for origin in origins_of(text):
        if origin != "*" and not re.fullmatch(_ORIGIN, origin):
            raise ValueError(
                f"'{origin}' is no origin: write https://HOST or http://HOST:PORT, without a path"
            )
    return text


def _check_path_prefix(path: str) -> str:
    bare = path.rstrip("/")
    if bare and not re.fullmatch(_PREFIX, bare):
        raise ValueError(f"'{path}' is no path: write it as /infuse or /team/infuse")
    return bare


def check_certificate(
    certificate: Path, key: Path | None, password: str | None, authorities: Path | None
) -> None:
    """Raises ValueError where a server could not speak TLS with them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password or "")
        if authorities is not None:
            context.load_verify_locations(authorities)
    except OSError as error:
        raise ValueError(
            f"--ssl-certfile {certificate} cannot be used with its key and authorities: {error}"
        ) from None


BucketUrl = Annotated[str, StringConstraints(pattern=BUCKET)]
FolderOrBucket = Annotated[Path | BucketUrl, BeforeValidator(_check_folder_or_bucket)]
Address = Annotated[str, AfterValidator(_check_address)]
JsonObject = Annotated[str, AfterValidator(_check_json_object)]
SourcePrefixes = Annotated[str, AfterValidator(_check_prefixes)]
IssuerUrl = Annotated[str, AfterValidator(_check_issuer)]
Origins = Annotated[str, AfterValidator(_check_origins)]
PathPrefix = Annotated[str, AfterValidator(_check_path_prefix)]
