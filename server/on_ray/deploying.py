"""Runs `infuse deploy`: a cluster where none is named, the deployment on it, and their end."""

import logging
import math
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    HTTPOptions,
    ProxyLocation,
    RequestRouterConfig,
)
from ray.serve.schema import LoggingConfig

from infuse.server.engine.model_files import model_folder
from infuse.server.keys.key_file import read_keys
from infuse.server.listener import ANSWERING_SECONDS
from infuse.server.on_ray.affinity import CALLBACK
from infuse.server.on_ray.replica import APP, DEPLOYMENT, Replica
from infuse.server.on_ray.settings import DeploySettings

log = logging.getLogger(__name__)

_CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK}
_OWN_CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else Ray gives its workers a low priority, as if other processes were the machine's purpose.
    "RAY_worker_niceness": "0",
}
_HEALTH_SECONDS = 2.0
_ROUTING_SECONDS = 1.0
"""Seconds between two looks whether a replica welcomes requests."""
_MORE_SECONDS, _FEWER_SECONDS = 10.0, 300.0
"""Seconds for which more, or fewer, replicas must be wanted until they are started or stopped."""


def deploy(settings: DeploySettings, port: int) -> None:
    """Serve until a signal comes. Raises BadKeysFile and EngineError, and RuntimeError where no
    replica starts."""
    if settings.keys_file is not None:
        read_keys(settings.keys_file)
    model_folder(settings.model)
    is_own = "RAY_ADDRESS" not in os.environ
    _join_cluster(settings, is_own)
    stopped = _until_signal()
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly if is_own else ProxyLocation.EveryNode,
            http_options=HTTPOptions(
                host=settings.host,
                port=port,
                keep_alive_timeout_s=max(1, int(settings.receive_timeout)),
            ),
        )
        serve.run(_application(settings), name=APP, route_prefix="/")
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        log.info("Infuse answers on http://%s:%d (/docs says what it can do).", shown, port)
        stopped.wait()
        _remove()
    finally:
        if is_own:
            serve.shutdown()
        ray.shutdown()


def _join_cluster(settings: DeploySettings, is_own: bool) -> None:
    if is_own:
        os.environ.update(_CALLBACK | _OWN_CLUSTER)
        needed = settings.most_replicas * (settings.replica_cpus or 1)
        cpus = max(os.cpu_count() or 1, math.ceil(needed))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False)
    else:
        ray.init(runtime_env={"env_vars": _CALLBACK})


def _until_signal() -> threading.Event:
    """An event that the first signal sets. The second ends the process at once."""
    stopped = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def _application(settings: DeploySettings) -> serve.Application:
    scaled: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.most_replicas > settings.replicas:
        scaled = {"autoscaling_config": _scaling(settings)}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        ray_actor_options=_resources(settings),
        # The engine refuses and orders requests itself.
        max_ongoing_requests=settings.max_connections,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_timeout + ANSWERING_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        request_router_config=RequestRouterConfig(
            request_router_class="infuse.server.on_ray.routing:AffinityRouter",
            request_routing_stats_period_s=_ROUTING_SECONDS,
            request_routing_stats_timeout_s=5.0,
        ),
        logging_config=LoggingConfig(log_level=settings.log_level.upper(), enable_access_log=False),
        **scaled,
    )
    return deployment.bind(settings.absolute())


def _resources(settings: DeploySettings) -> dict[str, float]:
    """The resources of a replica. Ray gives it as many threads for the model as cores."""
    cluster = ray.cluster_resources()
    share = max(1.0, cluster.get("CPU", 1.0) // settings.most_replicas)
    gpus = 0.0 if settings.device == "cpu" else min(1.0, cluster.get("GPU", 0.0))
    return {
        "num_cpus": share if settings.replica_cpus is None else settings.replica_cpus,
        "num_gpus": gpus if settings.replica_gpus is None else settings.replica_gpus,
    }


def _scaling(settings: DeploySettings) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=settings.replicas,
        max_replicas=settings.most_replicas,
        policy=AutoscalingPolicy(
            policy_function="infuse.server.on_ray.scaling:ByQueuedTokens",
            policy_kwargs={"tokens": settings.queued_tokens, "rows": settings.max_batch_rows},
        ),
        look_back_period_s=_MORE_SECONDS,
        upscale_delay_s=_MORE_SECONDS,
        downscale_delay_s=_FEWER_SECONDS,
    )


def _remove() -> None:
    """Let requests end within the drain's time, and end the replicas."""
    serve.delete(APP, _blocking=False)
    while APP in serve.status().applications:
        time.sleep(0.1)
