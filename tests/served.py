"""A server that a command starts in a process of its own."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_STARTUP_SECONDS = 240


def address_of(
    server: "subprocess.Popen[bytes]", log: Path, seconds: float = _STARTUP_SECONDS
) -> str:
    """Wait until a server's log has its address. Fails where the server ends, or takes longer."""
    deadline = time.monotonic() + seconds
    while not (
        found := re.search(r"answers on ((?:http|https)(?:\+unix)?://\S+)", log.read_text())
    ):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found[1]


@contextmanager
def served_by(
    command: Sequence[str | Path], log: Path, cwd: Path | None = None, env: Mapping[str, str] = {}
) -> Iterator[str]:
    """Within: the server's address. The signal goes to the whole group, as a terminal's does."""
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=os.environ | env,
            start_new_session=True,
        )
    try:
        yield address_of(server, log)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM)
