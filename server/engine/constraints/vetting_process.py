"""Runs `vetting` as a process of its own, so that no grammar costs more than its limits."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from infuse.server.engine.constraints import vetting
from infuse.server.engine.constraints.vetting import GrammarKind
from infuse.server.engine.threads import be_nice

TOO_BUSY = "takes too long to compile"
"""The problem of a grammar that a busy machine could not compile in time."""
NICENESS = 10
"""The priority of slow grammars."""
REST = 9
"""While the model is in use, a slow grammar rests so many times as long as it is vetted for
(docs/decisions/0062-rests.md)."""
_SLICE = 0.03
"""Seconds that a slow grammar is vetted for, between rests."""


class Slow(Exception):
    """A grammar takes longer than `vetting.QUICK_SECONDS` to compile."""


async def vet(kind: GrammarKind, text: str) -> str:
    """Compile a grammar in another process, and return why it is refused. Empty: it is accepted.

    The process is killed if the caller is cancelled. Raises Slow.
    """
    async with _process() as process:
        return await _result(process, kind, text, stops_if_slow=True)


async def vet_slowly(kind: GrammarKind, text: str, is_busy: Callable[[], bool]) -> str:
    """As `vet`, but at a low priority, and resting most of the time while the model is in use."""
    async with _process() as process:
        resting = asyncio.create_task(_rest(process, is_busy))
        try:
            return await _result(process, kind, text, stops_if_slow=False)
        finally:
            resting.cancel()


@asynccontextmanager
async def _process() -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a process that vets. It has ended when the context has."""
    pipe, command = asyncio.subprocess.PIPE, (sys.executable, "-I", vetting.__file__)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _result(
    process: asyncio.subprocess.Process, kind: GrammarKind, text: str, *, stops_if_slow: bool
) -> str:
    asked = json.dumps([kind, text, stops_if_slow]).encode()
    try:
        async with asyncio.timeout(vetting.WALL_SECONDS):
            said, _ = await process.communicate(asked)
    except TimeoutError:
        return TOO_BUSY
    if process.returncode == -signal.SIGPROF:
        raise Slow
    if process.returncode != 0:
        return "takes too much time or memory to compile"
    return str(json.loads(said))


async def _rest(process: asyncio.subprocess.Process, is_busy: Callable[[], bool]) -> None:
    with suppress(ProcessLookupError):
        be_nice(NICENESS, process.pid)
        while True:
            await asyncio.sleep(_SLICE)
            if is_busy():
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(REST * _SLICE)
                process.send_signal(signal.SIGCONT)
