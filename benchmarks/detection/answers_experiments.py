"""Answers to statements 16 to 30: the path, trade-offs, experiments, open questions, data."""

from statistics import mean

from benchmarks.detection.answers import (
    COULD_NOT,
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
    gains,
    mean_of,
    of_cases,
    table_of,
    where,
)
from benchmarks.detection.answers_theory import form, method_of, rank_of, stages_of
from benchmarks.detection.domains import DIGITS
from benchmarks.detection.methods import LOG_P, PAPER
from benchmarks.detection.statements_norms import TYPICALITY
from benchmarks.harness.pages import auroc, percent, ratio


def path(results: Results) -> Answer:
    rows = where(results["evidence"], method=PAPER, group=1)
    good = [row["mean"] >= 0.9 for row in rows]
    return Answer(
        of_cases(good),
        f"Mean AUROC {auroc(mean_of(rows))}, above .9 on {sum(good)} of {len(good)} models; "
        f"{percent(mean(row['flagged'] for row in rows))} of known images flagged at .01",
    )


def full_or_norms(results: Results) -> Answer:
    rows = where(results["statements"], part="fisher structure")
    gram = [row["seconds a sample"]["gradients"] + row["seconds a sample"]["Gram"] for row in rows]
    norms = [row["norms, seconds a sample"] for row in rows]
    times = [a / b for a, b in zip(gram, norms, strict=True)]
    names = ("full, damping 1", "block, damping 1 by layer", "diagonal, damping 1 by layer")
    full, block, diagonal = (mean_of(form(results, name)) for name in names)
    layers = mean_of(form(results, "norms by layer"))
    ahead = [
        gain > EQUAL for gain in gains(form(results, names[0]), form(results, "norms by layer"))
    ]
    cheaper, as_good = min(times) > 1, max(full, block, diagonal) <= layers + EQUAL
    return Answer(
        [NOT_HERE, IN_PART, HOLDS][cheaper + as_good],
        f"{between(times, ratio)} times the time, "
        f"{between((row['gradients, MB'] for row in rows), whole)} MB; {auroc(full)} "
        f"(above the norms on {sum(ahead)} of {len(ahead)} models), by layer "
        f"{auroc(block)}, diagonal by layer {auroc(diagonal)}; norms {auroc(layers)}",
    )


def whole(value: float) -> str:
    return f"{value:.0f}"


def batches(results: Results) -> Answer:
    single, five = (table_of(results, PAPER, group) for group in (1, 5))
    better = [gain > 0 for gain in gains(five, single)]
    return Answer(
        of_cases(better),
        f"{auroc(mean_of(single))} for B = 1, {auroc(mean_of(five))} for 5; worst pairs "
        f"{auroc(worst(single))} and {auroc(worst(five))}",
    )


def worst(rows: list[Row]) -> float:
    return min(value for row in rows for value in row["auroc"].values())


def joined_by(results: Results) -> Answer:
    paper, fisher = (table_of(results, name) for name in (PAPER, "Fisher's method"))
    lead = gains(paper, fisher)
    return Answer(
        of_cases(gain >= -EQUAL for gain in lead),
        f"Joint density {auroc(mean_of(paper))}, Fisher's method {auroc(mean_of(fisher))}; by "
        f"model {between(lead)} apart",
    )


def signs(results: Results) -> Answer:
    correlation = by_model(where(results["paper"], shown="law"), "mean_correlation")
    found = by_model(table_of(results, PAPER))
    rank = rank_of([correlation[model] for model in found], list(found.values()))
    stages = where(results["questions"], question="undertraining")
    last = {row["model"]: row["steps"] for row in stages}
    early = [row for row in stages if row["steps"] < last[row["model"]]]
    named = mean(float(row["problems"] > 0) for row in early)
    return Answer(
        [NOT_HERE, IN_PART, HOLDS][(rank <= -0.5) + (named >= 0.9)],
        f"Rank correlation of layers' correlation and AUROC over {len(found)} models "
        f"{ratio(rank)}; `om.diagnose` names {percent(named)} of stages before the last",
    )


