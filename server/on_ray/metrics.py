"""Joins the metrics of all replicas to one page."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Joined(Collector):
    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self._families: dict[str, Metric] = {}
        for replica, text in texts.items():
            for family in text_string_to_metric_families(text.decode()):
                joined = self._families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = sample.labels | {"replica": replica}
                    joined.add_sample(sample.name, labels, sample.value)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def joined(texts: Mapping[str, bytes]) -> bytes:
    """Replica -> its metrics in Prometheus' text format, as one text with a label `replica`."""
    registry = CollectorRegistry()
    registry.register(_Joined(texts))
    return generate_latest(registry)
