"""Teams of libgomp's workers: only one may stay, or all of them sleep at every barrier."""

import subprocess
import sys

SCRIPT = """
import os, time, torch
from server.engine.threads import on_passing_thread

def threads():
    return len(os.listdir("/proc/self/task"))

def work():
    x = torch.randn(512, 512)
    (x @ x).exp()
    return threads()

before = threads()
assert on_passing_thread(work) > before + 1, "the work had a worker beside its own thread"
late = time.monotonic() + 10
while threads() > before and time.monotonic() < late:
    time.sleep(0.01)
print(threads() - before)
"""


def test_workers_end_with_the_thread_that_they_worked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=True,
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "2"},
    )
    assert done.stdout == "0\n"
