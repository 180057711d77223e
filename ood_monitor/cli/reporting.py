"""`ood-monitor report`: one HTML file."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.alerts.alert import Alert
from ood_monitor.calibration.diagnostics import Diagnosis, diagnose
from ood_monitor.calibration.scores import Scores
from ood_monitor.cli.console import AsJson, Debug, checked, print_facts, say
from ood_monitor.cli.data import Samples, batches
from ood_monitor.cli.files import open_regular
from ood_monitor.cli.models import Model
from ood_monitor.cli.options import Directory, Ert, Scoring, asking_for_scoring
from ood_monitor.cli.recipe import RECIPE, Recipe
from ood_monitor.cli.scoring import scored
from ood_monitor.cli.showing import facts_of
from ood_monitor.cli.tables import Row, read_rows, rows_of
from ood_monitor.cli.vocabulary import Vocabulary
from ood_monitor.detector.detector import Detector
from ood_monitor.saving.fitted import Fitted

__all__ = ["report"]

#: Samples that a diagnosis looks at, at least and at most: it makes several passes.
_FEWEST, _DIAGNOSED = 100, 400

#: Of a file of alerts, at most; and what the line begins with that `watch --json` ends with.
_MOST_BYTES, _SUMMARY = 2**28, '{"summary"'

#: Of a report of nothing that was flagged before.
_FPR = 0.01


@checked
@asking_for_scoring
def report(
    directory: Directory,
    output: Annotated[Path, typer.Argument(metavar="HTML", help="The file to write.")],
    held_out: Annotated[
        Path | None,
        typer.Option(help="Data as for `fit`, to see the layers' fit and diagnose the model on."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="What `score` wrote of a stream, in its order.")
    ] = None,
    stream: Annotated[
        Path | None, typer.Option(help="Data to score now, in their order, in place of --scores.")
    ] = None,
    fpr: Annotated[
        float | None,
        typer.Option(
            help="Share of normal samples that may be flagged, between 0 and 1; by default that of "
            "the file of --scores, or 0.01.",
            show_default=False,
        ),
    ] = None,
    ert: Ert = 10_000,
    title: Annotated[str, typer.Option(help="The heading.")] = "Out-of-distribution report",
    images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images",
            help="Show samples of --stream and --held-out: the file then holds data.",
        ),
    ] = False,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="As --images, of sequences, as text: a file of tokens, one a line from number 0 "
            "on, or a tokenizer.json.",
        ),
    ] = None,
    alerts: Annotated[
        Path | None, typer.Option(help="The lines that `watch` printed; the status is then theirs.")
    ] = None,
    *,
    scoring: Scoring,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Write one HTML file that says what a detector is, how well it fits, and what it found.

    It begins with the status, since when, and what to do now. The file needs no network and runs no
    script. Without data it shows the calibration; with --scores (or --stream) the scores, the
    evidence of drift over time and the layers that alerts come from; with --held-out the fit of
    each layer, their correlation and a diagnosis of the model. The model is needed for --held-out
    and --stream alone. With --images, off by default since no alert holds data, it shows the eight
    most anomalous samples of --stream, and typical ones of --held-out beside them, with the places
    that surprise the model. With --texts these are sequences of tokens, as text.

    \b
    Examples:
        ood-monitor report runs/detector report.html --scores scores.csv
        ood-monitor report runs/detector report.html --held-out data/held_out --stream data/new
        ood-monitor report runs/detector report.html --stream data/new --images
        ood-monitor report runs/detector report.html --stream texts.npz --texts tokenizer.json
    """
    _check_given(scores, stream, images=images, texts=texts is not None)
    _check_place(output)
    page, said = _page(), [] if alerts is None else _alerts(alerts)
    fitted, _ = Fitted.load(directory)
    rows: Sequence[Row] | None = None if scores is None else read_rows(scores)
    told = None if rows is None else _fpr_of(rows, scores)
    fpr = fpr if fpr is not None else told or _FPR
    seen = dict[str, Any]()
    if held_out is not None or stream is not None:
        scorer = _Scorer(*scoring.detector(directory), scoring, page, _shown(texts, images=images))
        rows, seen = scorer.seen(stream, held_out, rows, fpr, ert)
    text = page.html_report(
        fitted,
        facts=facts_of(fitted) | _origin(directory),
        stream=None if rows is None else _stream(page, str(scores or stream), rows, told),
        fpr=fpr,
        ert=ert,
        title=title,
        alerts=said,
        **seen,
    )
    output.write_text(text, encoding="utf-8")
    if as_json:
        print_facts({"report": str(output), "bytes": len(text.encode())}, as_json=True)
    else:
        say(f"written to {output}.")


