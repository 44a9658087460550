"""Starts `infuse …`, each in a process of its own, without the time that imports take.

python tests/api/replica_starter.py

reads lines of JSON, [log, argument, …], and answers each with the id of a process.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

ENDED = "It has ended with status"
SERVER = "infuse.server" if Path("infuse").exists() else "server"
"""The earlier release installed `server`."""


def run(log: str, arguments: list[str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.setsid()
    sys.argv = ["infuse", *arguments]
    status: object = 1
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    finally:
        print(f"{ENDED} {status or 0}", flush=True)
        os._exit(1)


def start_all() -> None:
    children: list[int] = []
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            run(log, arguments)
        children.append(child)
        print(child, flush=True)
        # Whoever has been killed meanwhile must not stay as a zombie.
        children = [each for each in children if os.waitpid(each, os.WNOHANG) == (0, 0)]


if __name__ == "__main__":
    import_module(f"{SERVER}.app")
    main = import_module(f"{SERVER}.cli").main

    start_all()
