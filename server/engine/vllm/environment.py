"""The environment variables of vLLM's processes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infuse.server.engine.vllm.config import SERVER

_TCMALLOC = "libtcmalloc_minimal.so.4"
_LIBRARIES = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))


@contextmanager
def environment_of_workers(is_cpu: bool, workers: int) -> Iterator[None]:
    """Within: processes that are started have the variables that vLLM's workers need. Those that
    the user has set win."""
    before = dict(os.environ)
    os.environ.update(variables(Path(sys.prefix), is_cpu, workers) | before)
    # Not the user's to choose: the workers hook into the first of vLLM's two model runners.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ[SERVER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def variables(prefix: Path, is_cpu: bool, workers: int = 1) -> dict[str, str]:
    """`prefix`: the folder of the environment that vLLM is installed in."""
    return {"VLLM_NO_USAGE_STATS": "1"} | (_on_cpus(prefix, workers) if is_cpu else {})


def _on_cpus(prefix: Path, workers: int) -> dict[str, str]:
    """What vLLM's guide for CPUs recommends: all cores, its OpenMP, tcmalloc where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // workers
    # Where there is no core for each worker, they share all.
    shares = [cores[size * each : size * (each + 1)] or cores for each in range(workers)]
    preload = [*prefix.glob("lib/libiomp5.so"), *_tcmalloc()]
    return {
        "LD_PRELOAD": ":".join(str(path) for path in preload),
        "OMP_NUM_THREADS": str(len(shares[0])),
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in shares),
        # 0.32 cannot load what its ahead-of-time compilation saved on a CPU, and would compile for
        # minutes at every start; inductor's own cache works.
        "VLLM_USE_AOT_COMPILE": "0",
    }


def _tcmalloc() -> list[Path]:
    found = (path for root in _LIBRARIES if root.is_dir() for path in root.rglob(_TCMALLOC))
    return list(found)[:1]
