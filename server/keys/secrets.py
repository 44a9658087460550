"""Makes keys, and the hashes that they are kept as.

A key is `infuse-<id>-<secret>`. The id finds the key's entry; it opens nothing by itself.
"""

import hashlib
import hmac
import secrets

_PREFIX = "infuse"
_KIND = "scrypt:16384:8:1"
"""The hash function, with its N, r and p: 16 MiB and about 50 ms."""
HASH_PATTERN = rf"^{_KIND}:[0-9a-f]{{32}}:[0-9a-f]{{128}}$"
ID_PATTERN = "^[0-9a-f]{16}$"


def new_key() -> tuple[str, str]:
    """A random key, and its id before it."""
    key_id = secrets.token_hex(8)
    return key_id, f"{_PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"


def id_of(key: str) -> str | None:
    """The id in a key; None where it has not the form of one that `new_key` made."""
    prefix, *rest = key.split("-", 2)
    return rest[0] if prefix == _PREFIX and len(rest) == 2 else None


def hash_key(key: str) -> str:
    """The salted hash of a key. Slow."""
    salt = secrets.token_bytes(16)
    return f"{_KIND}:{salt.hex()}:{_scrypt(key, salt).hex()}"


def is_hash_of(key_hash: str, key: str) -> bool:
    """Slow; other threads run meanwhile."""
    *_, salt, expected = key_hash.split(":")
    return hmac.compare_digest(_scrypt(key, bytes.fromhex(salt)), bytes.fromhex(expected))


def digest_of(key: str) -> bytes:
    """A fast hash, for memory and never for a file."""
    return hashlib.sha256(key.encode()).digest()


def _scrypt(key: str, salt: bytes) -> bytes:
    _, n, r, p = _KIND.split(":")
    return hashlib.scrypt(key.encode(), salt=salt, n=int(n), r=int(r), p=int(p))
