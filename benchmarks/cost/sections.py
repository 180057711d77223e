"""What the benchmarks of cost found, as rows and blocks of `benchmarks.cost.performance`'s page.

Of each benchmark's report there are its rows of the table of main figures, and a section.
"""

import statistics
from collections.abc import Callable
from typing import Any, TypeAlias

from benchmarks.harness.pages import Row, paragraph, percent, ratio, table

Report: TypeAlias = dict[str, Any]

#: What, ours, and what is beside it.
Figure: TypeAlias = tuple[str, str, str]


def methods(rows: dict[str, Row]) -> list[str]:
    """Those of whole models, whose norms were compared with the loop's."""
    first = next(iter(rows.values()))
    return [name for name, found in first.items() if "wrong" in found or "fails" in found]


def norms_figures(report: Report) -> list[Figure]:
    found = []
    for model, row in report["rows"].items():
        peers = [name for name in methods(report["rows"]) if not name.startswith("ours")]
        beside = ", ".join(f"{peer} {timed(row[peer])}" for peer in peers)
        own = f"{ratio(row['ours']['time'])} plain passes, {ratio(row['ours']['memory'])} in memory"
        found.append((model, own, beside))
    return found


def norms_section(report: Report) -> list[str]:
    rows, names = report["rows"], methods(report["rows"])
    return [
        paragraph(
            "Squared gradient norms of every sample and layer. Times are in units of a plain pass: "
            "one batched forward and backward pass of the same model. A tensor is wrong if its "
            "norms are off by more than a hundredth of the loop's."
        ),
        table(
            ["time", "plain pass, s", *names],
            [
                (model, row["plain"]["seconds"], *(timed(row[name]) for name in names))
                for model, row in rows.items()
            ],
        ),
        "The peak of memory, in units of the plain pass's:",
        table(
            ["memory", "plain pass, MiB", *names],
            [
                (model, row["plain"]["MiB"], *(remembered(row[name]) for name in names))
                for model, row in rows.items()
            ],
        ),
        *ends(rows),
        *terms(report["terms of Glow"]),
        *growth(report["growth of the small UNet"]),
    ]


def timed(found: Row) -> str:
    if "fails" in found:
        return "fails"
    wrong = f" ({found['wrong']} of {found['of']} wrong)" if found["wrong"] else ""
    return ratio(found["time"]) + wrong


def remembered(found: Row) -> str:
    return "fails" if "fails" in found else ratio(found["memory"])


def ends(rows: dict[str, Row]) -> list[str]:
    """The ends of networks, where the backward pass ends early."""
    first, told = next(iter(rows.values())), methods(rows)
    names = [name for name in first if name != "plain" and name not in told]
    found = [
        (model, *(ratio(row[name]["time"]) for name in names))
        for model, row in rows.items()
        if all(name in row for name in names)
    ]
    return ["The end of a network alone, in plain passes:", table(["time", *names], found)]


def terms(found: Row) -> list[str]:
    if not found:
        return []
    each = ratio(found["time per term"])
    return [
        f"The {found['terms']} terms of the Glow, a backward pass each, take "
        f"{ratio(found['time'])} plain passes together, {each} a term."
    ]


def growth(found: dict[str, dict[str, float]]) -> list[str]:
    """The plots, and their numbers."""
    if not found:
        return []
    names = {"batch": "batch", "size": "image size, pixels", "depth": "layers per block"}
    rows = [
        (names[what], ", ".join(f"{ratio(time)} at {size}" for size, time in times.items()))
        for what, times in found.items()
    ]
    return [
        "How the time of the small UNet grows, at B = 8 where it is not the batch that does:",
        "![Cost against batch, image size and depth](gradient-norms-cost.png)",
        table(["what grows", "time in plain passes"], rows),
    ]


def forms_figures(report: Report) -> list[Figure]:
    regrets = [row["regret"] for row in report["rows"]]
    mean, largest = ratio(statistics.mean(regrets)), ratio(max(regrets))
    return [
        ("time of the form picked", f"{mean} of the faster one, on average", f"{largest} at most")
    ]


def forms_section(report: Report) -> list[str]:
    rows = report["rows"]
    best = sum(row[row["picked"]] == min(row["direct"], row["gram"]) for row in rows)
    worst = max(rows, key=lambda row: float(row["regret"]))
    return [
        paragraph(
            "A layer's norms have two exact forms, the direct one and the Gram form. The one "
            f"picked was the faster for {best} of {len(rows)} sizes of layers. The worst pick took "
            f"{ratio(worst['regret'])} times as long as the other form: {worst['layer']}."
        )
    ]


