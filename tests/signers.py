"""Those who sign adapters in tests: their private keys, public keys and certificates."""

from pathlib import Path

import trustme
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def new_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a new private key and its public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
    form = PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, form))
    return private, public


def new_certificate(folder: Path, authority: str) -> tuple[Path, list[Path], Path]:
    """Write a private key, its certificates, and that of the authority above them."""
    kind = trustme.KeyType.ECDSA
    above = trustme.CA(organization_name=authority, key_type=kind)
    between = above.create_child_ca(key_type=kind)
    own = between.issue_cert("people@example.com", key_type=kind)
    key, trusted = folder / f"{authority}-own.key", folder / f"{authority}.crt"
    own.private_key_pem.write_to_path(key)
    above.cert_pem.write_to_path(trusted)
    certificates = []
    for number, certificate in enumerate(own.cert_chain_pems):
        certificates.append(folder / f"{authority}-{number}.crt")
        certificate.write_to_path(certificates[-1])
    return key, certificates, trusted
