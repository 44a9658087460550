"""The version of Infuse."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    try:
        return version("infuse-server")
    except PackageNotFoundError:
        # It runs from a folder that is not installed.
        return "unknown"