def drift_figures(report: Report) -> list[Figure]:
    """Of the drift test with the longest run length."""
    own = [row for row in report["rows"] if row["method"].startswith("ours")][-1]
    peers = [row for row in report["rows"] if not row["method"].startswith("ours")]
    name = own["method"].removeprefix("ours, ")

    def among(pick: Callable[[Row], list[Any]], write: Callable[[Any], str]) -> tuple[str, str]:
        return span(pick(own), write), "peers: " + span(
            [x for row in peers for x in pick(row)], write
        )

    return [
        (f"an update, {name}", *among(lambda row: [row["microseconds"]], microseconds)),
        (f"false alarm within 10 000 samples, {name}", *among(lambda row: [alarmed(row)], percent)),
        (f"median delay in samples, {name}, over the changes", *among(delays, delay)),
    ]


def span(values: list[Any], write: Callable[[Any], str]) -> str:
    """The least and the largest; None is larger than any."""
    ordered = sorted(values, key=lambda value: float("inf") if value is None else value)
    ends = dict.fromkeys(write(value) for value in (ordered[0], ordered[-1]))
    return " to ".join(ends)


def delays(row: Row) -> list[float | None]:
    return [found["median delay"] for found in row["changes"].values()]


def delay(value: float | None) -> str:
    return "never" if value is None else f"{value:g}"


def alarmed(row: Row) -> float:
    return float(row["in control"]["alarm within 10000"])


def microseconds(value: float) -> str:
    return f"{value:.2g} µs" if value < 10 else f"{value:.0f} µs"


def drift_section(report: Report) -> list[str]:
    rows = [
        (
            row["method"],
            f"{row['in control']['mean run length, at least']:.0f}",
            percent(alarmed(row)),
            *map(delay, delays(row)),
            microseconds(row["microseconds"]),
        )
        for row in report["rows"]
    ]
    changes = list(report["rows"][0]["changes"])
    header = ["method", "run length, at least", "false alarm within 10 000", *changes, "an update"]
    return [
        paragraph(
            "Samples to a false alarm while nothing changes (the mean, of runs that are cut off), "
            "and the median of samples from a change to the alarm: never if most streams of "
            "2 000 changed samples have none. A short run length buys speed with false alarms. "
            "An update is in microseconds of processor time."
        ),
        table(header, rows),
        *report["skipped"],
        "![Delays against run lengths of these methods](drift.png)",
    ]


SMALL = ("test, forward", "test, gradient_norms", "validation that is not watched")


def lightning_figures(report: Report) -> list[Figure]:
    found = []
    for name, row in report["rows"].items():
        if name.startswith("small net"):
            found += [(f"{name}, {what}", f"{ratio(row[what])} plain passes", "") for what in SMALL]
            continue
        hook = f"its hook: {percent(row['its hook, share of a step'])} of a step"
        step = f"{ratio(row['step with the training stream'])} plain steps"
        found.append((f"{name}, training step", step, hook))
        for method in ("forward", "gradient_norms"):
            every, tenth = (
                row[f"validation, {method}, {which} scored"]
                for which in ("every batch", "one batch in ten")
            )
            beside = f"one batch in ten: {ratio(tenth)}"
            what = f"{name}, validation by {method}, every batch scored"
            found.append((what, f"{ratio(every)} plain passes", beside))
    return found


def lightning_section(report: Report) -> list[str]:
    rows = {k: row for k, row in report["rows"].items() if not k.startswith("small net")}
    small = {k: row for k, row in report["rows"].items() if k not in rows}
    figures = list(next(iter(rows.values())))
    return [
        paragraph(
            "What the callback adds: the time of a training step with the training stream beside "
            "one without, which alternate, and of a validation pass of which batches are scored "
            "beside one of which none is."
        ),
        table(["", *rows], [(name, *(row[name] for row in rows.values())) for name in figures]),
        *(table(["", name], list(row.items())) for name, row in small.items()),
    ]


def transformers_figures(report: Report) -> list[Figure]:
    found = []
    for row in report["rows"]:
        hook = f"its hook: {percent(row['its hook, share of a step'])} of a step"
        step = f"{ratio(row['step with the training stream'])} plain steps"
        tenth = f"one batch in ten: {ratio(row['evaluation, one batch in ten scored'])}"
        scored = f"{ratio(row['evaluation, every batch scored'])} plain evaluations"
        found.append((f"{row['model']}, training step", step, hook))
        found.append((f"{row['model']}, evaluation, every batch scored", scored, tenth))
    return found


