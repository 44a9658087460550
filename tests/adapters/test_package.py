"""What `infuse.adapters` gives a notebook, and what it costs."""

import subprocess
import sys

import pytest

from infuse import adapters


@pytest.mark.parametrize("name", adapters.__all__)
def test_each_public_name_is_what_it_says(name: str) -> None:
    assert getattr(adapters, name).__name__ == name


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"'infuse\.adapters' has no attribute 'IA3Modle'"):
        adapters.IA3Modle  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import infuse.adapters; print({'torch', 'transformers'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
