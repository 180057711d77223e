"""Real series with real drift: which columns changed, and since when.

An autoregressive forecaster, zuko's flow of a row given the row before it (and the season), is
trained on half of a series' early rows; the other half calibrates, and what comes later is the
stream. Each column has a drift test of its own, of - log p of its value given those before it.
The series come with statsmodels: quarters of the United States' economy, carbon dioxide over Mauna
Loa and sea temperatures of the Pacific by month. Beside them the same rows in random order, which
have no drift, so that alarms of these are false.

`make published` brings statsmodels into an environment of its own; a run takes two minutes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import zuko
from torch import Tensor

import ood_monitor as om
from benchmarks.harness.measurement import claim, reported
from ood_monitor.drift import EDetector

Array = np.ndarray
Row = dict[str, Any]

#: Samples to a false alarm of all columns together, and orders without a drift.
ERT, SHUFFLES, STEPS = 1_000, 40, 400


@dataclass(frozen=True)
class Series:
    """Rows in time.

    Attributes:
        names: Of D columns.
        times: Of N rows, as they are told.
        rows: What is forecast, (N, D).
        given: What is known before, (N, C).
        early: How many train and calibrate.
    """

    names: tuple[str, ...]
    times: list[str]
    rows: Array
    given: Array
    early: int


def economy() -> Series:
    """Growth in per cent a quarter, and changes of two rates in points: 1959 to 2009."""
    import statsmodels.api as sm

    data = sm.datasets.macrodata.load_pandas().data
    levels = ["realgdp", "realcons", "realinv", "realgovt", "cpi", "m1"]
    growth = 100 * np.diff(np.log(data[levels].to_numpy()), axis=0)
    points = np.diff(data[["tbilrate", "unemp"]].to_numpy(), axis=0)
    rows = np.hstack([growth, points])
    times = [f"{int(y)} Q{int(q)}" for y, q in data[["year", "quarter"]].to_numpy()[2:]]
    names = ("output", "consumption", "investment", "government", "prices", "money")
    early = times.index("1979 Q1")
    return Series((*names, "interest", "unemployment"), times, rows[1:], rows[:-1], early)


def carbon_dioxide() -> Series:
    """Change from month to month, in parts per million, given the month: 1958 to 2001."""
    import statsmodels.api as sm

    months = sm.datasets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    change = np.diff(months.to_numpy())[:, None]
    dates = months.index[1:]
    times = [f"{date:%Y-%m}" for date in dates]
    season = seasons(np.array([date.month for date in dates]))
    return Series(("growth",), times, change, season, times.index("1975-01"))


def pacific() -> Series:
    """Sea temperature in degrees, given that of the month before and the month: 1950 to 2010."""
    import statsmodels.api as sm

    data = sm.datasets.elnino.load_pandas().data
    years, values = data["YEAR"].to_numpy(), data.to_numpy()[:, 1:].ravel()
    times = [f"{int(year)}-{month:02d}" for year in years for month in range(1, 13)][1:]
    season = seasons(np.arange(1, len(values)) % 12 + 1)
    given = np.hstack([values[:-1, None], season])
    return Series(("temperature",), times, values[1:, None], given, times.index("1976-01"))


def seasons(months: Array) -> Array:
    """Two harmonics of the year."""
    angles = 2 * np.pi * months / 12
    return np.stack([f(k * angles) for k in (1, 2) for f in (np.sin, np.cos)], axis=1)


def made_up() -> Series:
    """Three columns of which the second has another level from row 200 on, for a quick run."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(301, 3))
    rows[201:, 1] += 2.0
    times = [str(i) for i in range(300)]
    return Series(("a", "b", "c"), times, rows[1:], rows[:-1], 120)


SERIES: dict[str, Callable[[], Series]] = {
    "economy of the United States": economy,
    "carbon dioxide": carbon_dioxide,
    "sea temperature": pacific,
}


def standardised(values: Array, by: Array) -> Array:
    return np.asarray((values - by.mean(0)) / by.std(0))