def transformers_section(report: Report) -> list[str]:
    rows = report["rows"]
    figures = [name for name in rows[0] if name != "model"]
    return [
        paragraph(
            "What the Trainer's callback adds to a language model, in the processor's time: to a "
            "training step with the training stream, and to an evaluation of twenty batches, which "
            "is scored by its own passes, but for the first. What is left is the moments of the "
            "vocabulary, which weigh the more the smaller the model."
        ),
        table(
            ["", *(row["model"] for row in rows)],
            [(name, *(row[name] for row in rows)) for name in figures],
        ),
    ]


def diffusers_figures(report: Report) -> list[Figure]:
    """By pipeline and way of watching, what is added to calls of each length."""
    found: dict[str, list[Row]] = {}
    for row in report["rows"]:
        if "way" in row:
            found.setdefault(f"{row['pipeline']}, {row['way']}", []).append(row)
    return [
        (name, "; ".join(map(share, rows)), "; ".join(map(added, rows)))
        for name, rows in found.items()
    ]


def share(row: Row) -> str:
    none = "" if row["scored"] else " (none scored)"
    return f"{percent(row['share'])} of a call of {row['steps']} steps{none}"


def added(row: Row) -> str:
    return f"{row['added_ms_p50']:z.0f} ms on {row['call_ms']:.0f} ms"


def diffusers_section(report: Report) -> list[str]:
    rows = [row for row in report["rows"] if "way" in row]
    header = [
        "pipeline",
        "steps",
        "watched",
        "call, ms",
        "added, ms",
        "95 %",
        "share",
        "of the CPU",
    ]
    return [
        paragraph(
            "What watching adds to a call. Each watched call is beside an unwatched one just "
            "before: the median of what it takes more, its 95 % quantile, and the median of its "
            "share of the unwatched call; of a tenth of the samples, the mean of what they take "
            "more beside the mean call. The first call is scored but not timed. What the "
            "background does after a call is not in its time. The last share is of the "
            "processor's time, the background's included, which other work on the machine changes "
            "less than that of the clock: targets are for it, in the background for the clock's."
        ),
        table([*header, "calls", "scored", "dropped"], [watched(row) for row in rows]),
        *unscored(rows),
        *plans([row for row in report["rows"] if "plan" in row]),
    ]


def watched(row: Row) -> tuple[object, ...]:
    times = (f"{row[name]:.1f}" for name in ("call_ms", "added_ms_p50", "added_ms_p95"))
    counts = (row["calls"], row["scored"], row["dropped"])
    shares = (percent(row["share"]), percent(row["cpu_share"]) if "cpu_share" in row else "")
    return row["pipeline"], row["steps"], row["way"], *times, *shares, *counts


def unscored(rows: list[Row]) -> list[str]:
    """A share of the samples can be none of few."""
    none = [row for row in rows if not row["scored"]]
    items = [f"- {row['pipeline']}, {row['steps']} steps, {row['way']}" for row in none]
    lead = "Here no sample came to be scored, so that the figures are of the hook alone:"
    return [lead, "\n".join(items)] if items else []


