"""Works on a merge, with another one behind it, until it is killed; says when it is at the end.

python -m tests.merge_worker FOLDER MODEL
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.server.jobs import MergeJobs

SUBMITTED = threading.Event()
"""Both merges are queued, and their ids are printed."""


class StuckJobs(MergeJobs):
    """Never finishes a merge."""

    def _watch(self, *_: Any) -> Callable[[float], None]:
        def report(share: float) -> None:
            if share == 1:
                SUBMITTED.wait()
                print("almost", flush=True)
                threading.Event().wait()

        return report


def main(folder: Path, model: str) -> None:
    jobs = StuckJobs(folder, model, "tiny")
    recipe = {"method": "product", "adapters": []}
    for _ in range(2):
        print(jobs.submit(AdapterVectors({}), recipe, None).id, flush=True)
    SUBMITTED.set()
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
