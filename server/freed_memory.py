"""Gives memory that the process has freed back to the system.

glibc gives back by itself only what lies above the last block in use. Where blocks of all sizes
come and go at once, what lies between those in use adds up to hundreds of MB over hours.
"""

import asyncio
import ctypes

from anyio import CapacityLimiter, to_thread


async def give_back_freed_memory(every: float = 60.0) -> None:
    """Do it until cancelled, with `every` seconds between: what was given back must be asked for
    again when it is needed. Without glibc it does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    limiter = CapacityLimiter(1)
    while trim is not None:
        await asyncio.sleep(every)
        await to_thread.run_sync(trim, 0, limiter=limiter)
