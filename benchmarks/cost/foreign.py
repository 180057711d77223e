"""Time of `gradient_norms` on models of other packages, in units of a plain pass of the same model.

Processor time of one thread, methods interleaved, of the whole log-likelihood, once norms that are
zero at first have been compared. `vmap(grad)`, Opacus and a loop of `torch.autograd.grad` stand
beside it. What an earlier build took on the same machine is kept with the results: `--before`
writes the times of this run as those. `make test-foreign` installs the packages; models of others
that are absent are named and left out.
"""

import copy
import gc
import json
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import ood_monitor as om
from benchmarks.cost.gradient_norms import wrong
from benchmarks.cost.peers import METHODS, Norms, plain
from benchmarks.foreign import FOREIGN, Foreign
from benchmarks.foreign.case import Density, exact_norms, worst_error
from benchmarks.foreign.language import log_probability
from benchmarks.harness.measurement import (
    Row,
    claim,
    conclude,
    machine,
    processor_seconds,
    ratios,
)
from ood_monitor.adapters.base import Batch, checked_terms

#: That a quick run measures, which need no package but the project's own.
QUICK = ("zuko NSF", "learned start state, B = 8")

#: The median of those that no parameter sends to the loop, to reach.
MEDIAN = 1.6

#: Uses before the first that is measured. The 1st, 2nd, 4th and 8th may compare with the loop.
WARM = 8

#: Rounds take about so many seconds a model, within bounds of their number.
SECONDS, FEWEST, MOST = 2.0, 3, 15


class Whole(om.Adapter):
    """An adapter's terms as their sum: what all methods differentiate."""

    is_one_pass = True

    def __init__(self, adapter: om.Adapter) -> None:
        self.module, self._of = adapter.module, adapter

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        of = copy.copy(self._of)
        of.module = self.module
        yield "log_likelihood", torch.stack([v for _, v in checked_terms(of, batch)]).sum(0)


def bare(adapter: om.Adapter) -> om.Adapter:
    """Without the checks of values that `vmap` cannot run, which are no part of the model."""
    return Density(adapter.module, next_tokens) if is_text(adapter) else Whole(adapter)


def is_text(adapter: om.Adapter) -> bool:
    return isinstance(adapter, om.SequenceLikelihood)


def next_tokens(module: Any, tokens: Tensor) -> Tensor:
    is_theirs = hasattr(module, "config")
    logits = module(tokens, use_cache=False).logits if is_theirs else module(tokens)
    return log_probability(logits[:, :-1], tokens[:, 1:])


def loop(adapter: om.Adapter, batch: Batch) -> Callable[[], Norms]:
    def run() -> Norms:
        return {key.split("/")[1]: found for key, found in exact_norms(adapter, batch).items()}

    return run


def measured(case: Foreign, quick: bool) -> Row:
    """Each method's time, and how many tensors it gets wrong or why it fails."""
    adapter, batch = case.made()
    gc.collect()
    gc.freeze()  # what other models left: collections would look through all of it
    whole = Whole(adapter)
    ours, by_autograd = METHODS["ours"](whole, batch), loop(whole, batch)
    unit, exact = plain(whole, batch), by_autograd()
    found, runs = tried({"ours": ours} | peers(case) | {"loop": by_autograd}, exact)
    for _ in range(0 if quick else WARM):
        ours()
    spent = sum(processor_seconds(run) + processor_seconds(unit) for run in runs.values())
    rounds = 1 if quick else min(MOST, max(FEWEST, round(SECONDS / spent)))
    for name, ratio in ratios(unit, runs, rounds, processor_seconds).items():
        found[name]["time"] = round(ratio, 2)
    milliseconds = 1e3 * min(processor_seconds(unit) for _ in range(rounds))
    facts = {
        "model": case.name,
        "package": case.package,
        "batch": case.batch,
        "parameters": len(exact),
        "ways": (taken := ways(whole, batch)),
        "by the loop": taken.get("loop", 0),
        "error": error(case),
        "plain pass, ms": round(milliseconds, 2),
    }
    return facts | found


def peers(case: Foreign) -> dict[str, Callable[[], Norms]]:
    """Runs of a model each, since one that fails may leave what it computed in its model."""
    (first, batch), (second, _) = case.made(), case.made()
    try:
        opacus = METHODS["Opacus"](Whole(second), batch)
    except Exception as error:
        opacus = raising(error)
    return {"vmap(grad)": METHODS["vmap(grad)"](bare(first), batch), "Opacus": opacus}


