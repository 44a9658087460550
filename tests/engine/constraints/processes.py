"""The processes that vet grammars, as the machine shows them."""

from contextlib import suppress

import psutil

from infuse.server.engine.constraints import vetting


def forks_of(server: psutil.Process) -> list[psutil.Process]:
    """The processes of a server that those are forked from which vet grammars."""
    found = []
    for each in server.children():
        with suppress(psutil.NoSuchProcess):
            if vetting.__file__ in each.cmdline():
                found.append(each)
    return found


def vetting_processes(server: psutil.Process | None = None) -> list[tuple[str, int]]:
    """The state and the niceness of each process of a server, or of ours, that vets a grammar."""
    found = []
    for forks in forks_of(server or psutil.Process()):
        with suppress(psutil.NoSuchProcess):
            found += [(each.status(), each.nice()) for each in forks.children()]
    return found
