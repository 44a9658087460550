"""docs/performance.md and its plots, from the committed JSON: `python -m benchmarks.report`."""

import json
from pathlib import Path
from typing import Any

import typer

from benchmarks import plots, tables
from benchmarks.targets import verdicts

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "benchmarks" / "results" / "benchmark.json"
PROFILE = RESULTS.with_name("profile.json")
PAGE = _ROOT / "docs" / "performance.md"
README = _ROOT / "README.md"
IN_README = ("adapters_over_base", "base_over_vllm_at_32", "base_over_batching")
"""The targets that the README shows: against itself, against vLLM, against transformers."""
_BEGIN, _END = "<!-- speed: begin -->\n", "<!-- speed: end -->\n"
PLOTS = _ROOT / "docs" / "performance"


def results() -> dict[str, Any]:
    """Every section, and the profile as one of them."""
    sections: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if PROFILE.exists():
        sections["profile"] = tables.with_share(json.loads(PROFILE.read_text()))
    return sections


def elsewhere() -> list[dict[str, Any]]:
    """The results of runs on other processors, which somebody put beside those of now."""
    return [
        json.loads(path.read_text()) for path in sorted(RESULTS.parent.glob("benchmark-*.json"))
    ]


def write_page() -> Path:
    found = results()
    PLOTS.mkdir(exist_ok=True)
    plots.draw(found, PLOTS)
    PAGE.write_text(tables.page(found, elsewhere()))
    README.write_text(with_speeds(README.read_text(), found))
    return PAGE


def with_speeds(readme: str, found: dict[str, Any]) -> str:
    """The README with three of the verdicts of now between its two marks."""
    before, _, rest = readme.partition(_BEGIN)
    after = rest.partition(_END)[2]
    shown = [each for each in verdicts(found) if each.target.ratio in IN_README]
    return before + _BEGIN + tables.targets(shown) + "\n" + _END + after


def main() -> None:
    typer.echo(f"{write_page()} written")


if __name__ == "__main__":
    typer.run(main)
