"""For all tests: no deadlines (the machines are shared), and only the tests that are asked for."""

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.report import Report

hypothesis.settings.register_profile("infuse", deadline=None, derandomize=True)
hypothesis.settings.load_profile("infuse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full as well")
    parser.addoption("--report", type=Path, help="write what was run, as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--report"):
        config.pluginmanager.register(Report(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        _deselect(config, items, lambda item: item.get_closest_marker("gpu") is not None)
    if not (config.getoption("--full") or "full" in config.option.markexpr):
        _deselect(config, items, lambda item: item.get_closest_marker("full") is not None)


def _deselect(
    config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=[item for item in items if unwanted(item)])
    items[:] = [item for item in items if not unwanted(item)]
