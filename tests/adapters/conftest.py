import pytest
from hypothesis import settings

from tests.adapters.kinds import Known

# The machine that runs the tests is shared: what is slow there is not wrong.
settings.register_profile("adapters", deadline=None)
settings.load_profile("adapters")


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known.saved_in(tmp_path_factory.mktemp("kinds"))
