"""Where a decode step's time goes: `python -m benchmarks.profile NAME` adds a column of that name,
`python -m benchmarks.profile NAME bfloat16` one of the model in that dtype.

The parts are timed in the engine's own steps: by torch's profiler where they are its operators, by
clocks around functions elsewhere. What lies between products, attention and adapters inside a
forward is "elementwise" (norms, rotary, activations, and the way from operator to operator), and
"cache" is rows that outgrow their strips.
"""

import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.report import PROFILE
from benchmarks.workload import Template
from infuse.adapters.model.layer import Scale
from infuse.adapters.registry import AdapterRegistry
from infuse.server.app import load_services
from infuse.server.engine import GenerationRequest, SamplingParams
from infuse.server.engine.model_files import default_model_folder
from infuse.server.engine.native.cache.kv_cache import StripCache
from infuse.server.engine.native.cache.strip_attention import StripPlan
from infuse.server.engine.native.core import EngineCore
from infuse.server.engine.native.forward.runner import FlatRunner
from infuse.server.engine.native.model import packing
from infuse.server.engine.native.sampling.sampler import Sampler
from infuse.server.settings import Settings

ROWS, PROMPT, STEPS = 32, 64, 128
"""As many steps as a strip of 128 tokens lasts: each row outgrows one once."""


_KERNELS = {"infuse::kernel_linear": "gemm", "infuse::kernel_attend": "attention"}
"""The adapters' vectors are in the products."""


class Clocks:
    """Seconds spent in functions, by what they are called here."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, owner: Any, function: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        setattr(owner, function, timed)


def main(name: str, dtype: str = "float32") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        parts, step = measure(Path(scratch), dtype)
    found = json.loads(PROFILE.read_text()) if PROFILE.exists() else {}
    found.pop(name, None)
    found[name] = {"rows": ROWS, "step_ms": step, "parts_ms": parts}
    PROFILE.write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, dtype: str) -> tuple[dict[str, float], float]:
    """Milliseconds by part, in the mean of the steps, and of a step in the median of those that
    were not timed within. 32 rows decode, each on an adapter of its own."""
    model = default_model_folder()
    names = [f"adapter-{row:02}" for row in range(ROWS)]
    template = Template(model, folder)
    for seed, each in enumerate(names):
        template.write(folder / "adapters" / each, seed)
    services = load_services(
        Settings(
            dtype=dtype,
            adapters_dir=folder / "store",
            preload_adapters=folder / "adapters",
            max_model_len=1024,
            prefix_cache=False,
            compile=True,
        )
    )
    core = services.engine.core
    _ask(core, services.registry, names)
    untimed = [_seconds(core) for _ in range(STEPS)]
    while core:
        core.step()
    _ask(core, services.registry, names)
    return _parts(core), 1e3 * median(untimed)


def _ask(core: EngineCore, registry: AdapterRegistry, names: list[str]) -> None:
    """Until all rows decode."""
    draw = random.Random(0)
    for each in names:
        core.add(
            GenerationRequest(
                id=each,
                prompt=tuple(draw.choices(range(1000, 40000), k=PROMPT)),
                params=SamplingParams(temperature=0, max_tokens=STEPS + PROMPT, ignore_eos=True),
                lease=registry.lease(each),
            )
        )
    begun: set[str] = set()
    while len(begun) < len(names):
        begun |= {output.request_id for output in core.step() if output.token_ids}


def _parts(core: EngineCore) -> dict[str, float]:
    clocks = Clocks()
    clocks.time(packing, "_packed_linear", "gemm")
    clocks.time(StripPlan, "attend", "attention")
    clocks.time(Scale, "scale_", "adapters")
    clocks.time(Scale, "scaled", "adapters")
    clocks.time(StripCache, "reserve", "cache")
    clocks.time(Sampler, "sample", "sampling")
    clocks.time(FlatRunner, "run", "forward")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step = sum(_seconds(core) for _ in range(STEPS))
    spent = clocks.seconds
    for operators in profiled.key_averages():
        if operators.key in _KERNELS:
            spent[_KERNELS[operators.key]] += operators.cpu_time_total / 1e6
    inside = spent["gemm"] + spent["attention"] + spent["adapters"]
    parts = {
        "gemm": spent["gemm"],
        "attention": spent["attention"],
        "elementwise": spent["forward"] - inside,
        "adapters": spent["adapters"],
        "sampling": spent["sampling"],
        "cache": spent["cache"],
        "python": step - spent["forward"] - spent["sampling"] - spent["cache"],
    }
    return {part: 1e3 * seconds / STEPS for part, seconds in parts.items()}


def _seconds(core: EngineCore) -> float:
    began = time.perf_counter()
    core.step()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(*sys.argv[1:])
