"""Runs other work beside the model's thread, without threads that slow down its steps.

libgomp (OpenMP) keeps a team of workers for each thread that has computed on several cores, as long
as that thread lives. Once there are more workers than cores, all of them sleep at every barrier
instead of spinning, and a step takes 1.5 times as long.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")


def on_passing_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread of its own, whose team of workers ends with it. Return the result."""
    name = threading.current_thread().name
    with ThreadPoolExecutor(1, thread_name_prefix=name) as thread:
        return thread.submit(work).result()


def compute_alone() -> None:
    """Let the current thread compute without workers from now on."""
    # torch sets the number of workers when a thread first asks for it.
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
