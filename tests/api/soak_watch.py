"""What a server holds of its machine, again and again, and whether that grows."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import psutil


@dataclass(frozen=True)
class Held:
    """What the server and the processes that it started hold at a moment."""

    seconds: float
    memory: int = field(metadata={"shown": "memory, MiB", "unit": 1 << 20})
    """Bytes that are resident."""
    descriptors: int = field(metadata={"shown": "file descriptors", "unit": 1})
    threads: int = field(metadata={"shown": "threads", "unit": 1})
    processes: int = field(metadata={"shown": "processes", "unit": 1})
    disk: int = field(metadata={"shown": "disk without the journal, KiB", "unit": 1 << 10})
    """Bytes of the store, its merges and its usage, without the journal, which only grows."""
    temporary: int = field(metadata={"shown": "temporary files", "unit": 1})


KINDS = [each for each in fields(Held) if each.metadata]


@dataclass(frozen=True)
class Trend:
    """How what is held changes over a time."""

    per_hour: float
    """The slope of Theil and Sen: the median of the slopes of all pairs."""
    grown: float
    """The slope times the time."""
    noise: float
    """Between what nine of ten moments differ from the slope."""

    @classmethod
    def of(cls, samples: Sequence[Held], kind: str) -> "Trend":
        x = np.array([each.seconds for each in samples])
        y = np.array([getattr(each, kind) for each in samples], dtype=float)
        first, second = np.triu_indices(len(x), k=1)
        slope = float(np.median((y[second] - y[first]) / (x[second] - x[first])))
        low, high = np.quantile(y - slope * x, [0.05, 0.95])
        return cls(3600 * slope, slope * float(x[-1] - x[0]), float(high - low))


class Watch:
    """Notes what a server's processes hold."""

    def __init__(self, pid: int, store: Path, temporary: Path) -> None:
        self.server = psutil.Process(pid)
        self.samples: list[Held] = []
        self._store = store
        self._temporary = temporary
        self._began = self.server.create_time()

    @contextmanager
    def every(self, seconds: float) -> Iterator[None]:
        """Within: look every so many seconds."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(seconds):
                self.look()

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()

    @property
    def processor_seconds(self) -> float:
        """What the server has computed so far."""
        times = self.server.cpu_times()
        return float(times.user + times.system)

    def look(self) -> Held:
        processes = [self.server, *self.server.children(recursive=True)]
        memory = descriptors = threads = 0
        for each in processes:
            with suppress(psutil.NoSuchProcess):
                memory += each.memory_info().rss
                descriptors += each.num_fds()
                threads += each.num_threads()
        self.samples.append(
            Held(
                seconds=time.time() - self._began,
                memory=memory,
                descriptors=descriptors,
                threads=threads,
                processes=len(processes),
                disk=sum(size for name, size in _files(self._store) if name != "journal.jsonl"),
                temporary=len(list(_files(self._temporary))),
            )
        )
        return self.samples[-1]


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of all files; some are removed meanwhile."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield name, os.stat(f"{parent}/{name}").st_size
