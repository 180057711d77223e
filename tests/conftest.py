"""Every test starts offline, from seed 0 and on one thread, and leaves no random state behind."""

import os

os.environ |= {
    "DISABLE_TELEMETRY": "YES",
    "DO_NOT_TRACK": "true",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",  # of NumPy's and of each process that a test starts
    "PYTHONDONTWRITEBYTECODE": "",  # such processes are many: what they import is compiled once
    "TRANSFORMERS_OFFLINE": "1",
}

# What reads these variables on import must come after them.
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import floor

from ood_monitor.detector import plan

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", help="The method of every detector that is given none.")
    parser.addoption("--floor", action="store_true", help="The oldest releases are installed.")


def pytest_configure(config: pytest.Config) -> None:
    method = config.getoption("--method")
    if method is not None:
        plan.DEFAULTS.update(dict.fromkeys(plan.DEFAULTS, method))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--floor"):
        floor.leave_out(items)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