@dataclass(frozen=True)
class _Scorer:
    """A detector with its model, and how data are scored for the page."""

    detector: Detector
    model: Model
    recipe: Recipe
    scoring: Scoring
    page: ModuleType
    shown: "_Shown | None"

    def seen(
        self,
        stream: Path | None,
        held_out: Path | None,
        rows: Sequence[Row] | None,
        fpr: float,
        ert: float,
    ) -> tuple[Sequence[Row] | None, dict[str, Any]]:
        """Rows of a stream, or those that are there, and what else the page shows."""
        found: dict[str, Any] = {"is_stale": self.detector.is_stale}
        shown: dict[str, Any] = {}
        if stream is not None:
            source = self.open(stream)
            ids, scores = self.scores(source)
            rows = rows_of(ids, scores, fpr)
            shown |= self.anomalous(source, scores, rows, fpr, ert) if self.shown else {}
        if held_out is not None:
            source = self.open(held_out)
            _, scores = self.scores(source)
            found["held_out"] = self.page.HeldOut.of(scores, self.diagnosis(source))
            if self.shown:
                order = (scores.p_value - 0.5).abs()
                shown["typical"] = self.exhibits(source, scores, order, scores.valid)
        return rows, found | ({"gallery": self.page.Gallery(**shown)} if self.shown else {})

    def open(self, path: Path) -> Samples:
        return self.scoring.samples(path, self.recipe)

    def scores(self, source: Samples) -> tuple[list[str], Scores]:
        """Names and scores of all samples."""
        size, progress = self.scoring.batch_size, self.scoring.shows_progress
        found = scored(self.detector, self.model, source, size, progress=progress)
        ids, parts = zip(*found, strict=True)
        return [name for names in ids for name in names], Scores.together(parts)

    def anomalous(
        self, source: Samples, scores: Scores, rows: Sequence[Row], fpr: float, ert: float
    ) -> dict[str, Any]:
        """The most anomalous samples; of a stream that has drifted those since it has."""
        stream = _stream(self.page, "stream", rows, None)
        drift = self.page.drift_of(self.detector.fitted, stream, ert=ert, fpr=fpr)
        since = 1 if drift is None else drift.since
        came = scores.valid & (torch.arange(len(scores.valid)) >= since - 1)
        return {"anomalous": self.exhibits(source, scores, -scores.score, came), "since": since}

    def exhibits(self, source: Samples, scores: Scores, order: Tensor, of: Tensor) -> Any:
        """Of some samples, (N,), the first in an order, (N,), as the page shows them."""
        some = of.nonzero().flatten()
        rows = some[order[some].argsort(stable=True)][: self.page.gallery.MOST].tolist()
        if not rows:
            return ()
        samples = torch.stack([source.read(row) for row in rows])
        batch = self.model.batch(samples)
        shown = {} if self.shown is None else self.shown(self.detector.adapter, samples, batch)
        return self.page.Exhibit.each(
            self.detector,
            batch,
            ids=[source.ids[row] for row in rows],
            p_values=scores.p_value[rows].tolist(),
            **shown,
        )

    def diagnosis(self, source: Samples) -> Diagnosis | str:
        """Of some of the samples; why there is none, if there are too few or one is unreadable."""
        try:
            return self._diagnosis(source)
        except ValueError as error:
            say(f"no diagnosis of the model: {error}")
            return f"No diagnosis: {error}"

    def _diagnosis(self, source: Samples) -> Diagnosis:
        if len(source.ids) < _FEWEST:
            raise ValueError(f"expected at least {_FEWEST} samples, got {len(source.ids)}.")
        order = np.random.default_rng(0).permutation(len(source.ids))[:_DIAGNOSED].tolist()
        size = max(1, min(self.scoring.batch_size, len(order) // 4))
        held_out = [self.model.batch(batch) for batch in batches(source, order, size)]
        return diagnose(self.detector.adapter, held_out, layers=self.detector.layers)


#: Of samples (B, ...), and the batch that they are, what a page shows of them.
_Shown = Callable[[Adapter, Tensor, Batch], dict[str, Any]]


def _shown(texts: Path | None, *, images: bool) -> _Shown | None:
    """How samples are shown, if they are."""
    if texts is not None:
        vocabulary = Vocabulary.read(texts)
        return lambda adapter, _, batch: {"tokens": _spelled(adapter, batch, vocabulary)}
    return (lambda adapter, samples, _: {"images": samples}) if images else None


def _spelled(adapter: Adapter, batch: Batch, vocabulary: Vocabulary) -> list[list[str]]:
    """The texts of a batch, token by token.

    Raises:
        ValueError: The model's samples are no texts.
    """
    texts = adapter.texts(batch)
    if texts is None:
        raise ValueError(
            f"Expected sequences of tokens for `--texts`, got samples of a "
            f"{type(adapter).__name__}: leave it out, or show images with `--images`."
        )
    return [vocabulary.spelled(text) for text in texts]


def _alerts(path: Path) -> list[Alert]:
    """What `watch` printed, a line each; its summary is none.

    Raises:
        ValueError: Another file.
    """
    with open_regular(path, _MOST_BYTES) as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [Alert.from_json(line) for line in lines if line and not line.startswith(_SUMMARY)]


def _page() -> ModuleType:
    try:
        return importlib.import_module("ood_monitor.report")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Expected matplotlib and jinja2 for a report: pip install 'ood-monitor[plots]' "
            f"({error})."
        ) from error


def _check_given(scores: Path | None, stream: Path | None, *, images: bool, texts: bool) -> None:
    if scores is not None and stream is not None:
        raise ValueError("Expected one of `--scores` and `--stream`, got both.")
    if images and texts:
        raise ValueError("Expected one of `--images` and `--texts`, got both.")
    if (images or texts) and stream is None:
        option = "--images" if images else "--texts"
        raise ValueError(f"Expected `--stream` beside `{option}`: scores hold no samples.")


def _check_place(output: Path) -> None:
    if output.is_dir() or not output.parent.is_dir():
        raise FileNotFoundError(f"Expected a file in a folder that is there, got {output}.")


def _origin(directory: Path) -> dict[str, str]:
    """How the model is made, as far as the detector's folder says."""
    if not (directory / RECIPE).exists():
        return {}
    recipe = Recipe.load(directory)
    return {
        "model": f"{recipe.kind} {recipe.model or '(not said)'}",
        "noise levels": ", ".join(map(str, recipe.levels or ())) or "the adapter's own",
        "layers chosen": ", ".join(recipe.layers or ()) or "all",
    }


def _fpr_of(rows: Sequence[Row], path: Path | None) -> float | None:
    """By which the rows of a file are flagged, if it says so.

    Raises:
        ValueError: By several: the file is put together of others.
    """
    found = {row.fpr for row in rows if row.fpr is not None}
    if len(found) > 1:
        told = ", ".join(f"{fpr:g}" for fpr in sorted(found))
        raise ValueError(
            f"Expected scores that are flagged at one fpr in {path}, got {told}: score the data "
            "anew, or make a report of each."
        )
    return found.pop() if found else None


def _stream(page: ModuleType, name: str, rows: Sequence[Row], fpr: float | None) -> Any:
    def column(values: Iterable[float | None]) -> np.ndarray:
        return np.array([np.nan if value is None else value for value in values])

    return page.Stream(
        name=name,
        ids=[row.id for row in rows],
        score=column(row.score for row in rows),
        p_value=column(row.p_value for row in rows),
        top_layers=[row.top_layer for row in rows],
        groups=_groups(rows),
        fpr=fpr,
    )


def _groups(rows: Sequence[Row]) -> np.ndarray | None:
    """The group of each; None unless each one that has a score has one."""
    if not rows or any(row.group is None for row in rows if row.score is not None):
        return None
    return np.array([-1 if row.group is None else row.group for row in rows], dtype=np.int64)