def histograms(results: Results) -> Answer:
    rows = where(results["colour_glow"], shown="layer", group=1)
    apart = [distance(row, name) for row in rows for name in foreign(row)]
    return Answer(
        of_cases(value >= 1 for value in apart),
        f"Of {len(rows)} random layers means lie {between(apart, ratio)} deviations apart",
    )


def foreign(row: Row) -> list[str]:
    return [name for name in row["mean_and_sd"] if name not in ("fit", "calibration", "test")]


def distance(row: Row, name: str) -> float:
    """Of a set's mean from the test images', in their standard deviations."""
    own, sd = row["mean_and_sd"]["test"]
    return float(abs(row["mean_and_sd"][name][0] - own) / sd)


def gaussians(results: Results) -> Answer:
    rows = where(results["colour_glow"], shown="layers")
    found = [row["ks_median"] for row in rows]
    chance = [row["ks_median_if_normal"] for row in rows]
    return Answer(
        HOLDS if max(found) <= 0.1 else NOT_HERE,
        f"Median distance {between(found)}, of Gaussian numbers {between(chance)}; largest "
        f"{between(row['ks_largest'] for row in rows)}",
    )


def batch_scores(results: Results) -> Answer:
    paper, typicality = (method_of(results, name, 5) for name in (PAPER, TYPICALITY))
    told = ", ".join(
        f"{name} {auroc(value)} and {auroc(typicality['auroc'][name])}"
        for name, value in paper["auroc"].items()
    )
    lead = [value - typicality["auroc"][name] for name, value in paper["auroc"].items()]
    return Answer(of_cases(gain >= -EQUAL for gain in lead), f"B = 5, score and typicality: {told}")


def other_kinds(results: Results) -> Answer:
    text = {(row["method"], row["features"]): row["mean"] for row in results["text"]}
    names = (("DiagonalGaussian", "tensor"), ("-log p", "none"), ("forward", "detector"))
    found = {"A byte language model": [text[name] for name in names]}
    if "audio" in results:
        found["Spectrograms of spoken digits (`audio`)"] = [
            mean_of(where(results["audio"], method=name)) for name in (PAPER, LOG_P, "forward")
        ]
    told = ". ".join(f"{kind}: {beside(values)}" for kind, values in found.items())
    lacking = "Video" if "audio" in results else "Audio and video"
    return Answer(
        IN_PART if max(values[0] for values in found.values()) >= 0.9 else NOT_HERE,
        f"{told}. {lacking}: no data here",
    )


def beside(found: list[float]) -> str:
    """Of the paper, low likelihood and the default."""
    paper, low, ours = map(auroc, found)
    return f"{paper}, - log p {low}, `forward` {ours}"


def how_many(results: Results) -> Answer:
    rows = where(results["statements"], part="layers")
    enough = [fewest(row) for row in rows]
    carry = ", ".join(f"{row['model']} {percent(row['carry'])}" for row in rows[:4])
    shares = [few / row["layers"] for few, row in zip(enough, rows, strict=True)]
    return Answer(
        of_cases(share <= 0.5 for share in shares),
        f"{min(enough)} to {max(enough)} evenly spaced layers of {between_layers(rows)} are within "
        f".01 of all. Above .9 alone: {carry}",
    )


def between_layers(rows: list[Row]) -> str:
    return between((row["layers"] for row in rows), whole)


def fewest(row: Row) -> int:
    """Evenly spaced layers from which on as many and more are no further than .01 below all."""
    by_number: dict[str, float] = row["evenly spaced"]
    last = list(by_number.values())[-1]
    short = [int(k) for k, value in by_number.items() if last - value > 0.01]
    return next(int(k) for k in by_number if int(k) > max(short, default=0))


def near(results: Results) -> Answer:
    rows = where(results["shifts"], shift="corruption", severity=3)
    paper, typicality = (by_name(rows, name) for name in (PAPER, TYPICALITY))
    corrupted = [row for row in results["forward"] if "corrupted" in row]
    ours = by_name(corrupted, "forward")
    return Answer(
        of_cases(value >= 0.9 for value in paper.values()),
        f"Fifteen corruptions, severity 3, by model: {between(paper.values())}; typicality "
        f"{between(typicality.values())}, `forward` {between(ours.values())}{others(results)}",
    )


