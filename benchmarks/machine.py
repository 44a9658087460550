"""What a figure was measured on, and of what."""

import os
import platform
import re
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from benchmarks.peers import VLLM

_VECTOR = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")
_ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpu)
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "vector": [flag for flag in _VECTOR if flag in _flags()],
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": version("peft"),
        "vllm": VLLM.partition("==")[2],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "server", "adapters")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def resident_bytes(group: int) -> int:
    """What all processes of a group hold in memory."""
    found = 0
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group:
                found += process.memory_info().rss
    return found


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    return bool({"avx512_bf16", "amx_bf16"} & _flags())


def _flags() -> set[str]:
    return set(Path("/proc/cpuinfo").read_text().split())


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip()
