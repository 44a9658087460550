"""What a run works with: how long it may take, the prompts, the adapters, and the engines."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import typer

from benchmarks import peers
from benchmarks.engines import Engine, EngineFailed, Request
from benchmarks.engines.client import BASE
from benchmarks.engines.infuse_http import EitherWay, InfuseHttp
from benchmarks.engines.worker import ROOT, Worker
from benchmarks.workload import Template, make_lora_adapters, random_prompts
from infuse.adapters.checkpoint.config import WEIGHTS_FILE
from infuse.adapters.storage.store import AdapterStore
from infuse.server import openmp
from infuse.server.engine.model_files import cache_dir, default_model_folder

WINDOW = 1024
"""Tokens of the longest row that engines plan for. The model's own is eight times as long: a prompt
that fills it would take minutes."""
CACHE_TOKENS = 16_384
"""Room for keys and values: more than any section fills, and several engines share the memory."""
ROWS = 32
LONGEST_PROMPT = 64
WARM_UP_TOKENS = 4
LORA_ADAPTERS = 8
"""As many as vLLM holds in one batch with settings that its users choose."""
PLAIN = ("--no-prefix-cache", "--no-speculation")
"""Prompts are asked again and again: no engine may remember them, or guess."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything, so that a run ends within its time."""

    sections: tuple[str, ...] | None
    """None: all."""
    adapter_turns: int
    """Of adapters beside the base, by fours: each side is once on each server. 2: of 32 adapters
    only."""
    skew_turns: int
    """The same of popularities that no target is about."""
    peer_turns: int
    peft_turns: int
    """Of PEFT, far from its target."""
    tokens: int
    """In the prompt, and as many generated: under load."""
    vllm_tokens: int
    """The same against vLLM, and over HTTP against in process."""
    round_tokens: int
    """The same with adapters or without."""
    on_vllm_turns: int
    """Of adapters on vLLM, beside vLLM as it is, by fours: each side is once on each process of its
    kind. Two turns are a pair."""
    on_vllm_lora_turns: int
    """Of adapters on vLLM beside its LoRA."""
    fill_turns: int
    """On vLLM, of requests beside which slots are filled."""
    slow_peer_turns: int
    """Of transformers, which takes half a minute a round."""
    lora_turns: int
    """Of LoRA in vLLM, which does too."""
    registered: int
    http_turns: int
    """Over HTTP and in process, by twos."""
    replica_turns: int
    loads: Mapping[float, float]
    """Part of the saturation -> seconds of Poisson arrivals. A p99 takes hundreds of them."""
    repeats: int
    """Of single measurements."""


FULL = Plan(
    sections=None,
    adapter_turns=28,
    skew_turns=4,
    peer_turns=5,
    peft_turns=2,
    tokens=16,
    vllm_tokens=64,
    round_tokens=24,
    on_vllm_turns=48,
    on_vllm_lora_turns=20,
    fill_turns=12,
    slow_peer_turns=2,
    lora_turns=1,
    registered=10_000,
    http_turns=8,
    replica_turns=5,
    loads={0.25: 10.0, 0.5: 40.0, 0.8: 15.0},
    repeats=5,
)
QUICK = Plan(
    sections=("adapters", "peers", "load"),
    adapter_turns=2,
    skew_turns=0,
    peer_turns=1,
    peft_turns=0,
    tokens=16,
    vllm_tokens=16,
    round_tokens=16,
    on_vllm_turns=0,
    on_vllm_lora_turns=0,
    fill_turns=0,
    slow_peer_turns=0,
    lora_turns=0,
    registered=10_000,
    http_turns=2,
    replica_turns=1,
    loads={0.5: 5.0},
    repeats=1,
)


def adapter_name(number: int) -> str:
    return f"adapter-{number:05}"