def others(results: Results) -> str:
    """AUROC of digits of another source, by model."""
    if "domains" not in results:
        return ""
    paper, typicality, ours = (
        between(row["auroc"][DIGITS] for row in where(results["domains"], method=method))
        for method in (PAPER, TYPICALITY, "forward")
    )
    return (
        f". Digits that others wrote and scanned (`domains`): {paper}, typicality {typicality}, "
        f"`forward` {ours}"
    )


def by_name(rows: list[Row], method: str) -> dict[str, float]:
    return {row["model"]: row["mean"] for row in rows if row["method"] == method}


def other_models(results: Results) -> Answer:
    pixels = [row for row in table_of(results, PAPER) if row["model"] == "PixelCNN"]
    flows = where(results["no_law"], method=PAPER)
    named = {f"PixelCNN of {row['on']}": row["mean"] for row in pixels}
    named |= {row["model"]: row["mean"] for row in flows}
    splines = where(results.get("domains", []), method=PAPER, model="zuko NSF")
    named |= {f"{row['model']} of 8x8 (`domains`)": row["mean"] for row in splines}
    tables = where(results["tables"], method=PAPER)
    told = ", ".join(f"{name} {auroc(value)}" for name, value in named.items())
    return Answer(
        of_cases(value >= 0.9 for value in named.values()),
        f"{told}; flows of tables {auroc(mean_of_shifts(tables))}",
    )


def mean_of_shifts(rows: list[Row]) -> float:
    return mean(value for row in rows for value in row["auroc"].values())


def by_stage(results: Results) -> Answer:
    stages = stages_of(results["questions"])
    best = [max(found) <= found[-1] + EQUAL for found in stages.values()]
    told = "; ".join(
        f"{model} {', '.join(auroc(value) for value in found)}" for model, found in stages.items()
    )
    return Answer(of_cases(best), f"By steps: {told}")


def other_laws(results: Results) -> Answer:
    names = (
        "Student-t",
        "chi-square of fitted degrees",
        "one-class SVM",
        "joint Gaussian, half-shrunk",
    )
    paper = table_of(results, PAPER)
    better = [gain > EQUAL for gain in gains(table_of(results, names[0]), paper)]
    told = ", ".join(f"{name} {auroc(mean_of(table_of(results, name)))}" for name in names)
    return Answer(of_cases(better), f"Gaussian {auroc(mean_of(paper))}; {told}")


def data(results: Results) -> Answer:
    return Answer(
        f"{COULD_NOT}, because three of five sets cannot be had here",
        "SVHN, CelebA and ImageNet32; Chars74K stands for SVHN, CIFAR-100 for near natural images",
    )


STATEMENTS: dict[int, Statement] = {
    16: Statement("Train, fit Gaussians to held-out log norms, score jointly", ("evidence",), path),
    17: Statement(
        "Layer norms are as good as the full metric, and cheaper", ("statements",), full_or_norms
    ),
    18: Statement("Batches of five tell more than single samples", ("statements",), batches),
    19: Statement("A joint density is no worse than Fisher's method", ("statements",), joined_by),
    20: Statement(
        "Correlated layers and poor training are signs of failure",
        ("paper", "questions", "statements"),
        signs,
    ),
    21: Statement("Histograms of layers separate", ("colour_glow",), histograms),
    22: Statement("Gaussians fit the log norms", ("colour_glow",), gaussians),
    23: Statement(
        "A batch's joint score is no worse than typicality", ("colour_glow",), batch_scores
    ),
    24: Statement("Open: language, audio, video", ("text",), other_kinds),
    25: Statement("Open: how many layers; half of them suffice", ("statements",), how_many),
    26: Statement("Open: near shifts", ("shifts", "forward"), near),
    27: Statement(
        "Next: autoregressive models, other flows",
        ("statements", "no_law", "domains", "tables"),
        other_models,
    ),
    28: Statement("Next: more training detects more", ("questions",), by_stage),
    29: Statement("Next: Student-t is better than a Gaussian", ("statements",), other_laws),
    30: Statement("Data: SVHN, CelebA, GTSRB, CIFAR-10, ImageNet32", (), data),
}
