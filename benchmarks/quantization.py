"""What 8 and 4 bits cost and save on the default model: `python -m benchmarks.quantization`.

The text that is scored is this repository's LICENSE. Speeds are taken in turns, in one run: only
their ratios mean something on a shared machine.
"""

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.bench import PLAIN, adapter_name
from benchmarks.engines import Request
from benchmarks.engines.infuse_http import InfuseHttp
from benchmarks.turns import Side, take_turns
from benchmarks.workload import Template, random_prompts
from infuse.server.engine.model_files import default_model_folder
from infuse.server.engine.native.model.loading import load_model
from infuse.server.engine.native.model.quantization import Quantization, weights_bytes

FORMATS: tuple[Quantization, ...] = ("none", "int8", "int4")
_WINDOW = 512
"""Tokens scored at a time."""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each format.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Requests at once, an adapter each.")] = 32,
    tokens_in: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 64,
    tokens_out: Annotated[int, typer.Option(min=2, help="Generated tokens.")] = 32,
) -> None:
    exactness()
    speed(rounds, rows, tokens_in, tokens_out)


@torch.inference_mode()
def exactness() -> None:
    """Perplexity, and how far each format's next-token distributions are from float32's."""
    exact: list[torch.Tensor] = []
    for quantization in FORMATS:
        loaded = load_model(None, "cpu", quantization=quantization)
        text = (Path(__file__).parents[1] / "LICENSE").read_text()
        windows = torch.tensor(loaded.tokenizer(text).input_ids).split(_WINDOW)
        found = [scores(loaded.model, window) for window in windows]
        exact = exact or found
        pairs = list(zip(exact, found, strict=True))
        chosen = torch.cat(
            [s[:-1].gather(1, w[1:, None]) for s, w in zip(found, windows, strict=True)]
        )
        divergence = torch.cat([(e.exp() * (e - f)).sum(-1) for e, f in pairs])
        agree = torch.cat([e.argmax(-1) == f.argmax(-1) for e, f in pairs])
        typer.echo(
            f"{quantization:5} {weights_bytes(loaded.model) / 1e6:6.0f} MB, "
            f"perplexity {math.exp(-float(chosen.mean())):7.3f}, "
            f"divergence {float(divergence.mean()):.4f}, "
            f"same best token {float(agree.float().mean()):.1%} of {len(agree)}"
        )


def scores(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[tokens, vocab]`."""
    logits: torch.Tensor = model(ids[None]).logits[0]
    return logits.log_softmax(-1)


def speed(rounds: int, rows: int, tokens_in: int, tokens_out: int) -> None:
    model = default_model_folder()
    prompts = random_prompts(model, rows, tokens_in)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        adapters = Path(scratch) / "adapters"
        template = Template(model, Path(scratch))
        names = [template.write(adapters / adapter_name(row), row).name for row in range(rows)]
        running = {
            quantization: servers.enter_context(serve(quantization, Path(scratch), adapters))
            for quantization in FORMATS
        }
        requests = [
            Request(prompt, tokens_out, name) for prompt, name in zip(prompts, names, strict=True)
        ]

        def side(server: InfuseHttp) -> Side:
            return Side(
                server.name, lambda: server, lambda each: each.run(requests), rows * tokens_out
            )

        turns = take_turns([side(server) for server in running.values()], rounds)
        for quantization, server in running.items():
            ratio = turns.ratio(quantization, "none")
            assert ratio is not None, turns.failed
            typer.echo(
                f"{quantization:5} {median(turns.speeds(quantization)):6.1f} tokens/s, "
                f"{ratio['median']:.2f} of float32's, peak {server.memory()['peak'] / 1e6:.0f} MB"
            )


def serve(quantization: Quantization, scratch: Path, adapters: Path) -> InfuseHttp:
    return InfuseHttp(
        quantization,
        scratch / f"{quantization}.log",
        *("--quantization", quantization, "--max-model-len", 1024, "--kv-cache-tokens", 16_384),
        *("--adapters-dir", scratch / quantization, "--preload-adapters", adapters),
        *PLAIN,
    )


if __name__ == "__main__":
    typer.run(main)
