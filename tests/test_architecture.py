"""The rules of the house: which way imports run, and how long a file may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted(
    path
    for room in ("adapters", "server", "tests", "benchmarks", "examples")
    for path in (ROOT / room).rglob("*.py")
)

FORBIDDEN = {
    "adapters": ("server", "fastapi", "starlette", "uvicorn", "httpx", "peft"),
    "server/engine": ("server.api", "server.app", "fastapi", "starlette", "uvicorn", "peft"),
    "server": ("peft", "tests", "examples", "benchmarks"),
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_one_way(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for module in imports(path):
            for forbidden in FORBIDDEN[room]:
                assert not f"{module}.".startswith(f"{forbidden}."), f"{path} imports {module}"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
