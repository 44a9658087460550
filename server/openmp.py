"""How long the model's threads wait for each other with a core in their hands."""

import os


def variables() -> dict[str, str]:
    """What libgomp is to find in the environment, once torch loads it.

    A thread that waits spins for 2,000 turns, about 60 µs, and then gives its core away. With
    libgomp's own 300,000 it keeps the core that the others wait for, whenever another process
    computes (docs/decisions/0028-short-waits.md). What the user has set goes first.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return {}
    return {"GOMP_SPINCOUNT": "2000"}
