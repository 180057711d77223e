"""What all commands share: results on stdout; notes, progress and one-line errors on stderr."""

import functools
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ParamSpec

import typer

from ood_monitor.escaping import terminal

try:
    from typer.exceptions import TyperException
except ImportError:  # before typer 0.28, which took in what it needs of click
    from click import ClickException as TyperException  # type: ignore[assignment]

__all__ = ["AsJson", "Debug", "Progress", "checked", "print_facts", "say", "wants_progress"]

_P = ParamSpec("_P")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Progress = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="A bar on stderr; by default on a terminal."),
]


def say(text: str) -> None:
    """One line for people, on stderr, whatever names and errors of others are in it."""
    typer.echo(f"ood-monitor: {terminal(' '.join(text.split()))}", err=True)


def wants_progress(asked: bool | None) -> bool:
    """Whether a bar is shown."""
    return sys.stderr.isatty() if asked is None else asked


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Results by name, in a column or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2, allow_nan=False))
        return
    for name, value in facts.items():
        typer.echo(terminal(f"{name:24}{value}"))


def checked(command: Callable[_P, None]) -> Callable[_P, None]:
    """A command whose errors are one line and exit code 1; with its ``--debug``, a traceback."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        with warnings.catch_warnings():
            _show_warnings_plainly()
            try:
                command(*args, **kwargs)
            except (typer.Exit, typer.Abort, TyperException):
                raise
            except Exception as error:  # whatever a user's model or file raises
                if kwargs.get("debug"):
                    raise
                say(_told(error))
                raise typer.Exit(1) from error

    return run


def _told(error: Exception) -> str:
    """What the error says, with its type unless it is one that is written for people."""
    text = str(error)
    known = text.startswith("Expected") or (
        isinstance(error, ValueError | OSError | ImportError) and text
    )
    return text if known else f"{type(error).__name__}: {text}"


def _show_warnings_plainly() -> None:
    """What is meant for users, as one line each; the rest is for developers."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", UserWarning)
    warnings.simplefilter("default", RuntimeWarning)

    def show(message: Warning | str, *_: Any) -> None:
        say(f"warning: {message}")

    warnings.showwarning = show  # type: ignore[assignment]
