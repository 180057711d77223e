"""The documentation: `make docs` builds it into build/docs, and fails on a warning.

Nothing is fetched, neither for the build nor by the pages: formulas are MathML, fonts the reader's.
"""

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation
from sphinx.writers.html5 import HTML5Translator

from ood_monitor import __version__

project = "ood-monitor"
author = "The ood-monitor authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

default_role = "code"
nitpicky = True
# Other projects' names: their pages are not at hand.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(collections|concurrent|datetime|diffusers|huggingface_hub|jinja2|logging|matplotlib|mlflow|nn"
        r"|accelerate|np|numpy|os|pathlib|prometheus_client|pytorch_lightning|torch|typing)\..*",
    ),
]
# Names that a public signature shows and no page explains.
nitpick_ignore = [
    ("py:class", "LightningModule"),
    ("py:class", "Trainer"),
    ("py:class", "ood_monitor.densities.features.Features"),
    ("py:class", "ood_monitor.saving.provenance.Provenance"),
    ("py:class", "ood_monitor_integrations.diffusers.reading.Reading"),
    ("py:class", "ood_monitor_integrations.mlflow.clients.Logger"),
    ("py:class", "ood_monitor_integrations.training.collectives.World"),
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ood-monitor {release}"
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"


def inline_formula(translator: HTML5Translator, node: nodes.math) -> None:
    """Writes an inline formula as MathML."""
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def displayed_formula(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a displayed formula as MathML."""
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def short_signature(app: Sphinx, *described: Any) -> tuple[str | None, str | None]:
    """Writes ArrayLike by its name; an alias is shown as what it stands for, in five lines."""
    *_, signature, returns = described
    whole = stringify_annotation(ArrayLike, "smart")
    return signature and signature.replace(whole, "~numpy.typing.ArrayLike"), returns


def setup(app: Sphinx) -> None:
    """Tells Sphinx of what is above."""
    app.connect("autodoc-process-signature", short_signature)
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