def scores_of(series: Series, train: Array) -> Array:
    """- log p of each column given those before it and what is given, (N, D), in nats."""
    rows = standardised(series.rows, series.rows[train])
    given = standardised(series.given, series.given[train])
    batch = torch.tensor(np.hstack([rows, given]), dtype=torch.float32)
    width = rows.shape[1]
    torch.manual_seed(0)
    flow: Any = zuko.flows.MAF(width, given.shape[1], transforms=1, hidden_features=(16,))
    fitted(flow, batch[train], width)
    adapter = om.LogLikelihood(
        flow,
        inputs=lambda b: b[:, :width],
        condition=lambda b: {"c": b[:, width:]},
        sample="row",
    )
    others = torch.tensor(np.setdiff1d(np.arange(len(batch)), train))
    detector = om.Detector(adapter, parts=["log_likelihood"], explain=0)
    detector.fit([batch[others[: series.early - len(train)]]], progress=False)
    found = detector.explain(batch).surprise
    return np.asarray(-sum(value.numpy() for value in found.values()))


def fitted(flow: Any, batch: Tensor, width: int) -> None:
    """Few rows: with noise on the inputs, and weights held small."""
    optimizer = torch.optim.AdamW(flow.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(STEPS):
        x = batch + 0.2 * torch.randn_like(batch)
        loss = -flow(x[:, width:]).log_prob(x[:, :width]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flow.eval()


def watched(usual: Array, stream: Array, columns: int) -> tuple[int, Any] | None:
    """The row of the alarm and since when, if there is one."""
    drift = EDetector(usual, ert=ERT * columns)
    for i, score in enumerate(stream):
        if drift.update(float(score)).alarm:
            return i, drift.since()
    return None


def rows_of(name: str, series: Series) -> Iterator[Row]:
    """A row for each column."""
    generator = np.random.default_rng(0)
    order = generator.permutation(series.early)
    train, held_out = np.sort(order[: series.early // 2]), np.sort(order[series.early // 2 :])
    scores = scores_of(series, train)
    later = np.arange(series.early, len(series.rows))
    for i, column in enumerate(series.names):
        own = scores[:, i]
        found = watched(own[held_out], own[later], len(series.names))
        yield {
            "series": name,
            "column": column,
            "stream": [series.times[later[0]], series.times[-1]],
            "rows": len(later),
            "calibrated": len(held_out),
            **told(found, later, series.times),
            "false alarms in random order": false_alarms(own, held_out, later, len(series.names)),
        }


def told(found: tuple[int, Any] | None, later: Array, times: list[str]) -> Row:
    if found is None:
        return {"alarm": None, "since": None, "interval": None}
    at, since = found

    def back(count: int) -> str:
        return times[later[max(0, at - count)]]

    interval = [back(since.earliest), back(since.latest)]
    return {"alarm": times[later[at]], "since": back(since.estimate), "interval": interval}


def false_alarms(own: Array, held_out: Array, later: Array, columns: int) -> float:
    """The share of random orders of what calibrates and the stream that have an alarm."""
    every, alarms = np.concatenate([held_out, later]), 0
    for seed in range(SHUFFLES):
        order = np.random.default_rng(seed).permutation(every)
        usual, stream = np.split(own[order], [len(held_out)])
        alarms += watched(usual, stream, columns) is not None
    return alarms / SHUFFLES


def line(row: Row) -> str:
    head = f"{row['series']:30}{row['column']:14}alarm {row['alarm']}, since {row['since']}"
    return f"{head} {row['interval']}, in random order {row['false alarms in random order']:.3f}"


def claims(rows: list[Row]) -> list[Row]:
    """Alarms where there is no drift: in a stream of n rows n / ERT at most, over all columns."""
    found = []
    for name in dict.fromkeys(row["series"] for row in rows):
        own = [row for row in rows if row["series"] == name]
        total = round(sum(row["false alarms in random order"] for row in own), 3)
        text = f"{name}, in random order: share of streams with an alarm, all columns together"
        found.append(claim(text, total, own[0]["rows"] / ERT))
    return found


def main(
    quick: Annotated[bool, typer.Option(help="A made-up series.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    made = {"made up": made_up} if quick else SERIES
    rows = (row for name, make in made.items() for row in rows_of(name, make()))
    command = "python -m benchmarks.drift.real_series"
    reported(rows, line, claims, output, command=command, ert=ERT)


if __name__ == "__main__":
    typer.run(main)
