"""How long the model's threads spin while they wait for each other."""

import os


def variables() -> dict[str, str]:
    """Environment variables for libgomp, to be set before torch loads it.

    A waiting thread spins for 2,000 turns, about 60 µs, and then yields its core. With libgomp's
    default of 300,000 it keeps a core that the other threads need, whenever another process
    computes (docs/decisions/0028-short-waits.md). Variables that the user has set win.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return {}
    return {"GOMP_SPINCOUNT": "2000"}
