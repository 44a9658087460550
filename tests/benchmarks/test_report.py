"""docs/performance.md says what the committed JSON says, and judges by the bound that is harder."""

from typing import Any

import pytest

from benchmarks import plots, report, tables
from benchmarks.targets import TARGETS, Target, verdict
from benchmarks.turns import ratio_of

AT_LEAST = Target(1, "a / b", "some", "a_over_b", 0.98)
AT_MOST = Target(5, "hit / miss", "some", "a_over_b", 0.15, "at most")


def results(*pairs: float, **section: Any) -> dict[str, Any]:
    return {"some": {"ratios": {"a_over_b": ratio_of(pairs)}, **section}}


def test_the_page_is_what_the_committed_figures_give() -> None:
    found = report.results()
    page = tables.page(found, report.elsewhere())
    assert report.PAGE.read_text() == page, "run python -m benchmarks.report"


def test_the_readme_has_three_of_the_committed_verdicts() -> None:
    readme = report.README.read_text()
    assert readme == report.with_speeds(readme, report.results()), "run python -m benchmarks.report"


def test_every_picture_that_the_page_shows_is_there() -> None:
    found = report.results()
    shown = [name for section in found for name in plots.pictures_of(section, found)]
    assert {path.stem for path in report.PLOTS.glob("*.svg")} == set(shown)


def test_a_median_above_the_limit_does_not_do_where_its_lower_bound_is_below() -> None:
    found = verdict(AT_LEAST, results(0.9, 1.0, 1.0, 1.0, 1.0))
    assert found.median == 1.0
    assert found.judged == 0.9
    assert found.reached is False


@pytest.mark.parametrize(("worst", "reached"), [(0.14, True), (0.16, False)])
def test_a_limit_from_above_is_held_against_the_upper_bound(worst: float, reached: bool) -> None:
    assert verdict(AT_MOST, results(0.1, 0.1, 0.1, 0.1, worst)).reached is reached


def test_what_could_not_be_measured_is_neither_reached_nor_missed() -> None:
    found = verdict(AT_LEAST, {"some": {"failed": {"b": "it did not start"}}})
    assert found.reached is None
    assert found.reason == "it did not start"
    assert verdict(AT_LEAST, {}).reason == "not measured"


def test_every_target_of_a_section_that_was_measured_whole_has_its_ratio() -> None:
    found = report.results()
    for target in TARGETS:
        section = found.get(target.section)
        if section is not None and not section.get("failed"):
            assert verdict(target, found).judged is not None, target


def test_a_table_has_a_column_of_text_and_columns_of_figures() -> None:
    assert tables.table(["", "n"], [["a", "1"]]) == "|  | n |\n| --- | ---: |\n| a | 1 |"


def test_a_step_that_adds_up_is_shown_with_its_sum_and_the_share_outside_the_model() -> None:
    step = {
        "rows": 32,
        "step_ms": 20.5,
        "parts_ms": {"gemm": 15.0, "attention": 4.0, "sampling": 0.6, "python": 0.4},
    }
    found = tables.with_share({"before": step, "after": step, "machine": {"cores": 2}})
    assert found["ratios"]["outside"]["median"] == pytest.approx(1.0 / 20)
    shown = tables.profile(found)
    assert "| sum | 20.0 | 20.0 |" in shown
    assert "| the step, measured | 20.5 | 20.5 |" in shown
