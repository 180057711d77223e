"""The command line: `ood-monitor show DIRECTORY` says what a saved detector is."""

import json
from pathlib import Path
from typing import Annotated

import typer

import ood_monitor
from ood_monitor.fitted import Fitted

__all__ = ["app"]

app = typer.Typer(help="Tells what a generative model never learned.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Tells when a generative model is fed, or produces, something it never learned."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(ood_monitor.__version__)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="What `Detector.save_pretrained` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a saved detector was fitted on, and with how much data."""
    try:
        facts = _facts(Fitted.load(directory)[0])
    except (OSError, ValueError) as error:
        typer.echo(f"ood-monitor: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        typer.echo(f"{name:24}{value}")


def _facts(fitted: Fitted) -> dict[str, str | int | float]:
    return {
        "fingerprint": fitted.fingerprint,
        "model weights": fitted.model,
        "dtype": fitted.dtype,
        "density": type(fitted.density).__name__,
        "samples": ", ".join(fitted.samples) or "of several shapes",
        "layers": len(fitted.layers),
        "features": len(fitted.features.names),
        "dropped features": len(fitted.features.log_norms.dropped),
        "fit samples": fitted.fit_count,
        "calibration samples": len(fitted.calibration.scores),
        "smallest p-value": fitted.calibration.smallest,
    }
