"""How much the adapters of some names may take of a store."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infuse.adapters.errors import QuotaExceeded
from infuse.adapters.storage.quota import Quota
from infuse.adapters.storage.revision import Origin
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.storage.store_contents import create, write

KEPT = 2
"""Revisions that are kept of a name."""
SIZE = len("config of a") + 100
"""Bytes of each content."""
CHANGES = st.lists(st.tuples(st.sampled_from(["a/1", "a/2", "b"]), st.sampled_from("xyz")))


def is_a(name: str) -> bool:
    return name.startswith("a/")


def put(store: AdapterStore, name: str, content: str, quota: Quota) -> bool:
    """Add a name, or a revision to it; whether that was allowed."""
    with store.staging() as staged:
        write(staged, content)
        try:
            if name in store:
                store.replace(name, staged, None, Origin(), quota)
            else:
                store.create(name, staged, Origin(), quota)
        except QuotaExceeded:
            return False
    return True


def after(held: dict[str, list[str]], name: str, content: str) -> dict[str, list[str]]:
    """The contents of each name after a change, as the store keeps them."""
    before = held.get(name, [])
    if before[-1:] == [content]:
        return held
    return {**held, name: [*before, content][-KEPT:]}


def fits(held: dict[str, list[str]], quota: Quota) -> bool:
    own = {name: contents for name, contents in held.items() if quota.covers(name)}
    nbytes = SIZE * len({each for contents in own.values() for each in contents})
    few = quota.adapters is None or len(own) <= quota.adapters
    return few and (quota.nbytes is None or nbytes <= quota.nbytes)


@settings(deadline=None, max_examples=60)
@given(CHANGES, st.integers(1, 2) | st.none(), st.integers(SIZE, 3 * SIZE) | st.none())
def test_what_fits_is_kept_and_what_does_not_changes_nothing(
    changes: Sequence[tuple[str, str]], adapters: int | None, nbytes: int | None
) -> None:
    quota, held = Quota(is_a, adapters, nbytes), dict[str, list[str]]()
    with TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder), KEPT)
        for name, content in changes:
            wanted = after(held, name, content)
            # What counts for nobody is not limited: no key with this quota may change it.
            allowed = wanted is held or not is_a(name) or fits(wanted, quota)
            if is_a(name):
                assert put(store, name, content, quota) == allowed
            else:
                assert put(store, name, content, Quota(is_a))
            held = wanted if allowed else held
            assert store.names() == sorted(held)
        store.close()


def test_a_deleted_adapter_makes_room(tmp_path: Path) -> None:
    store, quota = AdapterStore(tmp_path), Quota(is_a, adapters=1)
    create(store, "a/1")
    assert not put(store, "a/2", "x", quota)

    store.delete("a/1")

    assert put(store, "a/2", "x", quota)
    store.close()


def test_a_refusal_says_how_much_it_would_be_and_may_be(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    create(store, "a/1")

    with store.staging() as staged:
        write(staged, "b")
        with pytest.raises(QuotaExceeded, match=f"{2 * SIZE} bytes of adapters.* allows {SIZE}:"):
            store.create("a/2", staged, Origin(), Quota(is_a, nbytes=SIZE))
    store.close()
