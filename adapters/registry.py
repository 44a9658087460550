"""The registry finds the adapter that a request names, and makes every change of an adapter."""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerFast

from infuse.adapters.checkpoint.checkpoint import (
    AdapterVectors,
    base_mismatch_warning,
    both_sides_warning,
    checkpoint_of,
    effective_vectors,
    staged_checkpoint,
    write_checkpoint,
)
from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE, check_texts
from infuse.adapters.checkpoint.layouts import Layouts
from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.derive.combine import Method, Recipe, combine, mix
from infuse.adapters.errors import (
    AdapterDisabled,
    AdapterError,
    AdapterExists,
    TooManyPinned,
    UnknownAdapter,
    UnknownRevision,
)
from infuse.adapters.residency import Lease, Residency, ResidencyStats, SlotHolder
from infuse.adapters.storage.names import check_name
from infuse.adapters.storage.quota import Quota
from infuse.adapters.storage.revision import Details, DetailsChange, Origin, Revision
from infuse.adapters.storage.store import UPLOADED, AdapterStore
from infuse.adapters.storage.stored import StoredAdapters
from infuse.adapters.vocabulary.vocabulary import Vocabularies, Vocabulary

log = logging.getLogger(__name__)

Composition = Literal["product", "linear"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of a mixture."""

    name: str
    """`name`, or `name@revision`."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryStats(ResidencyStats):
    registered: int
    damaged: int
    """Revisions whose files were found to differ from what was stored."""
    read_only: bool
    """Whether the store can be read and not changed, as far as was noticed."""


class AdapterRegistry:
    """Owns a store and a residency: no one else changes an adapter. Thread-safe; may read the disk.

    Raises what the store raises, InvalidAdapter for an upload that must not be served, and
    UnknownAdapter, UnknownRevision or AdapterDisabled for what cannot be leased.
    """

    def __init__(
        self,
        store: AdapterStore,
        modules: BaseModules,
        slots: SlotHolder,
        reserved: Collection[str] = (),
        tokenizer: PreTrainedTokenizerFast | None = None,
        host_bytes: int = 0,
        signer_of: Callable[[Path], str] | None = None,
    ) -> None:
        """`reserved`: the base's names, which no adapter may take; the first is the served one.
        `tokenizer`: the base's; without it, adapters' own tokenizers and templates are ignored.
        `host_bytes`: see `Residency`. `signer_of`: returns who has signed the files in a folder, or
        raises NotSigned; without it, uploads need no signature."""
        self._store = store
        self._signer_of = signer_of
        self._modules = modules
        self._layouts = Layouts(modules)
        self._reserved = tuple(reserved)
        self._vocabularies = None if tokenizer is None else Vocabularies(tokenizer, modules)
        self.residency = Residency(slots, host_bytes)
        self._changing = threading.RLock()
        """Held while a change goes through store and residency."""
        self._kept: dict[str, tuple[Revision, AdapterVectors]] = {}
        """Name -> the revision, and its vectors that are kept on the device for it."""
        self._followers = ThreadPoolExecutor(1, "followed-changes")
        self.wake: Callable[[], None] = lambda: None
        """Called after a change of another server, whose adapters may be pinned or unpinned."""
        store.watch(lambda before: self._followers.submit(self._follow, before))
        for name in store.names():
            self._keep_if_pinned(name)

    def close(self) -> None:
        """End the processes that read adapters' own tokenizers and templates; close the store."""
        try:
            if self._vocabularies is not None:
                self._vocabularies.close()
        finally:
            self._store.close()
            self._followers.shutdown()

    @property
    def stored(self) -> StoredAdapters:
        """What is stored of each adapter: to list, describe and download adapters."""
        return self._store

    def staging(self) -> AbstractContextManager[Path]:
        """A private folder to write an upload in, for `add` and `replace`; gone afterwards."""
        return self._store.staging()

    def check(self, staged: Path) -> tuple[AdapterVectors, list[str]]:
        """Check everything that an upload must pass; return its vectors, and warnings.

        Whole modules have shapes and no values: the check does not load them into memory.
        """
        self._signer(staged)
        return self._check(staged)

    def _signer(self, staged: Path) -> str | None:
        return None if self._signer_of is None else self._signer_of(staged)

    def _check(self, staged: Path) -> tuple[AdapterVectors, list[str]]:
        checkpoint = staged_checkpoint(staged)
        check_texts(checkpoint.config)
        vectors = effective_vectors(checkpoint, self._modules)
        self.residency.check(vectors)
        if self._vocabularies is not None:
            self._vocabularies.read(staged, vectors.saved)
        served = self._reserved[0] if self._reserved else ""
        warnings = [
            base_mismatch_warning(checkpoint.config, served) if served else None,
            both_sides_warning(checkpoint.config),
        ]
        return vectors, [warning for warning in warnings if warning is not None]

    def check_name(self, name: str) -> None:
        """Raises InvalidAdapter for a malformed name, AdapterExists for one of the base's names."""
        if any(name in (base, base.partition("@")[0]) for base in self._reserved):
            raise AdapterExists(name)
        check_name(name)

    def add(
        self, name: str, staged: Path, origin: Origin = UPLOADED, quota: Quota | None = None
    ) -> tuple[Revision, list[str]]:
        """Store a new adapter; return its first revision, and warnings."""
        self.check_name(name)
        origin = replace(origin, signer=self._signer(staged))
        _, warnings = self._check(staged)
        return self._store.create(name, staged, origin, quota), warnings

    def replace(
        self,
        name: str,
        staged: Path,
        if_match: str | None = None,
        origin: Origin = UPLOADED,
        quota: Quota | None = None,
    ) -> tuple[Revision, bool, list[str]]:
        """Store a new revision; return the current one, whether anything changed, and warnings."""
        self._store.current(name)
        origin = replace(origin, signer=self._signer(staged))
        _, warnings = self._check(staged)
        with self._changing_name(name):
            revision, changed = self._store.replace(name, staged, if_match, origin, quota)
        return revision, changed, warnings

    def roll_back(
        self, name: str, number: int, if_match: str | None = None, by: str | None = None
    ) -> tuple[Revision, bool]:
        """Make an old content current; return the current revision, and whether it is new."""
        with self._changing_name(name):
            return self._store.roll_back(name, number, if_match, by)

    def describe(
        self, name: str, change: DetailsChange, if_match: str | None = None, by: str | None = None
    ) -> tuple[Revision, Details]:
        """Change an adapter's details; return the current revision and all details.

        Raises TooManyPinned where no slot would be left for other adapters.
        """
        with self._changing_name(name) as current:
            if not change.pinned or name in self._kept:
                return self._store.describe(name, change, if_match, by)
            most = self.residency.capacity - 1
            if len(self._kept) >= most:
                raise TooManyPinned(most)
            # First what may raise: then nothing has changed.
            vectors = self.vectors(current)
            self.residency.check(vectors)
            changed = self._store.describe(name, change, if_match, by)
            if changed[0].digest == current.digest:
                self._keep(current, vectors)
            return changed

    def combine(
        self,
        name: str,
        parts: Sequence[Part],
        method: Method,
        *,
        missing: Literal["identity", "zero"] = "identity",
        density: float = 1.0,
        seed: int = 0,
        by: str | None = None,
        quota: Quota | None = None,
    ) -> tuple[Revision, list[str]]:
        """Store a new adapter made of others; return it, and warnings.

        Raises AdapterExists, CombinedNotFinite.
        """
        self.check_name(name)
        if name in self._store:
            raise AdapterExists(name)
        revisions, several = self._vectors_of(parts)
        weights = tuple(part.weight for part in parts)
        recipe = Recipe(method=method, weights=weights, missing=missing, density=density, seed=seed)
        vectors = combine(several, recipe)
        record = {
            "method": method,
            "adapters": _ingredients(revisions, weights),
            "missing": missing,
            "density": density,
            "seed": seed,
        }
        base = self._reserved[0] if self._reserved else None
        checkpoint = checkpoint_of(vectors, base, self._modules.task_type)
        with self.staging() as staged:
            write_checkpoint(checkpoint, staged)
            origin = Origin(source="combine", by=by, recipe=record)
            # Made here, of what is here, it needs no signature.
            _, warnings = self._check(staged)
            revision = self._store.create(name, staged, origin, quota)
        return revision, [*warnings, *recipe.warnings]

    def delete(self, name: str, if_match: str | None = None, by: str | None = None) -> None:
        """Delete a name: running requests finish on it, new ones do not find it."""
        with self._changing_name(name):
            self._store.delete(name, if_match, by)

    def drop_replaced_before(self, moment: datetime, most: int) -> int:
        """Drop the revisions that were replaced before a moment, of so many names at most; return
        how many."""
        return self._store.drop_replaced_before(moment, most)

    def lease(self, model: str) -> Lease:
        """Lease the current revision of `name`, or the revision `name@number`."""
        return self._with_revisions([model], lambda revisions: self._lease(*revisions))

    def _with_revisions(self, models: Sequence[str], use: Callable[[list[Revision]], _T]) -> _T:
        """Return what `use` makes of the revisions that these names are at."""
        while True:
            revisions = [self.resolve(model) for model in models]
            # The files of a revision that was current may have gone since: the name has another.
            with suppress(UnknownRevision):
                return use(revisions)

    def _lease(self, revision: Revision) -> Lease:
        vectors = self.residency.find(revision.digest)
        if vectors is None:
            vectors = self._read(revision)
            self.residency.check(vectors)
            vocabulary = self._vocabulary(revision, vectors, self._store.files)
        else:
            vocabulary = self._vocabulary(revision, vectors, self._store.verified)
        return self.residency.lease(revision.digest, _label(revision), vectors, vocabulary)

    def lease_mixture(self, parts: Sequence[Part], composition: Composition) -> Lease:
        """Lease several adapters as one: `prod(1 + w_i * d_i)`, or `sum(w_i * l_i)`.

        Mixtures with equal vectors share a slot. Raises CombinedNotFinite, and InvalidAdapter for
        what no slot can hold.
        """
        weights = tuple(part.weight for part in parts)
        return self._with_revisions(
            [part.name for part in parts],
            lambda revisions: self._lease_mixture(revisions, weights, composition),
        )

    def _lease_mixture(
        self, revisions: Sequence[Revision], weights: tuple[float, ...], composition: Composition
    ) -> Lease:
        ingredients = [f"{r.digest}*{w!r}" for r, w in zip(revisions, weights, strict=True)]
        key = f"{composition}({','.join(ingredients)})"
        vectors = self.residency.find(key)
        if vectors is None:
            recipe = Recipe(method=composition, weights=weights)
            vectors = combine([self.vectors(revision) for revision in revisions], recipe)
            self.residency.check(vectors)
        shown = [f"{_label(r)}*{w:g}" for r, w in zip(revisions, weights, strict=True)]
        vocabulary = None
        if len(revisions) == 1:
            vocabulary = self._vocabulary(revisions[0], vectors, self._store.verified)
        label = f"{composition}({','.join(shown)})"
        return self.residency.lease(key, label, vectors, vocabulary)

    def mixture(
        self, parts: Sequence[Part], composition: Composition
    ) -> tuple[AdapterVectors, dict[str, Any]]:
        """Return the vectors that `lease_mixture` leases, and their recipe, without a lease.

        A single adapter with weight 1 may bring whole modules.
        """
        weights = tuple(part.weight for part in parts)
        revisions, several = self._vectors_of(parts)
        vectors = mix(several, Recipe(method=composition, weights=weights))
        return vectors, {"method": composition, "adapters": _ingredients(revisions, weights)}

    def _vectors_of(self, parts: Sequence[Part]) -> tuple[list[Revision], list[AdapterVectors]]:
        return self._with_revisions(
            [part.name for part in parts], lambda found: (found, [*map(self.vectors, found)])
        )

    def resolve(self, model: str) -> Revision:
        """Return the revision that `name` or `name@number` names, for a request to run on."""
        revision = self.find(model)
        if not self._store.details(revision.name).enabled:
            raise AdapterDisabled(revision.name)
        return revision

    def find(self, model: str) -> Revision:
        """`resolve`, also for an adapter that is disabled."""
        name, at, number = model.partition("@")
        if at and not (number.isascii() and number.isdigit() and len(number) < 10):
            raise UnknownAdapter(model)
        return self._store.revision(name, int(number)) if at else self._store.current(name)

    def vectors(self, revision: Revision) -> AdapterVectors:
        """Return a revision's vectors, from memory where they are in memory."""
        found = self.residency.find(revision.digest)
        return self._read(revision) if found is None else found

    def _read(self, revision: Revision) -> AdapterVectors:
        return self._layouts.read(self._store.read(revision, (CONFIG_FILE, WEIGHTS_FILE)))

    def _vocabulary(
        self, revision: Revision, vectors: AdapterVectors, files: Callable[[Revision], Path]
    ) -> Vocabulary | None:
        """Return the tokenizer and template that the adapter brings, None where it brings none.

        `files` returns the folder of the revision's files. Raises InvalidAdapter where they no
        longer fit the base.
        """
        if self._vocabularies is None:
            return None
        if self._vocabularies.knows(revision.digest):
            files = self._store.files
        try:
            return self._vocabularies.find(revision.digest, files(revision), vectors.saved)
        finally:
            # One that was deleted meanwhile seems to lack files, or loses them: this raises then.
            self._store.revision(revision.name, revision.number)

    def stats(self) -> RegistryStats:
        return RegistryStats(
            registered=len(self._store),
            damaged=self._store.damaged,
            read_only=self._store.is_read_only,
            **asdict(self.residency.stats()),
        )

    @contextmanager
    def _changing_name(self, name: str) -> Iterator[Revision]:
        """Within, an operator's change of a name is made, which was at the yielded revision."""
        with self._changing:
            old = self._store.current(name)
            try:
                yield old
            finally:
                # A change that raises may have been made all the same.
                self._moved(name, old)

    def _follow(self, before: Mapping[str, Revision | None]) -> None:
        """Bring the residency up to date after changes of another server."""
        with self._changing:
            for name, old in before.items():
                self._moved(name, old)
        self.wake()

    def _moved(self, name: str, old: Revision | None) -> None:
        """Bring the residency up to date after a name has changed since it was at `old`."""
        known = self._store.known(name)
        kept = self._kept.get(name)
        if kept is not None and (
            known is None or not known[1].pinned or kept[0].digest != known[0].digest
        ):
            self._stop_keeping(name)
        self._keep_if_pinned(name)
        if old is not None and (known is None or old.digest != known[0].digest):
            self.residency.retire(old.digest)

    def _keep_if_pinned(self, name: str) -> None:
        """Keep a pinned adapter on the device. Where it cannot be read or does not fit the base,
        log an error, so that the server starts; storing it anew puts it on the device again."""
        known = self._store.known(name)
        if known is None or not known[1].pinned or name in self._kept:
            return
        try:
            vectors = self.vectors(known[0])
            self.residency.check(vectors)
            self._keep(known[0], vectors)
        except AdapterError as error:
            at = _label(known[0])
            log.error("The pinned adapter %s is not on the device: %s", at, error)

    def _keep(self, revision: Revision, vectors: AdapterVectors) -> None:
        self._kept[revision.name] = revision, vectors
        self.residency.keep(revision.digest, vectors)

    def _stop_keeping(self, name: str) -> None:
        _, vectors = self._kept.pop(name)
        self.residency.stop_keeping(vectors)


def _ingredients(revisions: Sequence[Revision], weights: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"name": _label(revision), "digest": revision.digest, "weight": weight}
        for revision, weight in zip(revisions, weights, strict=True)
    ]


def _label(revision: Revision) -> str:
    return f"{revision.name}@{revision.number}"