def raising(error: Exception) -> Callable[[], Norms]:
    def run() -> Norms:
        raise error

    return run


def tried(
    methods: dict[str, Callable[[], Norms]], exact: Norms
) -> tuple[dict[str, Row], dict[str, Callable[[], Norms]]]:
    """What each gets wrong, by name, and those that run."""
    found: dict[str, Row] = {}
    runs = {}
    for name, run in methods.items():
        try:
            found[name] = {"wrong": wrong(run(), exact), "of": len(exact)}
            runs[name] = run
        except Exception as error:
            found[name] = {"fails": f"{type(error).__name__}: {error}".split("\n")[0][:120]}
    if "ours" not in runs or "loop" not in runs:
        raise RuntimeError(f"Expected our norms and the loop's, got {found}.")
    return found, runs


def ways(adapter: om.Adapter, batch: Batch) -> dict[str, int]:
    """How many parameters' norms `gradient_norms` had which way."""
    told = om.gradient_norms(adapter, batch, report=True)
    return dict(Counter(way.name for way in told.ways.values()))


def error(case: Foreign) -> float:
    """The worst relative error of a norm, in double precision and at small sizes."""
    adapter, batch = case.made_small()
    return float(
        f"{worst_error(om.gradient_norms(adapter, batch), exact_norms(adapter, batch))[0]:.1e}"
    )


def claims(rows: list[Row], cases: dict[str, Foreign]) -> list[Row]:
    reached = [
        claim(f"{row['model']}: time", row["ours"]["time"], target)
        for row in rows
        if (target := cases[row["model"]].target) is not None
    ]
    fast = [row["ours"]["time"] for row in rows if not row["by the loop"]]
    median = round(statistics.median(fast), 2) if fast else float("inf")
    worst = max(row["error"] / cases[row["model"]].tolerance for row in rows)
    missed = sum(row["ours"]["wrong"] for row in rows)
    return [
        *reached,
        claim("median time of models of which nothing is left to the loop", median, MEDIAN),
        claim("worst error in double precision, in units of what is allowed", worst, 1),
        claim("tensors that we get wrong in single precision", missed, 0),
    ]


def before(path: Path | None, rows: list[Row], as_before: bool) -> Row:
    """An earlier build's times, by model: those of the file, with this run's where it is one."""
    kept: Row = json.loads(path.read_text())["before"] if path is not None and path.exists() else {}
    if not as_before:
        return kept
    times = {row["model"]: row["ours"]["time"] for row in rows}
    return {"date": date.today().isoformat(), "times": kept.get("times", {}) | times}


def line(row: Row) -> str:
    shown = [f"{row['model']:40s} {row['plain pass, ms']:7.1f} ms"]
    for name in ("ours", "vmap(grad)", "loop", "Opacus"):
        found = row[name]
        shown.append(f"{name} {found.get('time', 'fails')}{'!' * bool(found.get('wrong'))}")
    return "  ".join([*shown, f"looped {row['by the loop']} of {row['parameters']}"])


def told(cases: Iterable[Foreign], quick: bool) -> Iterator[Row]:
    for case in cases:
        row = measured(case, quick)
        typer.echo(line(row))
        yield row


def main(
    quick: Annotated[bool, typer.Option(help="One round of two models.")] = False,
    only: Annotated[str, typer.Option(help="Models whose names hold this.")] = "",
    as_before: Annotated[
        bool, typer.Option("--before", help="Write these times as those of an earlier build.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of packages, and of hooks and their speed
    asked = [c for c in FOREIGN if only in c.name and (not quick or c.name in QUICK)]
    cases = {case.name: case for case in asked if case.is_installed}
    if not cases:
        raise typer.BadParameter(f"Expected a name of a model that is installed, got {only!r}.")
    rows = list(told(cases.values(), quick))
    report = {
        "machine": machine(),
        "rows": rows,
        "targets": {name: case.target for name, case in cases.items() if case.target is not None},
        "before": before(output, rows, as_before),
        "absent": [case.name for case in asked if not case.is_installed],
        "claims": claims(rows, cases),
    }
    conclude(report, output)


if __name__ == "__main__":
    typer.run(main)
