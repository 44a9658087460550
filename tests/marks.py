"""What tests are marked with, read from their files without importing them."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[1]
Row = TypeVar("Row")


def read_marks(name: str, row: Callable[..., Row]) -> list[Row]:
    """Return `row(test, …)` for each `@pytest.mark.NAME(…)`, with the arguments of the mark, in the
    order of the files. The test is named as pytest names it."""
    return [
        row(
            test,
            *(ast.literal_eval(each) for each in mark.args),
            **{str(each.arg): ast.literal_eval(each.value) for each in mark.keywords},
        )
        for test, mark in _decorators()
        if ast.unparse(mark.func) == f"pytest.mark.{name}"
    ]


def _decorators() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call):
                        yield f"{path.relative_to(ROOT)}::{node.name}", decorator
