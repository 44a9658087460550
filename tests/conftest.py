"""For all tests: no deadlines (the machines are shared), and GPU tests only where there is one."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("infuse", deadline=None, derandomize=True)
hypothesis.settings.load_profile("infuse")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        on_gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]
