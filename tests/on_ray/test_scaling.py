"""How many replicas are wanted."""

from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from infuse.server.on_ray.scaling import ByQueuedTokens


@pytest.mark.parametrize(
    ("waiting", "running", "replicas"),
    [
        ([], [], 1),
        ([0, 0], [0, 3], 1),
        ([4000, 0], [32, 32], 2),
        ([9000, 4000], [32, 32], 4),
        ([0, 0, 0], [32, 20, 13], 3),
    ],
    ids=["none yet", "idle", "some wait", "many wait", "all run"],
)
def test_replicas_follow_the_tokens_that_wait_and_the_requests_that_run(
    waiting: list[int], running: list[int], replicas: int
) -> None:
    metrics = {
        name: dict(enumerate(values))
        for name, values in {"waiting": waiting, "running": running}.items()
    }
    policy = ByQueuedTokens(tokens=4096, rows=32)

    assert policy(SimpleNamespace(aggregated_metrics=metrics))[0] == replicas
