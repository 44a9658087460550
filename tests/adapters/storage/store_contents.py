"""Small contents for a store, each named by a letter."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infuse.adapters.storage.revision import Revision
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import OpenStore


def create(store: AdapterStore, name: str, content: str = "a") -> Revision:
    with store.staging() as staged:
        write(staged, content)
        return store.create(name, staged)


def replace(
    store: AdapterStore, name: str, content: str, if_match: str | None = None
) -> tuple[Revision, bool]:
    with store.staging() as staged:
        write(staged, content)
        return store.replace(name, staged, if_match)


def write(staged: Path, content: str) -> None:
    (staged / "config.json").write_text(f"config of {content}")
    (staged / "weights").write_text(content * 100)


def content_of(store: AdapterStore, revision: Revision) -> str:
    files = store.files(revision)
    assert sorted(path.name for path in files.iterdir()) == ["config.json", "weights"]
    content = (files / "config.json").read_text().removeprefix("config of ")
    assert (files / "weights").read_text() == content * 100
    return content


@contextmanager
def reopened(store: AdapterStore, open_store: OpenStore) -> Iterator[AdapterStore]:
    store.close()
    again = open_store()
    try:
        yield again
    finally:
        again.close()
