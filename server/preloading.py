"""Adds the adapters of `--preload-adapters` at the start."""

import logging
import shutil
from pathlib import Path

from infuse.adapters.checkpoint.config import CONFIG_FILE, FILES
from infuse.adapters.errors import AdapterError, BaseNameTaken, UnknownAdapter
from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.storage.revision import Origin
from infuse.adapters.storage.store import AdapterStore

log = logging.getLogger(__name__)

_PRELOADED = Origin(source="preload")


def refuse_taken(base: str, store: AdapterStore, preloaded: Path | None) -> None:
    """Raises BaseNameTaken where one name would be the base model's and an adapter's, also with a
    revision: a base called `a@1` hides the first revision of `a`."""
    mend = "serve the base under another name (--served-model-name)"
    for name in (base, base.partition("@")[0]):
        if name in store:
            raise BaseNameTaken(
                f"the base model is to be served as '{base}', and there is an adapter '{name}': "
                f"{mend}, or do so once to delete the adapter"
            )
        if preloaded is not None and name in folders_to_preload(preloaded):
            raise BaseNameTaken(
                f"the base model is to be served as '{base}', and {preloaded} holds an adapter "
                f"'{name}': {mend}, or rename that folder"
            )


def folders_to_preload(folder: Path) -> dict[str, Path]:
    """Name -> folder, in order of names: each sub-folder, and `owner/name` for what lies in a
    sub-folder that is no adapter itself."""
    found = {}
    for source in (path for path in folder.iterdir() if path.is_dir()):
        inner = [path for path in source.iterdir() if (path / CONFIG_FILE).is_file()]
        if inner and not (source / CONFIG_FILE).exists():
            found.update({f"{source.name}/{path.name}": path for path in inner})
        else:
            found[source.name] = source
    return dict(sorted(found.items()))


def preload(registry: AdapterRegistry, folder: Path) -> None:
    """Add the adapters in a folder, or replace what an earlier preload added. An adapter that does
    not fit is left out; one that an operator has changed or deleted since stays as it is."""
    stored = registry.stored
    for name, source in folders_to_preload(folder).items():
        if name in stored and stored.current(name).origin.source != _PRELOADED.source:
            continue
        if stored.was_deleted(name):
            log.info("The adapter %s in %s was deleted, and stays so.", name, source)
            continue
        with registry.staging() as staged:
            for file in FILES:
                if (source / file).is_file():
                    shutil.copyfile(source / file, staged / file)
            try:
                try:
                    registry.replace(name, staged, origin=_PRELOADED)
                except UnknownAdapter:
                    registry.add(name, staged, _PRELOADED)
            except AdapterError as error:
                log.warning("The adapter in %s is not offered: %s", source, error)
