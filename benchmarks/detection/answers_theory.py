"""Answers to statements 1 to 15: results, mechanisms, assumptions and what breaks them."""

from statistics import mean

from scipy.stats import spearmanr

from benchmarks.detection.answers import (
    EQUAL,
    HOLDS,
    IN_PART,
    NOT_HERE,
    Answer,
    Results,
    Row,
    Statement,
    between,
    by_model,
    counts,
    gains,
    mean_of,
    of_cases,
    of_share,
    slashed,
    table_of,
    where,
)
from benchmarks.detection.methods import DEFAULT, PAPER
from benchmarks.detection.statements_norms import DENSITIES, TYPICALITY
from benchmarks.harness.pages import auroc, percent, ratio

#: The stand-in for SVHN.
STREET = "Chars74K"


def street(results: Results) -> Answer:
    found = [
        (
            group,
            *(method_of(results, method, group)["auroc"][STREET] for method in (PAPER, TYPICALITY)),
        )
        for group in (1, 5)
    ]
    least = min(value for _, paper, _ in found for value in [paper])
    verdict = HOLDS if least >= 0.99 else IN_PART if least >= 0.9 else NOT_HERE
    told = "; ".join(f"B = {g}: {auroc(p)}, typicality {auroc(t)}" for g, p, t in found)
    return Answer(verdict, f"CIFAR-10 against {STREET}, a stand-in. {told}")


def method_of(results: Results, method: str, group: int) -> Row:
    """Of the colour Glow."""
    [row] = where(results["colour_glow"], shown="detection", method=method, group=group)
    return row


def most_pairs(results: Results) -> Answer:
    told, found = [], []
    for group in (1, 5):
        theirs, paper = (table_of(results, name, group) for name in (TYPICALITY, PAPER))
        found.append(counts(paper, theirs))
        ours = [
            slashed(counts(rows, theirs))
            for rows in (norms_method(results, group), table_of(results, "forward", group))
        ]
        told.append(
            f"B = {group}: {slashed(found[-1])}, means {auroc(mean_of(paper))} and "
            f"{auroc(mean_of(theirs))} (ours {' and '.join(ours)})"
        )
    most = [better > sum(rest) for better, *rest in found]
    more = [better > worse for better, _, worse in found]
    verdict = HOLDS if all(most) else IN_PART if any(more) else NOT_HERE
    return Answer(verdict, f"Pairs better/equal/worse. {'; '.join(told)}")


def norms_method(results: Results, group: int) -> list[Row]:
    """The method `gradient_norms`, which is the evidence's default where terms are levels."""
    levels = where(results["evidence"], method=DEFAULT, group=group, model="UNet")
    return [*table_of(results, "gradient_norms", group), *levels]


def laws(results: Results) -> Answer:
    rows = where(results["paper"], shown="law")
    distances = [row["ks_median"] for row in rows]
    degrees = [row["effective_dof_of_parameters"] for row in rows]
    normal, square = max(distances) <= 0.1, min(degrees) >= 0.5
    return Answer(
        [NOT_HERE, IN_PART, HOLDS][normal + square],
        f"Distance from a Normal {between(distances)} (median layer), but chi-square degrees are "
        f"{between(degrees, percent)} of the parameters",
    )


def weakly(results: Results) -> Answer:
    rows = where(results["paper"], shown="law")
    found = [row["mean_correlation"] for row in rows]
    glows = [row["mean_correlation"] for row in rows if row["model"] == "Glow"]
    return Answer(
        of_cases(value <= 0.3 for value in found),
        f"Mean absolute correlation {between(found)}; Glows {between(glows)}",
    )


def nothing_to_choose(results: Results) -> Answer:
    best = {
        model: max(by_model(table_of(results, name))[model] for name in DENSITIES)
        for model in by_model(table_of(results, PAPER))
    }
    paper = by_model(table_of(results, PAPER))
    short = {model: best[model] - value for model, value in paper.items()}
    (on, model), most = max(short.items(), key=lambda item: item[1])
    verdict = HOLDS if most <= 0.01 else IN_PART if mean(short.values()) <= 0.05 else NOT_HERE
    return Answer(
        verdict,
        f"The best density by hindsight gains {auroc(mean(short.values()))}, at most "
        f"{auroc(most)} ({model} of {on})",
    )


