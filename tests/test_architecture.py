"""The rules of the house: which way imports run, and who touches whose private parts."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE, OTHERS = (
    sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    for folders in (("adapters", "server"), ("tests", "benchmarks", "examples", "docs"))
)

FORBIDDEN = {
    "adapters": ("server", "fastapi", "starlette", "uvicorn", "httpx", "peft"),
    "server/engine": (
        "server.api",
        "server.app",
        "fastapi",
        "starlette",
        "uvicorn",
        "peft",
    ),
    "server/engine/constraints": ("server.engine.native", "server.engine.vllm"),
    "server/engine/native": ("server.engine.vllm", "vllm"),
    "server/engine/vllm": ("server.engine.native",),
    "server/api": (
        "server.engine.native",
        "server.engine.vllm",
        "server.engines",
        "server.app",
        "server.cli",
        "server.commands",
        "server.listener",
    ),
    "server": ("peft", "tests", "examples", "benchmarks"),
}
ON_RAY = ROOT / "server/on_ray"
RAYLESS = {"settings.py", "affinity.py", "folders.py", "metrics.py"}
"""Files of that room that are imported where Ray may not be installed, or work without it."""
SENDING = ("traces.py", "sent_metrics.py", "resource.py")
"""Files of `server/observability/` that are imported where a collector is named."""
THREADED = {"engine.py", "inbox.py"}
"""Files of our own engine that know threads."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, anywhere in it; ours by their folders."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(module.removeprefix("infuse.") for module in found)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    for room, forbidden in FORBIDDEN.items():
        if path.is_relative_to(ROOT / room):
            for module in imports(path):
                for each in forbidden:
                    assert not f"{module}.".startswith(f"{each}."), f"{path} imports {module}"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_ray_is_imported_in_one_room(path: Path) -> None:
    if not path.is_relative_to(ON_RAY) or path.name in RAYLESS:
        assert not any(f"{module}.".startswith("ray.") for module in imports(path))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_opentelemetry_is_imported_where_something_is_sent(path: Path) -> None:
    """It is not installed everywhere."""
    if path not in {ROOT / "server/observability" / name for name in SENDING}:
        assert not any(module.startswith("opentelemetry") for module in imports(path))


PACKAGES = sorted({path.parent for path in CODE})


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_no_two_rooms_import_each_other(package: Path) -> None:
    """The rooms of a package are its files and the packages in it. Prints them, the lowest first;
    `pytest -s` shows it."""
    prefix = name_of(package).replace("/", ".")
    rooms = {
        path.stem: [path] if path.suffix == ".py" else list(path.rglob("*.py"))
        for path in package.iterdir()
        if path.name != "__init__.py" and (path.suffix == ".py" or path in PACKAGES)
    }
    arrows = {
        room: {
            other
            for path in paths
            for module in imports(path)
            for other in [f"{module}.".removeprefix(f"{prefix}.").partition(".")[0]]
            if module.startswith(f"{prefix}.") and other in rooms and other != room
        }
        for room, paths in rooms.items()
    }
    try:
        order = list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"rooms of {prefix} import each other: {' <- '.join(error.args[1])}")
    print(f"{prefix}: {', '.join(order)}")


@pytest.mark.parametrize("path", sorted((ROOT / "server/engine/native").rglob("*.py")), ids=name_of)
def test_only_the_engines_thread_knows_threads(path: Path) -> None:
    assert path.name in THREADED or "threading" not in imports(path)


@cache
def private_names() -> frozenset[str]:
    """What classes and modules of ours keep to themselves."""
    names = set()
    for path in CODE:
        for node in ast.walk(tree_of(path)):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
    return frozenset(name for name in names if is_private(name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def used(path: Path) -> Iterator[tuple[int, str]]:
    """Private names that a file uses of something else than itself, by attribute or by string."""
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.Call(func=ast.Attribute(attr="setattr" | "delattr" | "object")):
                for given in node.args[:2]:
                    if isinstance(given, ast.Constant) and isinstance(given.value, str):
                        yield node.lineno, given.value.rpartition(".")[2]
            case ast.ImportFrom():
                for alias in node.names:
                    yield node.lineno, alias.name


def own_names(path: Path) -> set[str]:
    return {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        or (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        )
    }


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_tests_and_benchmarks_touch_nothing_private(path: Path) -> None:
    wanted = private_names() - own_names(path)
    found = [f"{path}:{line} {name}" for line, name in used(path) if name in wanted]

    assert not found
