"""The public names, and what importing them does and does not bring along."""

import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ood_monitor

FRAMEWORKS = [
    "diffusers",
    "lightning",
    "matplotlib",
    "mlflow",
    "ood_monitor_integrations",
    "prometheus_client",
    "pytorch_lightning",
    "transformers",
]
CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"
NEEDS_AN_EXTRA = {"ood_monitor.plots": "matplotlib"}


#: What takes longer to import than PyTorch, and what fits or diagnoses needs alone.
FITTERS = ["scipy.stats", "sklearn"]


@functools.cache
def imported() -> list[set[str]]:
    """Which of these a fresh interpreter has imported after each statement."""
    program = "import sys\n" + "".join(f"{s}\nprint(*sys.modules)\n" for s in STATEMENTS)
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    looked_for = {*FRAMEWORKS, *FITTERS, "torch._dynamo"}
    return [set(line.split()) & looked_for for line in done.stdout.splitlines()]


#: What would be noticed: one that is no package's, one that is a module, and one that PyTorch has.
GIVEN = ["matplotlib", "ood_monitor_integrations", "torch._dynamo"]

FITTING = """
import torch, ood_monitor as om
flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
held_out = torch.rand(40, 1, 4, 4)
detector = om.Detector(om.LogLikelihood(flow, bins=256), method="both")
detector.fit([held_out], progress=False)
detector.score(held_out[:2])
"""
STATEMENTS = [
    *("import ood_monitor", "import ood_monitor.cli", FITTING),
    *(f"import {module}" for module in GIVEN),
]


@pytest.mark.slow
def test_neither_package_nor_command_line_nor_a_fit_loads_what_it_does_not_need() -> None:
    """A framework that is not there, or seconds that a service would pay in its first request."""
    package, command_line, fit, *_ = imported()
    assert package == command_line == set()
    assert fit == {*FITTERS}


def test_what_is_loaded_would_be_noticed() -> None:
    found = imported()[-len(GIVEN) :]
    assert all(module in now for module, now in zip(GIVEN, found, strict=True))


def test_public_names_are_sorted_and_all() -> None:
    names = ood_monitor.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), name))
    submodules = {module.name for module in pkgutil.iter_modules(ood_monitor.__path__)}
    found = {
        name
        for name, value in vars(ood_monitor).items()
        if not name.startswith("_") and (name not in submodules or name in names)
    }
    assert found == set(names)


@pytest.mark.parametrize("name", ood_monitor.__all__)
def test_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(ood_monitor, name))


MODULES = [m.name for m in pkgutil.walk_packages(ood_monitor.__path__, "ood_monitor.")]


@pytest.mark.parametrize("name", MODULES)
def test_module_is_importable_and_names_what_it_offers(name: str) -> None:
    if name in NEEDS_AN_EXTRA:
        pytest.importorskip(NEEDS_AN_EXTRA[name])
    module = importlib.import_module(name)
    assert module.__doc__
    assert all(hasattr(module, public) for public in getattr(module, "__all__", ()))


def test_package_is_typed() -> None:
    assert (Path(ood_monitor.__path__[0]) / "py.typed").is_file()


@pytest.mark.skipif(not CHANGELOG.exists(), reason="an installed package has no changelog")
def test_version_is_the_newest_in_the_changelog() -> None:
    headings = re.findall(r"^## \[?(\d+\.\d+\.\d+)", CHANGELOG.read_text(), re.MULTILINE)
    assert headings[0] == ood_monitor.__version__


@pytest.mark.skipif(not CHANGELOG.exists(), reason="an installed package has no reference")
def test_public_names_have_a_place_in_the_reference() -> None:
    pages = [page.read_text() for page in (CHANGELOG.parent / "docs" / "api").glob("*.rst")]
    described = re.findall(r"^\.\. auto\w+:: ood_monitor\.(\w+)", "\n".join(pages), re.MULTILINE)
    modules = {"models", "observations"}  # described by what is in them
    assert set(ood_monitor.__all__) - modules <= set(described)