def represented(results: Results) -> Answer:
    grey = [r["norms_relative_difference"] for r in where(results["paper"], shown="representation")]
    colour = where(results.get("colour_glow", []), shown="invariance")
    found = grey + [row["norms_relative_difference"] for row in colour]
    bits = where(results["paper"], shown="representation")[0]["bits_per_dimension"]
    changes = ", ".join(row["change"] for row in colour) or "RGB to HSV not yet measured"
    return Answer(
        HOLDS if max(found) <= 1e-6 else NOT_HERE,
        f"Norms differ by {max(found):.0e} at most; bits per dimension from {bits[0]:.2f} to "
        f"{bits[1]:.2f}. Scale, shift, flip; {changes}",
    )


def larger(results: Results) -> Answer:
    rows = where(results["statements"], part="larger")
    shares = [value for row in rows for value in row["median"].values()]
    each: dict[str, list[float]] = {}
    for row in rows:
        each.setdefault(row["model"], []).extend(row["median"].values())
    told = ", ".join(f"{model} {percent(mean(found))}" for model, found in each.items())
    most = [share > 0.5 for share in shares]
    return Answer(
        of_cases(most),
        f"Most layers larger in {sum(most)} of {len(most)} pairs; share of layers: {told}",
    )


def influential(results: Results) -> Answer:
    rows = where(results["statements"], part="influence")
    own, others = ([r["rank correlation"][what]["all"] for r in rows] for what in ("own", "others"))
    more = [value > 0.5 for row in rows for value in row["auroc"].values()]
    holds = [of_cases(value >= 0.5 for value in others) == HOLDS, of_cases(more) == HOLDS]
    return Answer(
        [NOT_HERE, IN_PART, HOLDS][sum(holds)],
        f"Rank correlation of norm and what a step changes: own {between(own)}, others' "
        f"{between(others)}; but others change more by foreign data in {sum(more)} of "
        f"{len(more)} pairs",
    )


def flat(results: Results) -> Answer:
    rows = where(results["statements"], part="flatness")
    found = [value for row in rows for value in row["foreign to known"].values()]
    small = where(rows, size=min(row["size"] for row in rows))
    spread = between((row["of the spread"] for row in small), percent)
    return Answer(
        of_cases(value > 1 for value in found),
        f"Foreign data change more by disturbed weights in {sum(v > 1 for v in found)} of "
        f"{len(found)} cases; a thousandth moves known data by {spread} of their spread",
    )


def undertrained(results: Results) -> Answer:
    stages = stages_of(results["questions"])
    by_steps = [last - first for first, *_, last in stages.values()]
    rows = where(results["statements"], part="sizes", varied="training images")
    few, many = rows[0], rows[-1]
    by_images = many[PAPER] - few[PAPER]
    told = ", ".join(
        f"{model} {auroc(found[0])} to {auroc(found[-1])}" for model, found in stages.items()
    )
    return Answer(
        of_cases(value > EQUAL for value in [*by_steps, by_images]),
        f"From 1 % of the steps to all: {told}. {few['images']} images {auroc(few[PAPER])}, "
        f"{many['images']} {auroc(many[PAPER])}",
    )


def stages_of(rows: list[Row]) -> dict[str, list[float]]:
    """The paper's AUROC by model, in the order of steps."""
    found: dict[str, list[float]] = {}
    for row in where(rows, question="undertraining"):
        found.setdefault(row["model"], []).append(row[PAPER])
    return found


def form(results: Results, name: str) -> list[Row]:
    return where(results["statements"], part="fisher", form=name)


def metric(results: Results) -> Answer:
    names = [f"full, damping {times:g}" for times in (0.01, 1, 100)]
    full = [mean_of(form(results, name)) for name in names]
    norm = form(results, "total norm")
    better = [gain > EQUAL for gain in gains(form(results, names[1]), norm)]
    return Answer(
        of_cases(better),
        f"Of 500 known images, {', '.join(map(auroc, full))} by damping, plain norm "
        f"{auroc(mean_of(norm))}; better on {sum(better)} of {len(better)} models",
    )


def diagonal(results: Results) -> Answer:
    found = [r["diagonal_over_off_diagonal"] for r in where(results["paper"], shown="fisher")]
    rows = where(results["statements"], part="fisher structure")
    mass = {
        name: between((r["of the squared Frobenius norm"][name] for r in rows), percent)
        for name in ("diagonal", "blocks")
    }
    agree = [row["rank correlation with norms by layer"]["test"] for row in rows]
    return Answer(
        of_cases(value >= 5 for value in found),
        f"{between(found, ratio)} times the others; of F's squared norm {mass['diagonal']} is on "
        f"the diagonal, {mass['blocks']} in layers' blocks; ranks agree by {between(agree)}",
    )


