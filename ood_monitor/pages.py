"""Templates of the pages that are written: what they put in is text, whatever it is called."""

import importlib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ood_monitor.escaping import html

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["template_of"]


def template_of(package: str, name: str) -> "Template":
    """A template of this library, in which every value is escaped.

    Args:
        package: The package whose file it is.
        name: The file.

    Raises:
        ImportError: jinja2, which is imported here alone, is missing.
    """
    try:
        jinja2, markup = importlib.import_module("jinja2"), importlib.import_module("markupsafe")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Expected jinja2 for a page: pip install 'ood-monitor[plots]' ({error})."
        ) from error

    def escaped(value: object) -> Any:
        """As text, but for what the template has put together itself."""
        return value if isinstance(value, markup.Markup) else markup.Markup(html(str(value)))

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=escaped
    )
    found: Template = environment.from_string((files(package) / name).read_text(encoding="utf-8"))
    return found
