"""The keyring finds the entry of the key or token that a request gives, and follows changes of the
keys file."""

import asyncio
import hmac
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from anyio import CapacityLimiter, to_thread

from infuse.server.engine.fair_turns import FairTurns
from infuse.server.keys.claims import Claims, covers
from infuse.server.keys.issuer import Issuer
from infuse.server.keys.key_file import BadKeysFile, Key, load_keys, read_keys
from infuse.server.keys.secrets import digest_of, id_of, is_hash_of
from infuse.server.keys.tokens import Tokens

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the file is looked at."""
_MOST_WAITING = 32
"""How many requests with one id may wait until the key that they give is checked."""

_Stamp = tuple[int, int, int]


class NoEntry(Exception):
    """A token is valid, and no entry of the keys file covers its claims."""


class Keyring:
    """Holds the keys of a file. Belongs to one event loop.

    A key is compared with its slow hash once; then its fast hash is remembered, in memory. Checks
    run on a thread, one after the other, in turns among the ids: those who send wrong keys hold up
    nobody whose key is known, nor the first request of another key for long.
    """

    def __init__(self, path: Path, tokens: Tokens | None = None) -> None:
        """`tokens`: checks those of an issuer; None: keys alone open the server. Raises
        BadKeysFile."""
        self._path = path
        self._tokens = tokens
        self._seen = self._stamp()
        self.is_broken = False
        """Whether the file has changed to something that cannot be used."""
        self._checked: dict[bytes, str] = {}
        """Fast hash of a key -> the slow hash in the file that it was compared with."""
        self._checking = FairTurns(1, 1, _MOST_WAITING)
        self._take(read_keys(path))

    @property
    def lacks_issuer(self) -> bool:
        """Whether the issuer has not told its keys when it was asked last."""
        return self._tokens is not None and self._tokens.issuer.is_unreachable

    async def find(self, given: str) -> Key | None:
        """The entry of a key or token; None where there is none, or it has expired. Raises
        QueueFull where too many wait to be checked, and BadToken, IssuerUnavailable, NoEntry."""
        digest = digest_of(given)
        found = self._plain_key(digest)
        if found is None:
            found = self._by_id.get(id_of(given) or "")
            if found is not None and not await self._is_right(given, digest, found):
                found = None
        if found is None and self._tokens is not None and given.count(".") == 2:
            found = self._entry_of(await self._tokens.claims(given))
        return None if found is None or found.has_expired else found

    def _plain_key(self, digest: bytes) -> Key | None:
        found = None
        for key, expected in self._plain:
            if hmac.compare_digest(digest, expected):
                found = key
        return found

    def _entry_of(self, claims: Claims) -> Key:
        """The first entry that covers the claims. Raises NoEntry."""
        for key in self._with_claims:
            if not key.has_expired and covers(key.claims or {}, claims):
                return key
        raise NoEntry

    async def _is_right(self, given: str, digest: bytes, key: Key) -> bool:
        assert key.id is not None
        assert key.hash is not None
        if self._checked.get(digest) == key.hash:
            return True
        async with self._checking.turn(key.id):
            # Another request may have brought the same key meanwhile.
            if self._checked.get(digest) != key.hash:
                check = partial(is_hash_of, key.hash, given)
                if not await to_thread.run_sync(check, limiter=CapacityLimiter(1)):
                    return False
                self._checked[digest] = key.hash
        return True

    async def follow(self) -> None:
        """Follow the file, and the keys of the issuer, until cancelled."""
        followed = [self._follow_file()]
        if self._tokens is not None:
            followed.append(self._tokens.issuer.follow())
        await asyncio.gather(*followed)

    async def _follow_file(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Take the keys of the file where it has changed. Where the new ones cannot be used, the
        old ones stay."""
        stamp = await to_thread.run_sync(self._stamp, limiter=CapacityLimiter(1))
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            keys = await to_thread.run_sync(load_keys, self._path, limiter=CapacityLimiter(1))
        except BadKeysFile as error:
            self.is_broken = True
            log.error("The keys stay as they were: %s.", error)
            return
        self.is_broken = False
        self._take(keys)
        log.info("The keys file %s has changed: it holds %d keys.", self._path, len(keys))

    def _take(self, keys: Sequence[Key]) -> None:
        self._plain = [
            (key, digest_of(key.key.get_secret_value())) for key in keys if key.key is not None
        ]
        self._with_claims = [key for key in keys if key.claims is not None]
        if self._with_claims and self._tokens is None:
            log.warning("Entries of %s with claims open nothing without an issuer.", self._path)
        self._by_id = {key.id: key for key in keys if key.id is not None}
        hashes = {key.hash for key in keys}
        self._checked = {each: known for each, known in self._checked.items() if known in hashes}

    def _stamp(self) -> _Stamp | None:
        """What differs after each change of the file; None where it cannot be read."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def open_keyring(path: Path | None, issuer: str | None, audience: str | None) -> Keyring | None:
    """The keyring of a keys file, which takes tokens of an issuer for an audience where there are
    these; None where there is no file. Raises BadKeysFile."""
    if path is None:
        return None
    if issuer is None or audience is None:
        return Keyring(path)
    return Keyring(path, Tokens(Issuer(issuer), audience))
