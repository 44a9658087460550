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

from benchmarks.infuse import InfuseServer
from benchmarks.workload import make_workload
from server.engine.loading import default_model_folder, load_model
from server.engine.quantization import Quantization, weights_bytes

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
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        workload = make_workload(model, Path(scratch) / "adapters", rows, tokens_in, tokens_out)
        running = {}
        for quantization in FORMATS:
            folder = Path(scratch) / quantization
            folder.mkdir()
            server = InfuseServer(workload, model, folder, "--quantization", quantization)
            running[quantization] = servers.enter_context(server)
        seconds: dict[str, list[float]] = {quantization: [] for quantization in FORMATS}
        for number in range(rounds + 1):
            for quantization, server in running.items():
                took = server.run(workload.adapters).seconds
                if number > 0:  # The first round warms up.
                    seconds[quantization].append(took)
        for quantization, server in running.items():
            pairs = zip(seconds["none"], seconds[quantization], strict=True)
            tokens_per_second = rows * tokens_out / median(seconds[quantization])
            typer.echo(
                f"{quantization:5} {tokens_per_second:6.1f} tokens/s, "
                f"{median(none / mine for none, mine in pairs):.2f} of float32's, "
                f"peak {server.memory()['peak'] / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    typer.run(main)
