"""Pages that are written from the code: `warnings.md` and `api.md`. Never edit those by hand.

python docs/written.py
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ood_monitor.codes import AREAS, CODES

HERE = Path(__file__).parent

#: What opens every page, for whoever wants to edit it.
_NOTE = "<!-- Written by docs/written.py: edit the code instead. -->\n"

#: By module: whether its names are stable, and the page of the reference that has them in full.
MODULES: dict[str, tuple[bool, str]] = {
    "ood_monitor": (True, ""),
    "ood_monitor.adapters.observations": (True, "adapters"),
    "ood_monitor_integrations.lightning": (True, "integrations"),
    "ood_monitor_integrations.transformers": (True, "integrations"),
    "ood_monitor_integrations.accelerate": (True, "integrations"),
    "ood_monitor_integrations.diffusers": (True, "integrations"),
    "ood_monitor_integrations.mlflow": (True, "integrations"),
    "ood_monitor_integrations.mlflow.flavour": (True, "integrations"),
    "ood_monitor_integrations.prometheus": (True, "integrations"),
    "ood_monitor.alerts": (True, "alerts"),
    "ood_monitor.testing": (True, "adapters"),
    "ood_monitor.report": (False, "alerts"),
    "ood_monitor.models": (False, "adapters"),
    "ood_monitor.gradients": (False, "gradients"),
    "ood_monitor.statistics": (False, "gradients"),
    "ood_monitor.densities": (False, "densities"),
    "ood_monitor.densities.baselines": (False, "densities"),
    "ood_monitor.calibration": (False, "detector"),
    "ood_monitor.drift": (False, "monitor"),
    "ood_monitor.drift.mix": (False, "monitor"),
    "ood_monitor.drift.correlation": (False, "monitor"),
    "ood_monitor.saving": (False, "detector"),
    "ood_monitor.codes": (False, "alerts"),
    "ood_monitor_integrations.mlflow.evaluator": (False, "integrations"),
    "ood_monitor_integrations.mlflow.pipelines": (False, "integrations"),
    "ood_monitor_integrations.mlflow.traces": (False, "integrations"),
    "ood_monitor_integrations.autoload": (False, "integrations"),
}

#: Names of stable modules that may still change.
PROVISIONAL = {
    *("ood_monitor.Discoveries", "ood_monitor.TermsAndNorms", "ood_monitor.TrainingStream"),
    *("ood_monitor.models", "ood_monitor_integrations.diffusers.OODBlock"),
    *("ood_monitor_integrations.diffusers.ReplayedBound",),
    *("ood_monitor_integrations.diffusers.replayed_bound",),
    *("ood_monitor_integrations.diffusers.plan_costs",),
    *("ood_monitor_integrations.diffusers.PlanCost",),
    *("ood_monitor_integrations.diffusers.WatchingPlan",),
}


def warnings_page() -> str:
    """Every code, by area, with cause and remedy."""
    parts = [
        f"{_NOTE}\n# Warnings\n",
        "A warning, or a line of the log, ends with a code such as `[OOD101]`. Find it here, or\n"
        "print it by `ood-monitor guide OOD101`. To silence one code, name it in a filter, of\n"
        "warnings or of the handler that writes your log:\n\n"
        '    warnings.filterwarnings("ignore", r"(?s).*\\[OOD101\\]")\n'
        '    handler.addFilter(lambda record: "[OOD106]" not in record.getMessage())\n\n'
        "Alerts are something else: a monitor sends them, and [each kind has its\n"
        "section](alerts.md#what-to-do-now).\n\n"
        "| code | what it says |\n|---|---|",
        *(f"| [{code}](#{code.lower()}) | {each.title} |" for code, each in CODES.items()),
    ]
    for digit, area in AREAS.items():
        parts.append(f"\n## {area}")
        for code, each in CODES.items():
            if code[3] == digit:
                parts.append(
                    f"\n### {code}\n\n**{each.title}.** {each.cause}\n\n*What to do.* {each.do}"
                )
    return "\n".join(parts) + "\n"


def api_page() -> str:
    """Every public name, where it is to be imported from, and whether it is stable."""
    parts = [
        f"{_NOTE}\n# Public names\n",
        "Every name that you may import, one line each. A name that is not here is private, and\n"
        "may change without notice. A name stands where it is to be imported from. The\n"
        "[deprecation policy](deprecation.md) says what *stable* and *provisional* promise.\n",
    ]
    seen = list[Any]()
    for module, (is_stable, page) in MODULES.items():
        found = importlib.import_module(module)
        more = f" ([in full](api/{page}.rst))" if page else ""
        parts += [f"## {module}\n", f"{first_sentence(found.__doc__)}{more}\n"]
        parts += ["| name | what it is | |", "|---|---|---|"]
        for name in found.__all__:
            value = getattr(found, name)
            if any(value is other for other in seen):
                continue
            seen.append(value)
            stable = is_stable and f"{module}.{name}" not in PROVISIONAL
            told = "stable" if stable else "provisional"
            parts.append(f"| `{name}` | {told_of(found, name)} | {told} |")
        parts.append("")
    return "\n".join(parts)


def told_of(module: ModuleType, name: str) -> str:
    """What a name is: its first sentence, or of a constant the comment above it."""
    value: Any = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        return first_sentence(inspect.getdoc(value))
    return first_sentence(next(_comments(module, name)))


def _comments(module: ModuleType, name: str) -> Iterator[str]:
    """The comments `#:` above a constant, in the module or the package that offers it."""
    file = Path(str(module.__file__))
    files = [file, *sorted(file.parent.glob("*.py"))]
    for each in files:
        match = re.search(rf"((?:^#: .*\n)+){name}\b", each.read_text(), re.MULTILINE)
        if match:
            yield match[1].replace("#: ", "").replace("\n", " ")
    raise LookupError(f"Expected a comment '#: ' above {name} in {module.__name__}.")


def first_sentence(text: str | None) -> str:
    """Of a docstring, as Markdown in one line: roles and double backticks become code."""
    first = inspect.cleandoc(text or "").partition("\n\n")[0].replace("\n", " ").strip()
    first = re.split(r"(?<=\.) (?=[A-Z])", first)[0]
    first = re.sub(r":\w+:`(?:~?[\w.]*\.)?(\w+)`", r"`\1`", first)
    first = re.sub(r":\w+:`([^`<]+?)(?: <[^`>]*>)?`", r"`\1`", first)
    return re.sub(r"(?<!\\)\|", r"\|", re.sub(r"``([^`]+)``", r"`\1`", first))


#: By name: what writes each page.
PAGES = {"warnings.md": warnings_page, "api.md": api_page}


def main() -> None:
    """Write all of them."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page())


if __name__ == "__main__":
    main()
