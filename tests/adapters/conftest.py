from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import OpenStore, open_bucket
from tests.adapters.house import House
from tests.adapters.kinds import Known


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known.saved_in(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: models of hidden 32 are slower on several, above all on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(params=["on disk", "in a bucket"])
def open_store(request: pytest.FixtureRequest, folder: Path) -> OpenStore:
    """Opens the store of a test, as often as it is called."""
    return partial(AdapterStore if request.param == "on disk" else open_bucket, folder)


@pytest.fixture
def store(open_store: OpenStore) -> Iterator[AdapterStore]:
    store = open_store()
    yield store
    store.close()


@pytest.fixture
def house(tmp_path: Path, known: Known) -> Iterator[House]:
    house = House(tmp_path, known)
    yield house
    house.store.close()