class Bench:
    """Engines are started when they are first asked for and live until they are stopped, at the
    latest at the block's end. One that does not start raises EngineFailed, each time."""

    def __init__(self, plan: Plan, scratch: Path, engines: ExitStack) -> None:
        """`engines` stops those that still run, when it is closed."""
        self.plan = plan
        self.model = default_model_folder()
        self.scratch = scratch
        self.prompts = random_prompts(self.model, ROWS, LONGEST_PROMPT)
        self.names = [adapter_name(number) for number in range(plan.registered)]
        """Of all registered adapters; the first few are at hand as folders too."""
        self._running: dict[str, Engine] = {}
        self._failed: dict[str, EngineFailed] = {}
        self._copies: dict[str, Path] = {}
        """Of the store, by the server that has it."""
        self._engines = engines

    @classmethod
    @contextmanager
    def session(cls, plan: Plan) -> Iterator["Bench"]:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as engines:
            yield cls(plan, Path(scratch), engines)

    def requests(
        self,
        adapters: Sequence[str | None],
        tokens: int | None = None,
        at: Sequence[float] | None = None,
    ) -> list[Request]:
        """One request for each name (None: the base), with the prompts in order, over and over.

        `tokens` in the prompt and as many generated; the plan's, if left out.
        """
        length = tokens or self.plan.tokens
        return [
            Request(
                self.prompts[number % ROWS][:length],
                length,
                adapter,
                0.0 if at is None else at[number],
            )
            for number, adapter in enumerate(adapters)
        ]

    @cached_property
    def template(self) -> Template:
        return Template(self.model, self.scratch)

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The first 32 adapters, as PEFT saves them."""
        return {
            name: self.template.write(self.scratch / "ia3" / name, number)
            for number, name in enumerate(self.names[:ROWS])
        }

    @cached_property
    def store(self) -> Path:
        """All adapters, registered once and kept."""
        folder = cache_dir() / "benchmarks" / f"registered-{len(self.names)}"
        register(folder, self.template, len(self.names))
        return folder

    def prepare(self) -> None:
        """Make what a run needs and does not measure."""
        assert self.folders
        assert self.store.is_dir()

    def engine(self, name: str, make: Callable[[], Engine]) -> Engine:
        """The running one, or a new one that has answered a few tokens with each of its rows."""
        if name in self._failed:
            raise self._failed[name]
        if name not in self._running:
            typer.echo(f"  starting {name}")
            engine = make()
            self._engines.callback(engine.stop)
            try:
                engine.start()
                engine.run(self.requests(self._known_to(name), WARM_UP_TOKENS))
            except EngineFailed as error:
                self._failed[name] = error
                raise
            self._running[name] = engine
        return self._running[name]

    def _known_to(self, name: str) -> list[str | None]:
        if name.startswith("infuse"):
            return [*self.names[:ROWS]]
        return [self.names[0]] if name == "peft" else [None] * ROWS

    def stop(self, *names: str) -> None:
        """End engines before the others, if they run: memory is for those that are compared."""
        for name in names:
            if name in self._running:
                self._running.pop(name).stop()

    def keep_only(self, *names: str) -> None:
        self.stop(*(each for each in list(self._running) if each not in names))

    def server(
        self,
        name: str = "infuse",
        *flags: object,
        plain: bool = True,
        store: Path | None = None,
    ) -> InfuseHttp:
        """The server with all adapters; or, with `flags`, one beside it with the first 32, or with
        `store`: a store has one server. `plain`: it remembers no prompt and guesses no token."""
        if store is None and not flags:
            store = self.store
        where: tuple[object, ...] = ("--adapters-dir", store or self.scratch / name)
        preloaded = ("--preload-adapters", self._preloaded()) if store is None else ()
        log = self.scratch / f"{name}.log"
        off = PLAIN if plain else ()
        engine = self.engine(
            name, lambda: InfuseHttp(name, log, *self._every(), *where, *preloaded, *flags, *off)
        )
        assert isinstance(engine, InfuseHttp)
        return engine

    def sharing(self, name: str, *flags: object, threads: int, command: str) -> InfuseHttp:
        """A server, or with `deploy` several, on one store with the first 32 adapters."""
        own = self.scratch / name
        where = (
            *("--adapters-dir", self.scratch / "shared", "--shared-store"),
            *("--merges-dir", own, "--usage-dir", own, "--preload-adapters", self._preloaded()),
        )
        engine = self.engine(
            name,
            lambda: InfuseHttp(
                name,
                self.scratch / f"{name}.log",
                *self._every(),
                *where,
                *flags,
                *PLAIN,
                command=command,
                environment={"OMP_NUM_THREADS": str(threads)},
            ),
        )
        assert isinstance(engine, InfuseHttp)
        return engine

    def _every(self) -> tuple[object, ...]:
        """The flags of every server."""
        return (
            *("--model", self.model, "--max-model-len", WINDOW),
            *("--kv-cache-tokens", CACHE_TOKENS, "--compile"),
        )

    def replica(self, number: int) -> InfuseHttp:
        """The server (0), or another one like it with a copy of its store."""
        if number == 0:
            return self.server()
        name = f"infuse-{number}"
        if name not in self._copies:
            self._copies[name] = self._copied_store(name)
        return self.server(name, store=self._copies[name])

    def _copied_store(self, name: str) -> Path:
        """Contents never change: they need no copy."""
        copied = self.store.with_name(f"{self.store.name}-{name}")
        shutil.rmtree(copied, ignore_errors=True)
        self._engines.callback(shutil.rmtree, copied)

        def copy(source: str, target: str) -> None:
            (os.link if source.endswith(WEIGHTS_FILE) else shutil.copyfile)(source, target)

        shutil.copytree(self.store, copied, copy_function=copy)
        return copied

    def inprocess(self, dtype: str = "float32", twin: bool = False, tree: Path = ROOT) -> EitherWay:
        """Our engine, to be asked without HTTP, with the first 32 adapters. `twin`: another.
        `tree`: the checkout whose code it runs."""
        name = "infuse-inprocess" + ("" if dtype == "float32" else f"-{dtype}")
        name += "-twin" if twin else ""
        name += "" if tree == ROOT else "-of-another-commit"
        settings = {
            "model": self.model,
            "served_model_name": BASE,
            "dtype": dtype,
            "adapters_dir": self.scratch / name,
            "preload_adapters": self._preloaded(),
            "max_model_len": WINDOW,
            "kv_cache_tokens": CACHE_TOKENS,
            "prefix_cache": False,
            "speculation": False,
            "compile": True,
        }
        log = self.scratch / f"{name}.log"
        engine = self.engine(
            name,
            lambda: EitherWay(
                name,
                "infuse_inprocess",
                settings,
                log=log,
                environment=openmp.variables(),
                tree=tree,
            ),
        )
        assert isinstance(engine, EitherWay)
        return engine

    def peft(self) -> Engine:
        arguments = {"adapters": self.folders, **self._precisely()}
        return self.engine("peft", lambda: self._worker("peft", "peft_swap", arguments))

    def generate(self) -> Engine:
        return self.engine(
            "generate",
            lambda: self._worker("generate", "transformers_generate", self._precisely()),
        )

    def batching(self) -> Engine:
        arguments = {**self._precisely(), "rows": ROWS, "tokens": ROWS * LONGEST_PROMPT}
        return self.engine(
            "batching", lambda: self._worker("batching", "transformers_batching", arguments)
        )

    def vllm(
        self, dtype: str = "float32", lora: bool = False, ia3: bool = False, twin: bool = False
    ) -> Worker:
        """vLLM as it is; with its LoRA; or with our workers and the first 32 adapters. `twin`:
        another."""
        name = "vllm" + ("-lora" if lora else "") + ("-ia3" if ia3 else "")
        name += "" if dtype == "float32" else f"-{dtype}"
        name += "-twin" if twin else ""
        arguments = {
            "model": self.model,
            "dtype": dtype,
            "rows": ROWS,
            "window": WINDOW,
            "adapters": self.lora_folders if lora else {},
            "ia3": self.folders if ia3 else {},
        }
        engine = self.engine(
            name,
            lambda: Worker(
                name,
                "vllm_offline",
                arguments,
                python=peers.vllm_python(),
                log=self.scratch / f"{name}.log",
                environment=peers.vllm_environment(peers.vllm_folder()),
            ),
        )
        assert isinstance(engine, Worker)
        return engine

    def server_on_vllm(self, slots: int) -> InfuseHttp:
        """Our server with the vLLM engine, the first 32 adapters and so many slots."""
        name = "infuse-on-vllm"
        flags = (
            *("--engine", "vllm", "--model", self.model, "--dtype", "float32"),
            *("--max-model-len", WINDOW, "--kv-cache-tokens", CACHE_TOKENS),
            *("--adapters-dir", self.scratch / name, "--preload-adapters", self._preloaded()),
            *("--max-resident-adapters", slots, "--no-prefix-cache"),
        )
        log = self.scratch / f"{name}.log"
        python = peers.vllm_python()
        engine = self.engine(name, lambda: InfuseHttp(name, log, *flags, python=python))
        assert isinstance(engine, InfuseHttp)
        return engine

    @cached_property
    def lora_folders(self) -> dict[str, Path]:
        return make_lora_adapters(self.model, self.scratch / "lora", LORA_ADAPTERS)

    def _preloaded(self) -> Path:
        return next(iter(self.folders.values())).parent

    def _precisely(self) -> dict[str, object]:
        return {"model": self.model, "dtype": "float32"}

    def _worker(self, name: str, module: str, arguments: dict[str, object]) -> Worker:
        return Worker(name, module, arguments, log=self.scratch / f"{name}.log")


def register(folder: Path, template: Template, adapters: int) -> None:
    """Register what is not there yet."""
    store = AdapterStore(folder)
    for number in range(adapters):
        if adapter_name(number) not in store:
            with store.staging() as staged:
                for file, data in template.files(number).items():
                    (staged / file).write_bytes(data)
                store.create(adapter_name(number), staged)
            if number % 1000 == 999:
                typer.echo(f"  {number + 1} adapters registered")
    store.close()
