"""Changes adapters in a store with whatever release PYTHONPATH leads to; prints what it found, what
it acknowledged, and what it leaves, as JSON.

release_worker.py FOLDER|BUCKET CACHE alone|shared NAMES FIRST LAST
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PREFIX = "infuse." if (Path(os.environ["PYTHONPATH"]) / "infuse").exists() else ""
"""The earlier release installed `adapters`."""
LEASE = 10.0


def ours(module: str) -> Any:
    return import_module(f"{PREFIX}adapters.storage.{module}")


def opened(place: str, cache: Path, shared: bool) -> Any:
    open_store = ours("store").AdapterStore
    if "://" not in place:
        shared_folder = ours("shared_folder").SharedFolderStorage
        return open_store(shared_folder(Path(place), LEASE) if shared else Path(place), 3)
    objects = ours("objects").Objects.at(place)
    if not shared:
        return open_store(ours("bucket").BucketStorage(objects, cache), 3)
    shared_bucket = ours("shared_bucket").SharedBucketStorage
    return open_store(shared_bucket(objects, objects, cache, LEASE), 3)


def state_of(store: Any) -> dict[str, dict[int, str]]:
    """Read everything, and compare it with its digests."""
    return {
        name: {
            each.number: store.read(each, ["weights"])["weights"].decode()
            for each in store.revisions(name)
        }
        for name in store.names()
    }


def change(store: Any, name: str, number: int) -> None:
    if name in store and number % 5 == 0:
        store.describe(name, ours("revision").DetailsChange(description=f"{number}"), by="ci")
    elif name in store and number % 7 == 0:
        store.delete(name)
    elif name in store and number % 11 == 0:
        store.roll_back(name, store.revisions(name)[-1].number)
    else:
        with store.staging() as staged:
            (staged / "weights").write_text(f"{number}")
            store.replace(name, staged) if name in store else store.create(name, staged)


def main(place: str, cache: str, how: str, names: str, first: str, last: str) -> None:
    store = opened(place, Path(cache), how == "shared")
    found = state_of(store)
    for number in range(int(first), int(last)):
        change(store, f"{names}{number % 3}", number)
    print(json.dumps({"found": found, "left": state_of(store)}))
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
