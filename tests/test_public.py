"""The public names, and what importing them does and does not bring along."""

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


def imported(statement: str) -> set[str]:
    """The frameworks that a fresh interpreter has imported after the statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split()) & {*FRAMEWORKS, "torch._dynamo"}


@pytest.mark.parametrize("module", ["ood_monitor", "ood_monitor.cli"])
def test_importing_the_package_or_its_command_line_imports_no_framework(module: str) -> None:
    assert imported(f"import {module}") == set()


FITTING = """
import torch, ood_monitor as om
flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
held_out = torch.rand(40, 1, 4, 4)
detector = om.Detector(om.LogLikelihood(flow, bins=256), method="both")
detector.fit([held_out], progress=False)
detector.score(held_out[:2])
"""


def test_a_detector_loads_no_compiler() -> None:
    """PyTorch's takes seconds, which a service would pay in its first request."""
    assert imported(FITTING) == set()
    assert imported("import torch._dynamo") == {"torch._dynamo"}


@pytest.mark.parametrize("module", ["matplotlib", "ood_monitor_integrations"])
def test_importing_a_framework_would_be_noticed(module: str) -> None:
    assert imported(f"import {module}") == {module}


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
