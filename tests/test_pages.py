"""Templates of pages: what they put in is text, and what is missing is told of."""

import importlib
from types import ModuleType

import pytest
from jinja2 import UndefinedError
from support.hostile_names import NAMES

from ood_monitor.escaping import html
from ood_monitor.pages import template_of


def title_of(title: str) -> str:
    page = template_of("ood_monitor.alerts", "page.html").render(
        title=title, overall="OK", streams=[], now="now", refresh=30
    )
    return page.partition("<h1>")[2].partition("</h1>")[0]


@pytest.mark.parametrize("name", ["<b>&'\"", *NAMES[::60]])
def test_a_value_is_text(name: str) -> None:
    assert title_of(name) == f"{html(name)}: OK"


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        template_of("ood_monitor.alerts", "page.html").render()


def test_without_jinja2_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'ood-monitor\[plots\]'"):
        template_of("ood_monitor.alerts", "page.html")
