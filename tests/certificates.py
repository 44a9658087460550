"""Certificates of an authority that a test makes."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """Files in PEM."""

    authority: Path
    server: Path
    """A certificate for 127.0.0.1 and its key."""
    client: Path


def certificates(folder: Path) -> Certificates:
    authority = trustme.CA()
    made = Certificates(folder / "authority.pem", folder / "server.pem", folder / "client.pem")
    authority.cert_pem.write_to_path(made.authority)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(made.server)
    authority.issue_cert("a@b.example").private_key_and_cert_chain_pem.write_to_path(made.client)
    return made
