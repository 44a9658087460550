"""Runs merges, one at a time, on a thread of their own, and keeps their states on disk.

    <id>.json    a job: what was asked for, and how it ended
    <id>/        the merged model of one that succeeded
    lock         held by the one process that owns the folder

Everything hidden is unfinished and removed at start. A job that no process works on any more has
failed.
"""

import fcntl
import logging
import secrets
import shutil
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.adapters.derive.merge import UNFINISHED, check_room, merge
from infuse.adapters.errors import (
    AdapterError,
    CannotMerge,
    MergeNotDone,
    QuotaExceeded,
    StoreFull,
    StoreLocked,
    StoreUnreachable,
    TooManyMerges,
    UnknownMerge,
)
from infuse.adapters.storage.folder import writing
from infuse.adapters.storage.journal import is_at, sync
from infuse.server.engine import EngineError
from infuse.server.engine.model_files import model_folder
from infuse.server.engine.threads import be_nice, compute_alone

log = logging.getLogger(__name__)

_PREFIX = "merge-"
MAX_WAITING = 64
"""How many merges of one key may wait or run. Where several keys have some, each may have an equal
part of these, and at least one."""
_HARDLY = 0.01
"""A merge that has done less than this share has no estimated end."""
_RESTARTED = "the server was restarted"
_FULL = "The disk that holds the merges is full; make room."
_FAILS = "The disk that holds the merges fails: {error}."
REST = 4
"""While the model is in use, a merge rests so many times as long as it has worked
(docs/decisions/0062-rests.md)."""
_LOOK_SECONDS = 0.1
"""How often a merge that rests looks whether it still has to."""
_NICENESS = 19
"""The lowest priority: whatever else needs the processor goes first."""


class StoredMerge(BaseModel):
    """A job that folds adapters into a copy of the base model, as its file records it."""

    object: Literal["merge"] = "merge"
    id: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float
    base: str
    recipe: Mapping[str, Any]
    created: datetime
    finished: datetime | None = None
    by: str | None
    size: int | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class _Task:
    """What the worker needs for a job. It does not outlive the process."""

    id: str
    base: BaseCheckpoint
    vectors: AdapterVectors
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Interrupted(Exception):
    """The job was cancelled, or the server stops."""


