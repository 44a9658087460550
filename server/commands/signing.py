"""`infuse adapters sign` and `infuse adapters verify`, which need no server."""

from pathlib import Path
from typing import Annotated

import typer

from infuse.adapters.checkpoint.adapter_files import folder_with_adapter
from infuse.adapters.errors import AdapterError
from infuse.server.commands.output import AsJson, ended_by, print_done
from infuse.server.signers import signatures

Folder = Annotated[Path, typer.Argument(help="The folder that PEFT's save_pretrained wrote.")]


def sign(
    folder: Folder,
    key: Annotated[Path, typer.Option(help="The private key: ECDSA, in PEM.")],
    certificate: Annotated[
        list[Path] | None,
        typer.Option(help="The key's certificate; again for those between it and a trusted one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign an adapter: write model.sig beside its files.

    Example: infuse adapters sign ./out/support-de --key release.key
    """
    with ended_by("adapters sign", AdapterError, OSError):
        signature = signatures().sign(folder_with_adapter(folder), key, certificate or ())
    print_done({"signature": str(signature)}, as_json, f"{signature} signs the adapter")


def verify(
    folder: Folder,
    trusted_signers: Annotated[
        Path,
        typer.Option(
            envvar="INFUSE_TRUSTED_SIGNERS",
            help="A PEM file, or a folder of them: public keys, or certificates of authorities.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Say who has signed an adapter, as a server with the same trusted signers would.

    Example: infuse adapters verify ./out/support-de --trusted-signers release.pub
    """
    with ended_by("adapters verify", AdapterError, OSError):
        signer = signatures().Signers(trusted_signers).verify(folder_with_adapter(folder))
    print_done({"signer": signer}, as_json, f"{folder} is signed by {signer}")
