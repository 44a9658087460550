"""The JSON as pictures. Equal figures give equal files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.sections import adapters
from benchmarks.targets import Results

_STYLE: Any = {"svg.hashsalt": "infuse", "axes.spines.top": False, "axes.spines.right": False}


def draw(results: Results, folder: Path) -> None:
    """A file for each picture whose figures are there."""
    for name, (sections, panels, paint) in _PICTURES.items():
        if all(drawable(results, section) for section in sections):
            with pyplot.rc_context(_STYLE):
                figure, axes = pyplot.subplots(
                    1, panels, figsize=(4.5 * panels, 3), layout="constrained", squeeze=False
                )
                paint([*axes[0]], results)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                pyplot.close(figure)


def pictures_of(section: str, results: Results) -> list[str]:
    """File names, without their endings, of the pictures that belong to a section."""
    return [
        name
        for name, (sections, _, _) in _PICTURES.items()
        if sections[0] == section and all(drawable(results, each) for each in sections)
    ]


def drawable(results: Results, section: str) -> bool:
    """Whether a section was measured, and whole."""
    found: dict[str, Any] = results.get(section, {"skipped": "not measured"})
    return not found.get("failed") and not found.get("skipped")


def by_batch(axes: list[Axes], results: Results) -> None:
    found = results["peers"]["tokens_per_second"]
    for engine in ("Infuse", "vLLM"):
        points = [
            (rows, found[name]["median"])
            for rows in (1, 16, 32)
            if (name := f"{engine}, base, {rows} in flight") in found
        ]
        axes[0].plot(*zip(*points, strict=True), marker="o", label=f"{engine}, base")
    axes[0].set(xlabel="requests in flight", ylabel="tokens/s", ylim=0, xticks=(1, 16, 32))
    axes[0].legend()


def by_adapters(axes: list[Axes], results: Results) -> None:
    """Each engine against its own base."""
    theirs = results["peers"]["tokens_per_second"]
    numbers = {1: adapters.IDENTICAL, 6: adapters.UNIFORM, 32: adapters.DISTINCT}
    shares = [1.0, *(_over_base(results, name) for name in numbers.values())]
    axes[0].plot([0, *numbers], shares, marker="o", label="Infuse, IA3")
    lora = theirs.get("vLLM, 8 LoRA adapters")
    if lora is not None:
        share = lora["median"] / theirs["vLLM, base, 32 in flight"]["median"]
        axes[0].plot((0, 8), (1.0, share), marker="s", label="vLLM, LoRA of rank 8")
    axes[0].set(xlabel="adapters in a batch of 32", ylabel="of the own base's tokens/s", ylim=0)
    axes[0].legend()


def by_skew(axes: list[Axes], results: Results) -> None:
    names = [*adapters.BY_SKEW][::-1]
    axes[0].barh(names, [_over_base(results, name) for name in names])
    axes[0].axvline(1.0, color="black", linewidth=0.8)
    axes[0].set(xlabel="of the base's tokens/s")


def _over_base(results: Results, name: str) -> float:
    ratio: float = results["adapters"]["ratios"][adapters.BY_SKEW[name]]["median"]
    return ratio


def by_load(axes: list[Axes], results: Results) -> None:
    loads = results["load"]["loads"]
    for panel, key, label in (
        (axes[0], "ttft_ms", "time to the first token, ms"),
        (axes[1], "tpot_ms", "time per output token, ms"),
    ):
        for percent in ("p50", "p95", "p99"):
            points = [(float(part), each[key][percent]) for part, each in loads.items()]
            panel.plot(*zip(*points, strict=True), marker="o", label=percent)
        panel.set(xlabel="load, of the saturation", ylabel=label, ylim=0)
        panel.legend()


def memory(axes: list[Axes], results: Results) -> None:
    points = [(each["adapters"], each["resident"] / 1e6) for each in results["memory"]["in_use"]]
    axes[0].plot(*zip(*points, strict=True), marker="o")
    axes[0].set(xlabel="adapters in use", ylabel="resident memory, MB", ylim=0)


_PICTURES: dict[str, tuple[tuple[str, ...], int, Callable[[list[Axes], Results], None]]] = {
    "by-batch": (("peers",), 1, by_batch),
    "by-adapters": (("adapters", "peers"), 1, by_adapters),
    "by-skew": (("adapters",), 1, by_skew),
    "by-load": (("load",), 2, by_load),
    "memory": (("memory",), 1, memory),
}
"""The sections that it is drawn from, the first being where it is shown; how many panels."""
