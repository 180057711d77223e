"""Pages that are written from the code are current."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def written() -> ModuleType:
    spec = importlib.util.spec_from_file_location("written", ROOT / "docs" / "written.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["warnings.md", "api.md"])
def test_a_written_page_is_current(name: str) -> None:
    page = (ROOT / "docs" / name).read_text()
    assert page == written().PAGES[name](), "run `python docs/written.py`"


def test_every_module_whose_names_are_explained_is_on_the_page_of_public_names() -> None:
    names = set(re.findall(r"^## (\S+)$", written().api_page(), re.MULTILINE))
    frameworks = {
        file.parent.name if file.name == "__init__.py" else file.stem
        for pattern in ("*/__init__.py", "prometheus.py", "autoload.py")
        for file in (ROOT / "integrations" / "ood_monitor_integrations").glob(pattern)
    } - {"training"}
    assert {f"ood_monitor_integrations.{name}" for name in frameworks} <= names
    assert "ood_monitor" in names


def test_pictures_of_the_gallery_are_shown_and_small() -> None:
    pictures = sorted((ROOT / "docs").glob("gallery-*.png"))
    shown = re.findall(r"\]\((gallery-[\w-]+\.png)\)", (ROOT / "docs" / "gallery.md").read_text())
    assert [picture.name for picture in pictures] == sorted(shown)
    assert all(picture.stat().st_size <= 150_000 for picture in pictures)