class MergeJobs:
    """Owns the merges folder and the worker thread. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        model: str | None,
        model_name: str,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`model`: as in the settings. `is_busy`: whether the served model is in use, which merges
        give way to. Raises StoreLocked."""
        self._folder = folder
        self._model = model
        self._model_name = model_name
        self._is_busy = is_busy
        self._base: BaseCheckpoint | None = None
        """Kept once it was opened, which takes a tenth of a second of Python."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise StoreLocked(f"another server uses the merges folder {folder}") from None
        self._mutex = threading.RLock()
        self._submitted = threading.Condition(self._mutex)
        self._jobs: dict[str, StoredMerge] = {}
        self._tasks: dict[str, _Task] = {}
        """Job id -> the task of a job that has not ended."""
        self._served: dict[str | None, int] = {}
        """Key -> the number of its latest merge that was begun, among all."""
        self._stopping = threading.Event()
        self._began = 0.0
        """When the running merge began, in seconds of `time.monotonic`."""
        self._recover()
        self._worker = threading.Thread(target=self._work, name="merges", daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Stop the running merge. Jobs that have not ended are failed at the next start."""
        with self._submitted:
            self._stopping.set()
            self._submitted.notify()
        self._worker.join()
        self._lock_file.close()

    def submit(
        self,
        vectors: AdapterVectors,
        recipe: Mapping[str, Any],
        by: str | None,
        most: int | None = None,
    ) -> StoredMerge:
        """Queue a merge. `most`: how many there may be of `by`; None: any number. Raises
        CannotMerge, QuotaExceeded, StoreFull, StoreUnreachable, TooManyMerges."""
        self._check_folder()
        base = self._open_base()
        check_room(base, vectors, self._folder)
        now = datetime.now(UTC)
        job = StoredMerge(
            id=f"{_PREFIX}{now:%Y%m%d%H%M%S%f}-{secrets.token_hex(2)}",
            state="queued",
            progress=0.0,
            base=self._model_name,
            recipe=recipe,
            created=now,
            by=by,
        )
        with self._mutex:
            own = 1 + sum(each.by == by for each in self._jobs.values())
            if most is not None and own > most:
                raise QuotaExceeded(f"{own} merges", f"{most}")
            waiting = Counter(self._jobs[each].by for each in self._tasks)
            if waiting[by] >= max(1, MAX_WAITING // len(waiting.keys() | {by})):
                raise TooManyMerges(waiting[by], self._seconds_until_one_ends())
            self._keep(job)
            self._tasks[job.id] = _Task(job.id, base, vectors)
            self._submitted.notify()
        return job

    def _seconds_until_one_ends(self) -> float:
        """Estimate when the running merge ends; a minute where it has hardly begun."""
        shares = [job.progress for job in self._jobs.values() if job.state == "running"]
        share = max(shares, default=0.0)
        if share < _HARDLY:
            return 60.0
        return (time.monotonic() - self._began) * (1 - share) / share

    def page(
        self,
        after: str | None,
        limit: int,
        shows: Callable[[str | None], bool] = lambda _: True,
    ) -> list[StoredMerge]:
        """The first `limit` jobs after the id `after`, oldest first, of the keys that `shows` is
        true for."""
        with self._mutex:
            ids = sorted(each for each, job in self._jobs.items() if shows(job.by))
            start = 0 if after is None else bisect_right(ids, after)
            return [self._jobs[each] for each in ids[start : start + limit]]

    def get(self, job_id: str) -> StoredMerge:
        """Raises UnknownMerge."""
        with self._mutex:
            if job_id not in self._jobs:
                raise UnknownMerge(job_id)
            return self._jobs[job_id]

    def result(self, job_id: str) -> Path:
        """The merged model's folder, to read only. Raises UnknownMerge, MergeNotDone,
        StoreUnreachable."""
        job = self.get(job_id)
        self._check_folder()
        if job.state != "succeeded":
            raise MergeNotDone(job_id, job.state)
        return self._folder / job_id

    def remove(self, job_id: str) -> None:
        """Cancel a job that has not ended; forget one that has, with its result.

        Raises UnknownMerge, StoreUnreachable.
        """
        with self._mutex:
            job = self.get(job_id)
            self._check_folder()
            if job.ended:
                self._forget(job)
            else:
                self._tasks[job_id].cancelled.set()
                if job.state == "queued":
                    self._end(job, "cancelled")

    def _check_folder(self) -> None:
        """Raises StoreUnreachable where the folder is no longer the one that was opened."""
        if not is_at(self._lock_file, self._folder / "lock"):
            raise StoreUnreachable(
                f"The merges folder {self._folder} was removed, moved or replaced while the server "
                "runs: put it back as it was, or restart the server."
            )

    def _open_base(self) -> BaseCheckpoint:
        if self._base is None or not all(shard.is_file() for shard in self._base.shards):
            try:
                self._base = BaseCheckpoint(model_folder(self._model), self._model_name)
            except EngineError as error:
                raise CannotMerge(str(error)) from error
        return self._base

    def _work(self) -> None:
        be_nice(_NICENESS)
        compute_alone()
        while (task := self._next()) is not None:
            job = self._jobs[task.id]
            output = self._folder / task.id
            try:
                self._check_folder()
                merge(task.base, task.vectors, output, _recipe_text(job), self._watch(task))
                self._succeed(task, output)
            except _Interrupted:
                if task.cancelled.is_set():
                    self._end(job, "cancelled")
            except AdapterError as error:
                self._end(job, "failed", error=str(error))
            except BaseException as error:
                # Whatever ends a merge, a panic in a library's Rust code too, ends no other.
                log.error("The merge %s failed.", job.id, exc_info=error)
                self._end(job, "failed", error=f"{type(error).__name__}: {error}")

    def _next(self) -> _Task | None:
        """Wait for a merge and begin it: the oldest of the key whose last one began longest ago.
        None: the server stops."""
        with self._submitted:
            self._submitted.wait_for(lambda: self._tasks or self._stopping.is_set())
            if self._stopping.is_set():
                return None
            job = min(
                (self._jobs[each] for each in self._tasks),
                key=lambda job: (self._served.get(job.by, 0), job.id),
            )
            self._served[job.by] = max(self._served.values(), default=0) + 1
            self._began = time.monotonic()
            self._jobs[job.id] = job.model_copy(update={"state": "running"})
            return self._tasks[job.id]

    def _succeed(self, task: _Task, output: Path) -> None:
        with self._mutex:
            job = self._jobs[task.id]
            if task.cancelled.is_set():
                shutil.rmtree(output)
                self._end(job, "cancelled")
            else:
                size = sum(file.stat().st_size for file in output.iterdir())
                self._end(job, "succeeded", progress=1.0, size=size)

    def _watch(self, task: _Task) -> Callable[[float], None]:
        latest = time.monotonic()

        def report(share: float) -> None:
            nonlocal latest
            with self._mutex:
                running = self._jobs[task.id]
                self._jobs[task.id] = running.model_copy(update={"progress": share})
            self._rest(task, REST * (time.monotonic() - latest))
            latest = time.monotonic()
            if task.cancelled.is_set() or self._stopping.is_set():
                raise _Interrupted

        return report

    def _rest(self, task: _Task, seconds: float) -> None:
        """Wait while the model is in use, for so long at most, or until the task is interrupted."""
        end = time.monotonic() + seconds
        while (
            (left := end - time.monotonic()) > 0 and self._is_busy() and not task.cancelled.is_set()
        ):
            if self._stopping.wait(min(left, _LOOK_SECONDS)):
                return

    def _end(self, job: StoredMerge, state: str, **more: Any) -> None:
        with self._mutex:
            last = self._jobs[job.id]
            values = {"state": state, "finished": datetime.now(UTC)} | more
            self._tasks.pop(job.id, None)
            try:
                self._keep(last.model_copy(update=values))
            except (StoreFull, StoreUnreachable) as error:
                log.error("The end of %s cannot be written: %s", job.id, error)
                self._jobs[job.id] = last.model_copy(update=values)

    def _keep(self, job: StoredMerge) -> None:
        """Write a job's record durably, whole or not at all. Raises StoreFull, StoreUnreachable."""
        unfinished = self._folder / f".{job.id}.json"
        try:
            with writing(_FULL, _FAILS):
                unfinished.write_text(job.model_dump_json())
                sync(unfinished)
                unfinished.rename(self._file(job))
                sync(self._folder)
        except AdapterError:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        self._jobs[job.id] = job

    def _forget(self, job: StoredMerge) -> None:
        """Remove a job's record, then its result: a result without a record is removed at start."""
        with writing(_FULL, _FAILS):
            self._file(job).unlink(missing_ok=True)
            sync(self._folder)
        del self._jobs[job.id]
        doomed = self._folder / f".{job.id}"
        with suppress(OSError):
            (self._folder / job.id).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _file(self, job: StoredMerge) -> Path:
        return self._folder / f"{job.id}.json"

    def _recover(self) -> None:
        for file in sorted(self._folder.glob(f"{_PREFIX}*.json")):
            try:
                job = StoredMerge.model_validate_json(file.read_bytes())
            except ValidationError as error:
                log.warning("The merge in %s is damaged and passed over: %s", file, error)
                continue
            self._jobs[job.id] = job
            if not job.ended:
                lost = {"state": "failed", "error": _RESTARTED, "finished": datetime.now(UTC)}
                self._keep(job.model_copy(update=lost))
        for path in self._folder.iterdir():
            if path.name.startswith((UNFINISHED, f".{_PREFIX}")) or self._is_orphan(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _is_orphan(self, path: Path) -> bool:
        """Whether a path is a result whose job was deleted, or never recorded that it succeeded."""
        if not (path.is_dir() and path.name.startswith(_PREFIX)):
            return False
        job = self._jobs.get(path.name)
        return job.size is None if job else not path.with_name(f"{path.name}.json").exists()


def _recipe_text(job: StoredMerge) -> str:
    """The recipe as text, for the model card."""
    parts = [
        f"{part['name']} * {part['weight']:g}  (sha256 {part['digest']})"
        for part in job.recipe["adapters"]
    ]
    return "\n".join([f"{job.recipe['method']} of", *parts])
