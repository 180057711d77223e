"""`ood-monitor show`, `ood-monitor guide` and `ood-monitor version`."""

from dataclasses import asdict
from typing import Annotated

import typer

from ood_monitor import __version__
from ood_monitor.alerts.guidance import guidance_of
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

__all__ = ["facts_of", "guide", "show", "version"]


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


@checked
def guide(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="The alert's kind, such as drift.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Print what a kind of alert means, what it does not mean, its causes, and what to do now.

    \b
    Example:
        ood-monitor guide drift
    """
    guidance = guidance_of(kind)  # type: ignore[arg-type]  # of any text, it refuses others
    if as_json:
        print_facts({"kind": kind} | asdict(guidance), as_json=True)
        return
    causes = "\n".join(f"  {i}. {cause}" for i, cause in enumerate(guidance.causes, 1))
    typer.echo(
        f"{kind}: {guidance.means}\n\nWhat it does not mean: {guidance.means_not}\n\n"
        f"Usual causes:\n{causes}\n\nDo now: {guidance.do}\n\n  {guidance.command}"
    )


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
