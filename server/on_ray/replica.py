"""A replica: the application of `infuse serve`, which Serve's proxies call."""

import logging
import os
import socket
from dataclasses import replace
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from ray import serve

from infuse.adapters.errors import AdapterError
from infuse.server.api.health import ready
from infuse.server.app import beside, create_app
from infuse.server.engine.errors import EngineDead
from infuse.server.errors import ApiError
from infuse.server.listener import freeze_heap
from infuse.server.observability import logs
from infuse.server.observability.metering import Query, Row
from infuse.server.on_ray.folders import OwnFolder
from infuse.server.on_ray.metrics import joined
from infuse.server.services import Services
from infuse.server.settings import Settings

APP = "infuse"
DEPLOYMENT = "Infuse"
_ANSWER_SECONDS = 5.0
"""Seconds that the other replicas have to tell what they know."""

log = logging.getLogger(__name__)


class Replica:
    """What Serve makes a deployment of; it finds the methods by their names."""

    def __init__(self, settings: Settings) -> None:
        logs.set_up(settings.log_level, settings.log_format)
        self._own = OwnFolder(settings.merges_dir or beside(settings.adapters_dir, "replicas"))
        caches = settings.adapters_cache_dir
        number = str(self._own.number)
        folders = {
            "merges_dir": self._own.path / "merges",
            "adapters_cache_dir": caches / number if caches else self._own.path / "cache",
        }
        self._application = create_app(settings.model_copy(update=folders))
        services: Services = self._application.state.services
        self._services = replace(
            services, join_metrics=self._join_metrics, ask_meters=self._ask_meters
        )
        self._application.state.services = self._services
        self._name = f"{socket.gethostname()}/{number}"
        log.info("Replica %s is process %d.", self._name, os.getpid())
        freeze_heap()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._application

    async def check_health(self) -> None:
        """Serve replaces a replica where this fails."""
        if not self._services.engine.stats().alive:
            raise EngineDead

    def record_replica_metadata(self) -> dict[str, int]:
        return {"number": self._own.number}

    async def record_routing_stats(self) -> dict[str, bool]:
        """Whether requests are welcome: a replica that cannot know what others have changed gets
        none."""
        try:
            await ready(self._services)
        except (AdapterError, ApiError):
            return {"ready": False}
        return {"ready": True}

    def record_autoscaling_stats(self) -> dict[str, int]:
        stats = self._services.engine.stats()
        return {"waiting": stats.waiting_tokens, "running": stats.running}

    def own_metrics(self) -> tuple[str, bytes]:
        return self._name, self._services.metrics.expose()

    async def own_usage(self, query: Query) -> tuple[str, list[Row]]:
        services = self._services
        rows = await to_thread.run_sync(services.meter.rows, query, limiter=services.reading_usage)
        return socket.gethostname(), rows

    async def _join_metrics(self, text: bytes) -> bytes:
        """This replica's metrics, and those of all others that answer."""
        texts = dict(await _all_say("own_metrics"))
        return joined(texts | {self._name: text})

    async def _ask_meters(self, query: Query) -> dict[str, list[Row]]:
        """Machine -> its usage, of all that answer. The replicas of a machine share a file."""
        machine, rows = await self.own_usage(query)
        return dict(await _all_say("own_usage", query)) | {machine: rows}


async def _all_say(method: str, *arguments: Any) -> list[Any]:
    """What the method of each replica that answers returns."""
    asked = serve.get_deployment_handle(DEPLOYMENT, APP).broadcast(method, *arguments)
    try:
        found = await asked.results_async(timeout_s=_ANSWER_SECONDS, return_exceptions=True)
    except TimeoutError:
        return []
    return [each for each in found if not isinstance(each, BaseException)]