def off_diagonal(results: Results) -> Answer:
    structure = by_model(where(results["paper"], shown="fisher"), "diagonal_over_off_diagonal")
    found = by_model(table_of(results, PAPER))
    rank = rank_of([structure[model] for model in found], list(found.values()))
    return Answer(
        HOLDS if rank >= 0.7 else IN_PART if rank >= 0.3 else NOT_HERE,
        f"Rank correlation of that ratio with the paper's AUROC over {len(found)} models: "
        f"{ratio(rank)}",
    )


def rank_of(first: list[float], second: list[float]) -> float:
    return float(spearmanr(first, second).statistic)


def jointly(results: Results) -> Answer:
    paper, total = table_of(results, PAPER), table_of(results, "total norm")
    better = [gain > EQUAL for gain in gains(paper, total)]
    orders = [row["orders of magnitude"] for row in where(results["statements"], part="layers")]
    return Answer(
        of_cases(better),
        f"Layers span {between(orders, one)} powers of ten; jointly {auroc(mean_of(paper))}, total "
        f"{auroc(mean_of(total))}, better on {sum(better)} of {len(better)} models",
    )


def one(value: float) -> str:
    return f"{value:.1f}"


def deep_or_narrow(results: Results) -> Answer:
    rows = where(results["statements"], part="sizes", varied="depth and width")
    ends: dict[str, dict[str, tuple[float, float]]] = {
        what: {name: at_ends(rows, what, name) for name in ("correlation", PAPER)}
        for what in ("depth", "width")
    }
    deep, wide = ends["depth"]["correlation"], ends["width"]["correlation"]
    worse, better = ends["depth"][PAPER], ends["width"][PAPER]
    checks = [deep[1] > deep[0], wide[0] > wide[1], worse[1] < worse[0], better[0] < better[1]]
    told = "; ".join(
        f"{what} {least} to {most}: correlation {arrow(ends[what]['correlation'])}, AUROC "
        f"{arrow(ends[what][PAPER])}"
        for what, (least, most) in {w: extremes(rows, w) for w in ends}.items()
    )
    return Answer(of_share(mean(map(float, checks))), f"Small Glows, {told}")


def extremes(rows: list[Row], what: str) -> tuple[int, int]:
    found = [row[what] for row in rows]
    return min(found), max(found)


def at_ends(rows: list[Row], what: str, column: str) -> tuple[float, float]:
    """Means of a column at the least and the largest depth or width."""
    low, high = (
        mean(row[column] for row in rows if row[what] == end) for end in extremes(rows, what)
    )
    return low, high


def arrow(ends: tuple[float, float]) -> str:
    return " to ".join(map(auroc, ends))


STATEMENTS: dict[int, Statement] = {
    1: Statement("A Glow of CIFAR-10 tells SVHN by .9997", ("colour_glow",), street),
    2: Statement("It beats typicality on most pairs", ("statements", "evidence"), most_pairs),
    3: Statement("Squared norms are near chi-square, their logs near Normal", ("paper",), laws),
    4: Statement("Layers correlate weakly", ("paper",), weakly),
    5: Statement("Nothing has to be chosen, if Gaussians fit", ("statements",), nothing_to_choose),
    6: Statement("The score is the same however data are stored", ("paper",), represented),
    7: Statement("Foreign data have larger norms", ("statements",), larger),
    8: Statement("... since a step on them would change more", ("statements",), influential),
    9: Statement("On known data the likelihood is flat in the weights", ("statements",), flat),
    10: Statement(
        "Too little training or data breaks that", ("questions", "statements"), undertrained
    ),
    11: Statement("The Fisher metric is the right size of a gradient", ("statements",), metric),
    12: Statement("F is nearly diagonal (5 times)", ("paper", "statements"), diagonal),
    13: Statement("Strong off-diagonals break it", ("paper", "statements"), off_diagonal),
    14: Statement("Jointly layers tell more than their total", ("statements",), jointly),
    15: Statement(
        "Deep or narrow networks correlate and tell less", ("statements",), deep_or_narrow
    ),
}
