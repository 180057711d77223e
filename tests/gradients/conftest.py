"""What tests of rules and of owners need."""

import pytest

from ood_monitor.gradients import ways


@pytest.fixture(autouse=True)
def not_by_vmap_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules and owners are what is tested, where `vmap` would take small models wholly."""
    if "test_vmap_alone" not in request.module.__name__:
        monkeypatch.setattr(ways, "is_quick_alone", lambda *_: False)
