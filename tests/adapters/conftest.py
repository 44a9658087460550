from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.adapters.kinds import Known

# The machine that runs the tests is shared: what is slow there is not wrong.
settings.register_profile("adapters", deadline=None)
settings.load_profile("adapters")


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known.saved_in(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models of hidden 32 are slower on several threads, most of all on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
