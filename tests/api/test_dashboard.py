"""The dashboard: every query of every panel finds data in a Prometheus that scrapes a server."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_adapters import complete
from tests.api.test_gateway_metrics import StartServer, found, prometheus
from tests.api.test_streaming import eventually

PANELS = json.loads(
    (Path(__file__).parents[2] / "deploy" / "monitoring" / "dashboard.json").read_text()
)["panels"]
FILLED_IN = {
    "$job": ".*",
    "$instance": ".*",
    "$adapter": ".*",
    "$__rate_interval": "1m",
    "$__range": "1m",
}
"""What Grafana puts in place of its variables."""


def queries() -> list[tuple[str, str]]:
    """Each query with its panel's title, as Prometheus gets it."""
    pairs = [(panel["title"], target) for panel in PANELS for target in panel.get("targets", ())]
    return [(title, _filled_in(target["expr"])) for title, target in pairs]


def _filled_in(query: str) -> str:
    for name, value in FILLED_IN.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus"
)
def test_every_query_of_the_dashboard_finds_numbers(
    start_server: StartServer, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    url, _ = start_server(preload_adapters=adapter_folders["mlp"].parent)
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        prometheus(tmp_path, url, "no-key-is-asked-for") as api,
    ):

        def has_numbers(query: str) -> bool:
            # A rate needs a series that has moved between two scrapes.
            complete(client, "mlp")
            return any(value_of(each) != "NaN" for each in found(api, query))

        for title, query in queries():
            assert eventually(lambda query=query: has_numbers(query)), f"{title}: {query}"


def value_of(result: dict[str, Any]) -> str:
    """A sample as Prometheus writes it."""
    return str(result["value"][1])
