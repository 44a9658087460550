"""The model's thread is the only one that computes on several cores for long.

libgomp keeps a team of workers for each thread that has computed on several cores, for as long as
that thread lives. Once there are more workers than cores, all of them sleep at every barrier rather
than wait for it, and a step takes 1.5 times as long.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def on_passing_thread(work: Callable[[], T]) -> T:
    """What `work` returns. Its team of workers ends with its thread."""
    name = threading.current_thread().name
    with ThreadPoolExecutor(1, thread_name_prefix=name) as thread:
        return thread.submit(work).result()
