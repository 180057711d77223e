"""`ood-monitor show`, `ood-monitor guide` and `ood-monitor version`."""

from dataclasses import asdict
from typing import Annotated

import typer

from ood_monitor import __version__
from ood_monitor.alerts.guidance import guidance_of
from ood_monitor.cli.console import AsJson, Debug, checked, print_facts
from ood_monitor.cli.options import Directory
from ood_monitor.codes import meaning_of
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
    topic: Annotated[
        str,
        typer.Argument(
            metavar="TOPIC", help="A kind of alert, such as drift, or a code, such as OOD101."
        ),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Print what a kind of alert, or the code of a warning, means and what to do now.

    \b
    Example:
        ood-monitor guide drift
        ood-monitor guide OOD101
    """
    if topic.upper().startswith("OOD"):
        _print_meaning(topic.upper(), as_json=as_json)
        return
    guidance = guidance_of(topic)  # type: ignore[arg-type]  # of any text, it refuses others
    if as_json:
        print_facts({"kind": topic} | asdict(guidance), as_json=True)
        return
    causes = "\n".join(f"  {i}. {cause}" for i, cause in enumerate(guidance.causes, 1))
    typer.echo(
        f"{topic}: {guidance.means}\n\nWhat it does not mean: {guidance.means_not}\n\n"
        f"Usual causes:\n{causes}\n\nDo now: {guidance.do}\n\n  {guidance.command}"
    )


def _print_meaning(code: str, *, as_json: bool) -> None:
    meaning = meaning_of(code)
    if as_json:
        print_facts({"code": code} | asdict(meaning), as_json=True)
        return
    typer.echo(f"{code}: {meaning.title}.\n\n{meaning.cause}\n\nDo now: {meaning.do}")


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
