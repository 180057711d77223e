"""`ood-monitor show` and `ood-monitor version`."""

import typer

from ood_monitor import __version__
from ood_monitor.cli.console import AsJson, Debug, checked, print_facts
from ood_monitor.cli.options import Directory
from ood_monitor.saving.card import (
    told_conditions,
    told_explanation,
    told_groups,
    told_method,
    told_parts,
)
from ood_monitor.saving.fitted import Fitted

__all__ = ["facts_of", "show", "version"]


@checked
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@checked
def show(directory: Directory, as_json: AsJson = False, debug: Debug = False) -> None:
    r"""Print what a saved detector was fitted on, and with how much data.

    \b
    Example:
        ood-monitor show runs/detector
    """
    print_facts(facts_of(Fitted.load(directory)[0]), as_json=as_json)


def facts_of(fitted: Fitted) -> dict[str, str | int | float]:
    """What a detector is, by name."""
    return {
        "fingerprint": fitted.fingerprint,
        "model weights": fitted.model,
        "dtype": fitted.dtype,
        "method": told_method(fitted),
        "parts": told_parts(fitted),
        "explains": told_explanation(fitted),
        "samples": ", ".join(fitted.samples) or "of several shapes",
        **({"conditions": conditions} if (conditions := told_conditions(fitted)) else {}),
        **({"groups of their own": groups} if (groups := told_groups(fitted)) else {}),
        "layers": len(fitted.layers),
        "features": len(fitted.joined.names),
        "dropped features": len(fitted.joined.dropped),
        "fit samples": fitted.fit_count,
        "calibration samples": len(fitted.calibration.scores),
        "smallest p-value": fitted.calibration.smallest,
    }
