"""Builds the application from the settings: engine, registry, routes and middleware."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI
from fastapi.security import APIKeyHeader, HTTPBearer

from infuse.adapters.checkpoint.config import CONFIG_FILE, IA3Config
from infuse.adapters.errors import AdapterError
from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.residency import Residency
from infuse.adapters.sources.source_url import parse_prefixes
from infuse.adapters.sources.sources import Sources
from infuse.adapters.storage.bucket import BucketStorage
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.shared_bucket import SharedBucketStorage
from infuse.adapters.storage.shared_folder import SharedFolderStorage
from infuse.adapters.storage.storage import Storage
from infuse.adapters.storage.store import AdapterStore
from infuse.server.answer_all import AnswerAll
from infuse.server.api import (
    adapters,
    chat,
    completions,
    console,
    debug,
    embeddings,
    health,
    merges,
    messages,
    models,
    ollama,
    ollama_models,
    other_servers,
    rank,
    responses,
    tokenize,
    usage,
    vectors,
)
from infuse.server.auth import KEY_HEADER, Authorize
from infuse.server.documentation import add_pages
from infuse.server.engine.fair_turns import FairTurns
from infuse.server.engine.model_files import cache_dir
from infuse.server.engine.threads import on_passing_thread
from infuse.server.engines import open_engine
from infuse.server.errors import install_error_handlers
from infuse.server.freed_memory import give_back_freed_memory
from infuse.server.gzip_bodies import GunzipBodies
from infuse.server.jobs import MergeJobs
from infuse.server.keys.keyring import Keyring, open_keyring
from infuse.server.middleware import CatchUp, HeadAsGet, LimitBodies
from infuse.server.observability.access import Observe, Routes
from infuse.server.observability.latest import LatestAnswers
from infuse.server.observability.metering import Meter
from infuse.server.observability.metrics import Metrics, build_info
from infuse.server.observability.otlp import open_metrics, open_traces
from infuse.server.openapi import Application
from infuse.server.outside import layers
from infuse.server.preloading import folders_to_preload, preload, refuse_taken
from infuse.server.services import Services
from infuse.server.setting_types import origins_of
from infuse.server.settings import Settings
from infuse.server.signers import signers_of
from infuse.server.streams import Streams
from infuse.server.uploads import UploadBudget

if TYPE_CHECKING:
    from infuse.server.observability.sent_metrics import SentMetrics
    from infuse.server.observability.traces import Traces

log = logging.getLogger(__name__)

_A_KEY = "A key, where the server has a keys file."
_KEYED = [
    Depends(HTTPBearer(auto_error=False, description=_A_KEY)),
    Depends(APIKeyHeader(name=KEY_HEADER, auto_error=False, description=_A_KEY)),
]
"""For the OpenAPI document only: `Authorize` has checked the key already."""
_HOUR = 3600.0
_NAMES_AT_ONCE = 10
"""Of how many adapters old revisions are dropped together."""
_CONFIGS_AT_ONCE = 32
"""Configs that are read together: each takes a bucket some 20 ms."""


def create_app(settings: Settings) -> FastAPI:
    """Loads the model, which takes a while. Raises BadKeysFile, BadUsageFile, EngineError and
    AdapterError."""
    keyring = open_keyring(settings.keys_file, settings.oidc_issuer, settings.oidc_audience)
    services = load_services(settings)
    if keyring is not None:
        services.metrics.keys_file_broken.set_function(lambda: keyring.is_broken)
        services.metrics.issuer_unreachable.set_function(lambda: keyring.lacks_issuer)
    version = build_info(settings.engine)["version"]
    traces = open_traces(version)
    sent_metrics = open_metrics(services.metrics.families, version)
    app = Application(
        title="Infuse",
        summary="One base model, thousands of IA3 adapters, one batch.",
        lifespan=lambda _: _running(services, keyring, traces, sent_metrics),
        docs_url=None,
        redoc_url=None,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
    )
    app.outside = layers(settings.root_path, origins_of(settings.cors_origins))
    add_pages(app, settings.root_path)
    app.state.services = services
    install_error_handlers(app)
    _include_routers(app)
    _add_middleware(app, services, keyring, traces)
    return app


@asynccontextmanager
async def _running(
    services: Services,
    keyring: Keyring | None,
    traces: "Traces | None",
    sent_metrics: "SentMetrics | None",
) -> AsyncIterator[None]:
    """Within, the engine runs. Afterwards everything is closed."""
    services.engine.start(services.streams.deliver)
    tasks = [asyncio.create_task(give_back_freed_memory())]
    if keyring is not None:
        tasks.append(asyncio.create_task(keyring.follow()))
    if (keep_days := services.settings.keep_days) is not None:
        dropping = _drop_old_revisions(services.registry, timedelta(days=keep_days))
        tasks.append(asyncio.create_task(dropping))
    log.info("Serving %s with %d adapters.", services.model_name, len(services.registry.stored))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Requests that hang may hold all threads of the default limiter.
        own = CapacityLimiter(1)
        await to_thread.run_sync(services.merges.close, limiter=own)
        # The drain has let requests finish: nobody waits for outputs now.
        await to_thread.run_sync(services.engine.stop, 0.0, limiter=own)
        if sent_metrics is not None:
            await to_thread.run_sync(sent_metrics.close, limiter=own)
        await to_thread.run_sync(services.registry.close, limiter=own)
        await to_thread.run_sync(services.meter.close, limiter=own)
        services.probing.shutdown(wait=False)
        if traces is not None:
            await to_thread.run_sync(traces.close, limiter=own)


def _include_routers(app: FastAPI) -> None:
    generating = (completions, chat, responses, messages, ollama, rank, embeddings, tokenize)
    listing = (models, ollama_models, vectors, adapters, merges, usage, debug)
    for module in (*generating, *listing):
        app.include_router(module.router, dependencies=_KEYED)
    app.include_router(other_servers.router)
    app.include_router(health.router)
    app.include_router(console.router)


def _add_middleware(
    app: FastAPI, services: Services, keyring: Keyring | None, traces: "Traces | None"
) -> None:
    """Each one is around those before it, and all are around the routes."""
    settings = services.settings
    app.add_middleware(LimitBodies, settings=settings)
    app.add_middleware(GunzipBodies, limit=settings.form_bytes)
    app.add_middleware(HeadAsGet)
    if settings.shared_store:
        app.add_middleware(CatchUp, stored=services.registry.stored)
    app.add_middleware(
        Authorize,
        keyring=keyring,
        admin_port=settings.admin_port,
        open_docs=settings.open_docs,
        most_at_once=max(1, settings.max_connections // 2),
    )
    app.add_middleware(AnswerAll)
    routes = Routes(app.openapi()["paths"])
    tell = [services.latest.tell] if traces is None else [services.latest.tell, traces.tell]
    app.add_middleware(Observe, metrics=services.metrics.http, routes=routes, tell=tell)


async def _drop_old_revisions(registry: AdapterRegistry, age: timedelta) -> None:
    """Drop revisions that were replaced longer ago, a few at a time: the server may stop between
    them."""
    limiter = CapacityLimiter(1)
    while True:
        drop = partial(registry.drop_replaced_before, datetime.now(UTC) - age, _NAMES_AT_ONCE)
        try:
            while dropped := await to_thread.run_sync(drop, limiter=limiter):
                log.info("Dropped %d revisions that were replaced %s ago.", dropped, age)
        except (AdapterError, OSError) as error:
            log.warning("Old revisions are dropped within the next hour: %s", error)
        await asyncio.sleep(_HOUR)


def load_services(settings: Settings) -> Services:
    """Load the model and make the services, on a thread that ends."""
    return on_passing_thread(partial(_load_services, settings))


def _load_services(settings: Settings) -> Services:
    signer_of = signers_of(settings.trusted_signers)
    store = AdapterStore(_storage(settings), settings.keep_revisions)
    try:
        opened = open_engine(settings, _known_configs(store, settings.preload_adapters))
        name = settings.served_model_name or opened.name
        refuse_taken(name, store, settings.preload_adapters)
        registry = AdapterRegistry(
            store,
            opened.modules,
            opened.slots,
            reserved=(name,),
            tokenizer=opened.tokenizer,
            host_bytes=settings.max_host_adapter_bytes,
            signer_of=signer_of,
        )
        engine = opened.engine(registry.residency)
        registry.wake = engine.wake
        if settings.preload_adapters is not None:
            preload(registry, settings.preload_adapters)
        meter = Meter(_folder(settings, settings.usage_dir, "usage"))
        merges_folder = _folder(settings, settings.merges_dir, "merges")
        merges = MergeJobs(
            merges_folder, settings.model, opened.name, lambda: engine.stats().is_busy
        )
    except BaseException:
        store.close()
        raise
    each = _turns_of_a_key(settings)
    metrics = Metrics(engine.stats, registry.stats, build_info(settings.engine))
    metrics.unwritten_usage.set_function(lambda: meter.unwritten)
    return Services(
        settings=settings,
        engine=engine,
        registry=registry,
        merges=merges,
        sources=Sources(
            parse_prefixes(settings.source_prefixes),
            settings.max_upload_bytes,
            settings.source_timeout,
        ),
        streams=Streams(),
        uploads=UploadBudget(settings.uploads_bytes, settings.tenants_uploads_bytes),
        metrics=metrics,
        meter=meter,
        latest=LatestAnswers(),
        model_name=name,
        preparing=FairTurns(2 * each, each),
        started=datetime.now(UTC),
    )


def warm_up(settings: Settings) -> bool:
    """Compile a model into the cache that later starts with these settings use. False: it does not
    compile, and the log says why."""
    opened = open_engine(settings, _stored_configs(settings))
    engine = opened.engine(Residency(opened.slots))
    compiled = engine.stats().compiled
    engine.stop(0.0)
    return compiled


def _stored_configs(settings: Settings) -> Iterator[IA3Config]:
    """What `_known_configs` yields; the store is open only while an engine asks for them."""
    with closing(AdapterStore(_storage(settings), settings.keep_revisions)) as store:
        yield from _known_configs(store, settings.preload_adapters)


def _turns_of_a_key(settings: Settings) -> int:
    """How many requests of one key are prepared at once. More than a few only take Python's lock
    from each other; but where adapters come from a bucket, some requests wait for it, and the
    others must not wait for them."""
    return 4 if isinstance(settings.adapters_dir, Path) else 40


def _storage(settings: Settings) -> Path | Storage:
    place, lease = settings.adapters_dir, settings.replica_lease
    if isinstance(place, Path):
        return SharedFolderStorage(place, lease) if settings.shared_store else place
    cache = settings.adapters_cache_dir or beside(place, "cache")
    if not settings.shared_store:
        return BucketStorage(Objects.at(place), cache)
    return SharedBucketStorage(Objects.at(place), Objects.at(place, lease / 4), cache, lease)


def _folder(settings: Settings, given: Path | None, what: str) -> Path:
    """The folder of this server's merges or usage. A store that servers share has none of them."""
    place = settings.adapters_dir
    if isinstance(place, Path) and not settings.shared_store:
        return given or place / what
    return given or beside(place, what)


def beside(store: Path | str, what: str) -> Path:
    """A folder on this machine for the cache of a bucket, or the merges or the usage of its
    servers here."""
    name = store if isinstance(store, str) else str(store.resolve())
    return cache_dir() / "buckets" / hashlib.sha256(name.encode()).hexdigest()[:16] / what


def _known_configs(store: AdapterStore, preloaded: Path | None) -> Iterator[IA3Config]:
    """The configs of all adapters that are stored or will be preloaded, but for damaged ones."""

    def read(name: str) -> IA3Config | None:
        with suppress(AdapterError):
            files = store.read(store.current(name), (CONFIG_FILE,))
            return IA3Config.parse(files[CONFIG_FILE])
        return None

    with ThreadPoolExecutor(_CONFIGS_AT_ONCE) as threads:
        yield from filter(None, threads.map(read, store.names()))
    for folder in {} if preloaded is None else folders_to_preload(preloaded).values():
        with suppress(AdapterError, OSError):
            yield IA3Config.parse((folder / CONFIG_FILE).read_bytes())