def plans(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = [(f"`{row['plan']}`", row["milliseconds"], ratio(row["forwards"])) for row in rows]
    return [
        "What `plan_costs` tells of the last pipeline above, a sample:",
        table(["plan", "milliseconds", "in forward passes of the network"], cells),
    ]


def real_sizes_figures(report: Report) -> list[Figure]:
    """By model and guidance, what scoring all samples adds to calls of each length."""
    found: dict[str, list[Row]] = {}
    for row in report["rows"]:
        if row.get("way") in ("two levels", "one level"):
            found.setdefault(f"{sized(row)}, {row['way']}", []).append(row)
    return [
        (name, "; ".join(map(of_steps, rows)), "; ".join(map(added, rows)))
        for name, rows in found.items()
    ]


def sized(row: Row) -> str:
    return f"{row['model']}{', guided' if row['guided'] else ''}"


def of_steps(row: Row) -> str:
    return f"{percent(row['share'])} of a call of {row['steps']} steps"


def real_sizes_section(report: Report) -> list[str]:
    rows, scale = report["rows"], report["scale"]
    ways, peaks = [r for r in rows if "way" in r], [r for r in rows if "peak" in r]
    where = "in bfloat16" if report["device"].startswith("cuda") else "in single precision"
    size = "at their own size" if scale == 1 else f"at {scale:g} of the parameters"
    header = ["model", "parameters", "steps", "watched", "call, ms", "added, ms, 50 %", "99 %"]
    return [
        paragraph(
            f"Denoisers of random weights on {report['device']}, {where}, {size} and about "
            f"{report['positions']:g} of the positions, a sample a call. Each watched call is "
            f"beside an unwatched one just before, {report['rounds']} of each way. Calls of 4 "
            "steps are measured, those of 50 made of them, of a step, and of what recording adds "
            "to a step; calls of which a tenth of the samples is scored are made of calls whose "
            "sample is scored and of calls whose is not. The share is the median, of a tenth of "
            "the samples the mean. Without a GPU times are the processor's, but for those in the "
            "background, which are the clock's. There a call is also one of a stream, each "
            "of which waits for the scoring of those before: the last column is what that adds."
        ),
        table([*header, "share", "share in a stream"], map(real_size, ways)),
        "Peak memory of a call, with the weights:",
        table(["model", "weights, MiB", "unwatched, MiB", "more, MiB", "ratio"], map(peak, peaks)),
    ]


def real_size(row: Row) -> tuple[object, ...]:
    times = (f"{row[name]:z.1f}" for name in ("call_ms", "added_ms_p50", "added_ms_p99"))
    stream = None if row["throughput"] is None else percent(row["throughput"])
    millions = f"{row['parameters'] / 1e6:,.0f} M".replace(",", " ")
    return sized(row), millions, row["steps"], row["way"], *times, percent(row["share"]), stream


def peak(row: Row) -> tuple[object, ...]:
    return sized(row), row["weights_mib"], row["peak_mib"], row["added_mib"], f"{row['peak']:.3f}"


def foreign_figures(report: Report) -> list[Figure]:
    """Of all models, and of those of which nothing is left to the loop."""
    rows = report["rows"]
    fast = [row for row in rows if not row["by the loop"]]
    found = [(f"median of {len(rows)} models", rows)]
    if fast:
        found.append((f"median of the {len(fast)} of which nothing is left to the loop", fast))
    return [
        (what, f"{median_of(among, 'ours')} plain passes", besides(among)) for what, among in found
    ]


def besides(rows: list[Row]) -> str:
    found = [(name, [r for r in rows if r[name].get("wrong") == 0]) for name in FOREIGN_PEERS]
    return ", ".join(
        f"{name} {median_of(ran, name)} on the {len(ran)} where it is right"
        for name, ran in found
        if ran
    )


def median_of(rows: list[Row], name: str) -> str:
    return ratio(statistics.median(row[name]["time"] for row in rows))


FOREIGN_PEERS = ("vmap(grad)", "loop", "Opacus")


def foreign_section(report: Report) -> list[str]:
    before, targets = report["before"], report["targets"]
    times = before.get("times", {})
    lines = [
        (
            row["model"],
            row["package"],
            row["batch"],
            f"{row['plain pass, ms']:.1f}",
            ratio(times[row["model"]]) if row["model"] in times else None,
            *(timed(row[name]) for name in ("ours", *FOREIGN_PEERS)),
            targets.get(row["model"]),
            f"{row['by the loop']} of {row['parameters']}",
        )
        for row in report["rows"]
    ]
    earlier = f"before ({before['date']})" if before else "before"
    header = ["model", "of", "B", "plain pass, ms", earlier, "now", *FOREIGN_PEERS, "target"]
    return [
        paragraph(
            "Models of other packages, with random weights, and norms of the whole log-likelihood. "
            "Times are in units of a plain pass, as above. The loop is of `torch.autograd.grad` "
            "over the samples. The first time stands for an earlier build, measured on the day "
            "that it names. A method fails where it raises, and gets a tensor wrong as above; "
            "`benchmarks/results/foreign.json` says why it fails. The last column counts the "
            "parameters whose norms we leave to a loop."
        ),
        table([*header, "left to the loop"], lines),
        paragraph(errors(report["rows"])),
        *left_out(report["absent"]),
    ]


def errors(rows: list[Row]) -> str:
    """The largest of models in double precision, and of those that are not wholly in it."""
    exact = [row for row in rows if row["error"] <= 1e-8]
    others = [row for row in rows if row not in exact]
    found = (
        "In double precision, at smaller sizes, each model's norms are compared with a loop of "
        f"`torch.autograd.grad`. Of {len(exact)} the largest relative error is "
        f"{max(row['error'] for row in exact):.1e}."
    )
    if not others:
        return found
    names = ", ".join(row["model"] for row in others)
    largest = max(row["error"] for row in others)
    return f"{found} Of those that compute in single precision within ({names}): {largest:.1e}."


def left_out(absent: list[str]) -> list[str]:
    return [paragraph(f"Not installed, and left out: {', '.join(absent)}.")] if absent else []
