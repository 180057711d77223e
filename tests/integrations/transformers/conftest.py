"""What foreign packages warn of in these tests, and nothing else."""

import pytest

#: PEFT asks transformers by a name that is about to go.
_IGNORED = ["ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/integrations/transformers" in str(item.path):
            for told in _IGNORED:
                item.add_marker(pytest.mark.filterwarnings(told))
