"""The objects that the routes work with, made once by `create_app`."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated
from weakref import WeakValueDictionary

from anyio import CapacityLimiter
from fastapi import Depends
from starlette.requests import Request

from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.sources.sources import Sources
from infuse.server.engine import Engine
from infuse.server.engine.fair_turns import FairTurns
from infuse.server.jobs import MergeJobs
from infuse.server.observability.latest import LatestAnswers
from infuse.server.observability.metering import Meter, Query, Row
from infuse.server.observability.metrics import Metrics
from infuse.server.preparations import Preparations
from infuse.server.settings import Settings
from infuse.server.streams import Streams
from infuse.server.uploads import UploadBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    settings: Settings
    engine: Engine
    registry: AdapterRegistry
    merges: MergeJobs
    sources: Sources
    metrics: Metrics
    meter: Meter
    latest: LatestAnswers
    streams: Streams
    uploads: UploadBudget
    model_name: str
    """The base model's name in requests."""
    started: datetime
    preparing: FairTurns
    """Bounds how many requests are prepared at once, each on a thread."""
    preparations: Preparations = field(default_factory=Preparations)
    own_files: WeakValueDictionary[str, CapacityLimiter] = field(
        default_factory=WeakValueDictionary
    )
    """Key of an adapter's own tokenizer or chat template -> the threads on which requests wait
    until it is read or run."""
    probing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "probing"))
    """The one thread on which probes check the storage."""
    staging: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(8))
    """The threads on which uploads are unpacked and checked, which an adapter's own tokenizer can
    make slow, and on which adapters are combined."""

    abandoned: list[AbstractContextManager[Path]] = field(default_factory=list)
    """The staging folders of uploads that the drain cancelled. A thread may still use them, so the
    next start removes them."""

    scraping: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(2))
    """The threads that read the metrics: requests that hang may hold all others."""
    join_metrics: Callable[[bytes], Awaitable[bytes]] | None = None
    """Adds the metrics of other servers to this one's, where one address stands for several."""
    ask_meters: Callable[[Query], Awaitable[Mapping[str, Sequence[Row]]]] | None = None
    """Machine -> its usage, where one address stands for servers of several machines."""
    reading_usage: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(2))
    """The threads that read the usage."""

    def cache_scope(self, caller: str | None) -> str:
        """The caches that a key's requests use: the key's own, unless keys share theirs."""
        return "" if caller is None or self.settings.keys_share_caches else caller


async def get_services(request: Request) -> Services:
    """FastAPI dependency. Async, as FastAPI runs others in a thread."""
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
