"""The inside of an engine's process: a JSON line per round in, a JSON line out.

Only the standard library is imported here: a peer's environment has none of ours.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.engines import Request, Round

Run = Callable[[list[Request], int | None], Round]


def serve(make: Callable[..., Run]) -> None:
    """Make the engine from the JSON object on the command line, then answer rounds until EOF.

    Whatever libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    run = make(**json.loads(sys.argv[1]))
    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        requests = [Request(**each) for each in asked["requests"]]
        try:
            say(asdict(run(requests, asked["in_flight"])))
        except Exception as error:  # Whatever a peer raises: the run says so and goes on.
            say({"error": f"{type(error).__name__}: {error}"})
