"""Changes adapters in a store until it is killed; prints each change before and after it.

python -m tests.adapters.storage.crash_worker FOLDER|BUCKET SEED [CACHE]
"""

import random
import sys
from pathlib import Path

from infuse.adapters.storage.storage import Storage
from infuse.adapters.storage.store import AdapterStore

NAMES = ("a", "b", "c")
FILES = 3


def write(staged: Path, content: str) -> None:
    """Files of about ten kilobytes, each with the name of its content."""
    for index in range(FILES):
        (staged / f"file{index}").write_text(f"{content} {index}\n" * 1000)


def storage_at(place: str, cache: str | None) -> Path | Storage:
    if cache is None:
        return Path(place)
    # Not needed, and not there without site-packages, for a folder.
    from infuse.adapters.storage.bucket import BucketStorage
    from infuse.adapters.storage.objects import Objects

    return BucketStorage(Objects.at(place), Path(cache))


def main(place: str, seed: int, cache: str | None = None) -> None:
    choose = random.Random(seed)
    print("starts", flush=True)
    store = AdapterStore(storage_at(place, cache), keep_revisions=3)
    while True:
        name, content = choose.choice(NAMES), f"content{choose.randrange(5)}"
        changes = ("replace", "replace", "delete", "roll_back")
        change = choose.choice(changes) if name in store else "create"
        if change == "roll_back":
            wanted = choose.choice(store.revisions(name))
            content = (store.files(wanted) / "file0").read_text().split()[0]
        print("begins", change, name, content, flush=True)
        if change == "delete":
            store.delete(name)
        elif change == "roll_back":
            store.roll_back(name, wanted.number)
        else:
            with store.staging() as staged:
                write(staged, content)
                if change == "create":
                    store.create(name, staged)
                else:
                    store.replace(name, staged)
        print("ends", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
