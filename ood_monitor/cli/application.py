"""The application that the commands are registered with."""

import inspect
from collections.abc import Callable

import typer

__all__ = ["app", "help_of"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # help that is read in any terminal, and by any screen reader
    pretty_exceptions_enable=False,  # which would print the values of variables
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def help_of(command: Callable[..., None]) -> str:
    r"""A command's docstring; after a line with \b, lines stay as they are."""
    return inspect.cleandoc(command.__doc__ or "").replace("\\b", "\b")


def main() -> None:
    r"""Tells when a generative model is fed, or produces, something it never learned.

    A detector is fitted once, on data that the model was not trained on. It then scores new data,
    watches a stream, and is explained by a report:

    \b
        ood-monitor fit runs/pipeline data/held_out runs/detector
        ood-monitor score runs/detector data/new --output scores.csv
        ood-monitor watch runs/detector inbox --state watch.json
        ood-monitor report runs/detector report.html --held-out data/held_out

    Each command has an example of its own: `ood-monitor fit --help`.
    """


app.callback(help=help_of(main))(main)
