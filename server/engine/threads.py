"""Runs other work beside the model's thread, without threads that slow down its steps.

libgomp (OpenMP) keeps a team of workers for each thread that has computed on several cores, as long
as that thread lives. Once there are more workers than cores, all of them sleep at every barrier
instead of spinning, and a step takes 1.5 times as long.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")


def on_passing_thread(work: Callable[[], T], niceness: int = 0) -> T:
    """Run `work` on a thread of its own, whose team of workers ends with it. Return the result."""
    name = threading.current_thread().name
    with ThreadPoolExecutor(1, name, initializer=partial(be_nice, niceness)) as thread:
        return thread.submit(work).result()


def be_nice(niceness: int) -> None:
    """Lower the priority of the current thread, which has one of its own on Linux. It is never
    raised, which only root may do."""
    thread = threading.get_native_id()
    present = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, present))


def compute_alone() -> None:
    """Let the current thread compute without workers from now on."""
    # torch sets the number of workers when a thread first asks for it.
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
