"""Teams of libgomp's workers: only one may stay, or all of them sleep at every barrier; and threads
that wait for each other do not keep their cores for long."""

import os
import subprocess
import sys

SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
COMMAND = """
from infuse.server.cli import main
try:
    main()
finally:
    import torch
"""
WORK = """
import os, time, torch
from infuse.server.engine.threads import compute_alone, on_passing_thread

def threads():
    return len(os.listdir("/proc/self/task"))

def work():
    x = torch.randn(512, 512)
    (x @ x).exp()
    return threads()

before = threads()
"""
PASSING = """
assert on_passing_thread(work) > before + 1, "the work had a worker beside its own thread"
late = time.monotonic() + 10
while threads() > before and time.monotonic() < late:
    time.sleep(0.01)
print(threads() - before)
"""
ALONE = "print(on_passing_thread(lambda: compute_alone() or work()) - before)"


def printed(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WORK + script],
        check=True,
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "2"},
    )
    return done.stdout


def test_workers_end_with_the_thread_that_they_worked_for() -> None:
    assert printed(PASSING) == "0\n"


def test_a_thread_that_computes_alone_has_no_workers() -> None:
    assert printed(ALONE) == "1\n", "itself"


def spinning(**environment: str) -> str:
    """What libgomp says it read when torch loaded it, for any command of ours."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--help"],
        env={
            **{key: value for key, value in os.environ.items() if key not in SPINNING},
            "OMP_DISPLAY_ENV": "verbose",
            **environment,
        },
        check=True,
        capture_output=True,
        text=True,
    )
    return next(line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line)


def test_a_thread_that_waits_soon_leaves_its_core_to_others() -> None:
    assert "'2000'" in spinning()


def test_what_the_environment_says_of_waiting_goes_first() -> None:
    assert "'77'" in spinning(GOMP_SPINCOUNT="77")
    assert "'2000'" not in spinning(OMP_WAIT_POLICY="active")
