"""`infuse merge`: folds adapters into a copy of a base model, without a server."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from infuse.adapters.errors import AdapterError
from infuse.server.commands.options import weighted
from infuse.server.commands.output import AsJson, ended_by, print_done
from infuse.server.commands.progress import progress_bar


def merge(
    output: Annotated[Path, typer.Argument(help="The folder to create.")],
    adapters: Annotated[list[str], typer.Argument(help="One or several FOLDER or FOLDER=WEIGHT.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or cached hub id of the base model. Default: the default model."),
    ] = None,
    composition: Annotated[
        Literal["product", "linear"], typer.Option(help="How several adapters are mixed.")
    ] = "product",
    as_json: AsJson = False,
) -> None:
    """Fold adapters into a copy of the base model, which plain transformers loads.

    `product` mixes as several active adapters do in PEFT, `linear` as its `add_weighted_adapter`.

    Example: infuse merge ./merged ./out/support-de --model ./my-base-model
    """
    # These import torch and transformers: seconds that nothing else here need wait for.
    from infuse.adapters.checkpoint.checkpoint import effective_vectors, read_checkpoint
    from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
    from infuse.adapters.derive.combine import Recipe, mix
    from infuse.adapters.derive.merge import merge as merge_into
    from infuse.server.engine import EngineError
    from infuse.server.engine.model_files import model_folder

    folders, weights = zip(*map(weighted, adapters), strict=True)
    name = None if model is None or Path(model).is_dir() else model
    with ended_by("merge", AdapterError, EngineError, OSError):
        base = BaseCheckpoint(model_folder(model), name)
        vectors = [effective_vectors(read_checkpoint(Path(each)), base.modules) for each in folders]
        merged = mix(vectors, Recipe(method=composition, weights=weights))
        output.parent.mkdir(parents=True, exist_ok=True)
        with progress_bar("Merging") as progress:
            recipe = f"{composition} of {', '.join(adapters)}"
            merge_into(base, merged, output, recipe, progress)
    done = {"folder": str(output), "adapters": adapters, "composition": composition}
    print_done(done, as_json, f"{output} holds the merged model")
