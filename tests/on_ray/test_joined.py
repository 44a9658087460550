"""The metrics of several replicas as one text, and the folders that they have for themselves."""

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from infuse.server.on_ray.folders import OwnFolder
from infuse.server.on_ray.metrics import joined


def metrics(count: int) -> bytes:
    registry = CollectorRegistry()
    Counter("asked", "Requests.", ["adapter"], registry=registry).labels("a").inc(count)
    Gauge("running", "Sequences.", registry=registry).set(count)
    Histogram("seconds", "Time.", registry=registry).observe(count)
    return generate_latest(registry)


def test_every_series_says_whose_it_is() -> None:
    text = joined({"one/0": metrics(3), "one/1": metrics(5)}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}

    assert text.count("# TYPE asked_total counter") == 1
    assert {
        (sample.labels["replica"], sample.labels["adapter"], sample.value)
        for sample in families["asked"].samples
        if sample.name == "asked_total"
    } == {("one/0", "a", 3), ("one/1", "a", 5)}
    assert [sample.value for sample in families["running"].samples] == [3, 5]
    assert families["seconds"].type == "histogram"


def test_a_folder_is_taken_by_one_and_free_again_afterwards(tmp_path: Path) -> None:
    first, second = OwnFolder(tmp_path), OwnFolder(tmp_path)
    assert (first.number, second.number) == (0, 1)

    del first

    assert OwnFolder(tmp_path).number == 0
