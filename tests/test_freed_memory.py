"""Memory that was freed is given back to the system, also between blocks in use."""

import subprocess
import sys

MEBIBYTE = 1 << 20
# Each block is too small for a mapping of its own; every hundredth stays in use.
CODE = f"""
import asyncio, psutil
from infuse.server.freed_memory import give_back_freed_memory

held = lambda: psutil.Process().memory_info().rss // {MEBIBYTE}
blocks = [bytearray(100_000) for _ in range(2_000)]
kept = blocks[::100]
del blocks
before = held()

async def until_less():
    giving = asyncio.create_task(give_back_freed_memory(every=0.01))
    while held() > before - 150:
        await asyncio.sleep(0.01)
    giving.cancel()

asyncio.run(until_less())
"""


def test_what_lies_between_blocks_in_use_is_given_back() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)
