"""Denoisers without noise: parts of two levels or three, beside gradient norms and other methods.

The committed UNets of Fashion-MNIST and of MNIST, and the kinds of `benchmarks.detection.kinds`,
whose images come with their label, and foreign ones with one that was drawn. The protocol is that
of `benchmarks.detection.forward`, with CIFAR-100 as a sixth set. A full run takes more than an
hour on one core, most of it gradient norms.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy.stats import gaussian_kde
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import datasets, kinds, methods, protocol, trained, zoo
from benchmarks.detection.forward import NEAR, corruptions, fitted, line, rows_of
from benchmarks.detection.protocol import Sizes
from benchmarks.detection.trained import Watched
from benchmarks.harness.measurement import claim, reported
from ood_monitor.densities import GaussianMixture
from ood_monitor.densities.measurements import Measurements, Table
from ood_monitor.detector.plan import planned
from ood_monitor.statistics import forward_statistics

Row = dict[str, Any]
Array = NDArray[np.float64]

#: What `benchmarks.detection.forward` compares of them, by its names; the first of ours is the
#: default, then with three levels, and with a null condition.
COMPARED = ("gradient_norms", "without noise", "output_layer", "energies", methods.PAPER)
OURS, THREE, CHECKED = "without noise", "three levels", "with null condition"

#: Noise to signal at the levels of peers: from little to much, the same for pixels and latents.
MSMA_RATIOS = {2: (0.015, 3.4), 10: (0.015, 0.33, 0.6, 0.9, 1.4, 2.1, 3.4, 5.8, 12.0, 35.0)}
SCOPED_RATIOS = (0.015, 1.25)

#: Whose corruptions are measured, as in `shifts`, and by what.
CORRUPTED, OF_CORRUPTIONS = "UNet", ["gradient_norms", OURS]

OURS_PARTS = ["output_layer", "energies"]

Make = Callable[..., om.Adapter]
Ratios = tuple[float, float]


def bound(unet: nn.Module, **options: Any) -> om.Adapter:
    return om.DenoisingBound(unet, trained.SCHEDULE, levels=(50, 500), **options)


def none_of(labelled: Tensor) -> dict[str, Tensor]:
    return {"class_labels": torch.full((len(labelled),), kinds.NONE, device=labelled.device)}


def rows(
    name: str, watched: Watched, make: Make, module: nn.Module, sets: Mapping[str, Tensor]
) -> Iterator[Row]:
    """All methods on a model; `make` gives its adapter, with options."""
    of_two = replace(watched, adapter=make)
    yield from rows_of(name, of_two, module, sets, list(COMPARED))
    of_three = replace(watched, adapter=functools.partial(make, ratios=3))
    for row in rows_of(name, of_three, module, sets, [OURS]):
        yield row | {"method": THREE}
    has_labels = name in kinds.kinds()
    if has_labels:
        checked = replace(watched, adapter=functools.partial(make, null_condition=none_of))
        yield from rows_of(name, checked, module, sets, [CHECKED])
    x = {of: watched.prepare(images) for of, images in sets.items()}
    is_latent = has_labels and kinds.kinds()[name].latent
    yield from others(name, make, module, x, (0.33, 3.4) if is_latent else (0.015, 3.4))
    if has_labels:
        yield from wrong_labels(name, make, module, x)


def others(
    name: str, make: Make, module: nn.Module, x: Mapping[str, Tensor], ratios: Ratios
) -> Iterator[Row]:
    """Parts of ours, at the ratios that it takes itself, and peers."""
    found = measured(make(module), x, OURS_PARTS)
    e_and_g = {of: only(it, ("/expected", "/norm")) for of, it in found.items()}
    adapters = [Energy(make(module, ratios=[ratio])) for ratio in ratios]
    tables = {
        "e and g": scores_of(e_and_g, ["output_layer"]),
        "32 groups a layer": scores_of(by_group(adapters, x, found), OURS_PARTS),
    }
    for count, chosen in MSMA_RATIOS.items():
        norms = {of: residual_norms(make(module, ratios=chosen), it) for of, it in x.items()}
        tables[f"MSMA, {count} levels"] = protocol.scored(GaussianMixture(), norms)
    tables["SCOPED"] = scoped(make(module, ratios=SCOPED_RATIOS), x)
    for method, scores in tables.items():
        yield {"model": name, "method": method} | protocol.judged(scores)


def measured(
    adapter: om.Adapter, x: Mapping[str, Tensor], parts: list[Any]
) -> dict[str, Measurements]:
    detector = om.Detector(adapter, parts=parts, chunk_size=methods.CHUNK)
    return {of: detector.measure(images) for of, images in x.items()}


def scores_of(found: Mapping[str, Measurements], parts: list[Any]) -> dict[str, Array]:
    joined = fitted(planned("diffusion", None, None, parts), found["fit"])
    return {of: joined.score(it) for of, it in found.items() if of != "fit"}


def only(found: Measurements, endings: tuple[str, ...]) -> Measurements:
    """The last layer's columns of these kinds alone."""
    table = found.tables["output_layer"]
    kept = [i for i, name in enumerate(table.names) if any(part in name for part in endings)]
    chosen = Table(tuple(table.names[i] for i in kept), table.values[:, kept])
    return replace(found, tables={"output_layer": chosen})


class Energy(om.Adapter):
    """The residual's energy at one level, as a term: so that `forward_statistics` has groups."""

    def __init__(self, bound: om.Adapter) -> None:
        self.module, self._bound = bound.module, bound

    def log_likelihood(self, batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, residual in self._bound.residuals(batch):
            yield name, -residual.square().flatten(1).sum(1) / 2


def by_group(
    adapters: list[Energy], x: Mapping[str, Tensor], found: Mapping[str, Measurements]
) -> dict[str, Measurements]:
    """With each layer's energies in 32 groups of channels, in place of one number a layer."""
    sums = {of: np.hstack([groups(adapter, it) for adapter in adapters]) for of, it in x.items()}
    floor = 0.01 * np.median(sums["fit"], 0)
    result = {}
    for of, it in found.items():
        table = it.tables["energies"]
        rest = [i for i, name in enumerate(table.names) if "/input." not in name]
        logs = np.log(sums[of] + floor + np.finfo(float).tiny)
        names = [f"energies/group[{i}]" for i in range(logs.shape[1])]
        whole = Table(
            (*names, *(table.names[i] for i in rest)), np.hstack([logs, table.values[:, rest]])
        )
        result[of] = replace(it, tables=dict(it.tables) | {"energies": whole})
    return result


def groups(adapter: om.Adapter, x: Tensor) -> Array:
    """Sums by layer and group, (N, G)."""
    parts = []
    for chunk in x.split(methods.CHUNK):
        norms = forward_statistics(adapter, chunk, sample=None, values=False).expected_norms
        parts.append(torch.cat([values.double() for values in norms.values()], 1))
    return np.asarray(torch.cat(parts).numpy())


@torch.no_grad()
def residual_norms(adapter: om.Adapter, x: Tensor) -> Array:
    """Logs of the score's norm by level, (N, L), up to a constant of each.

    References:
        Multiscale Score Matching for Out-of-Distribution Detection (Mahmood et al., 2021),
        https://arxiv.org/abs/2010.13132
    """
    parts = [
        torch.stack([r.flatten(1).norm(dim=1).log() for _, r in adapter.residuals(chunk)], 1)
        for chunk in x.split(methods.CHUNK)
    ]
    return np.asarray(torch.cat(parts).double().numpy())


def scoped(adapter: om.Adapter, x: Mapping[str, Tensor]) -> dict[str, Array]:
    """By kernels on ||s||^2 over the trace of s's derivative, at two levels, of which the larger.

    The trace is of one probe, the same for all samples.

    References:
        SCOPED (2025), https://arxiv.org/abs/2510.01456
    """
    found = {of: curvatures(adapter, images) for of, images in x.items()}
    scores: dict[str, Array] = {}
    for level in range(found["fit"].shape[1]):
        density = gaussian_kde(found["fit"][:, level])
        for of in found:
            own = -np.log(density(found[of][:, level]) + np.finfo(float).tiny)
            scores[of] = np.maximum(scores.get(of, -np.inf), own)
    return {of: it for of, it in scores.items() if of != "fit"}


def curvatures(adapter: om.Adapter, x: Tensor) -> Array:
    """The ratio by level, (N, L), its logarithm with its sign."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, 2, x.shape[1:], generator=generator).float() * 2 - 1
    parts = []
    for chunk in x.split(methods.CHUNK):
        chunk = chunk.clone().requires_grad_()
        found = []
        for _, r in adapter.residuals(chunk):
            v = probe[: r.shape[1]].expand_as(r)
            [product] = torch.autograd.grad((r * v).sum(), chunk)
            trace = (product[:, : r.shape[1]] * v).flatten(1).sum(1)
            ratio = r.detach().square().flatten(1).sum(1) / trace
            found.append(ratio.sign() * ratio.abs().log1p())
        parts.append(torch.stack(found, 1))
    return np.asarray(torch.cat(parts).double().numpy())


def wrong_labels(
    name: str, make: Make, module: nn.Module, x: Mapping[str, Tensor]
) -> Iterator[Row]:
    """A row for each method, of half of the test images against the others with another label."""
    half = len(x["test"]) // 2
    sets = {"fit": x["fit"], "test": x["test"][:half], "wrong": mislabelled(x["test"][half:])}
    plain, checked = make(module), make(module, null_condition=none_of)
    found = {
        "gradient_norms": scores_of(measured(plain, sets, ["gradient_norms"]), ["gradient_norms"]),
        OURS: scores_of(measured(plain, sets, OURS_PARTS), OURS_PARTS),
    }
    parts = [*OURS_PARTS, "condition"]
    found[CHECKED] = scores_of(measured(checked, sets, parts), parts)
    found["condition"] = scores_of(measured(checked, sets, ["condition"]), ["condition"])
    norms = {of: residual_norms(make(module, ratios=MSMA_RATIOS[2]), it) for of, it in sets.items()}
    found["MSMA, 2 levels"] = protocol.scored(GaussianMixture(), norms)
    for method, scores in found.items():
        value = round(protocol.auroc(scores["test"], scores["wrong"]), 4)
        yield {"model": name, "method": method, "wrong_label": value}


def mislabelled(labelled: Tensor) -> Tensor:
    """The same samples, each with another label, drawn."""
    x, labels = kinds.parted(labelled)
    generator = torch.Generator().manual_seed(1)
    other = torch.randint(1, kinds.NONE, (len(labels),), generator=generator)
    return kinds.with_labels(x, (labels + other) % kinds.NONE)


def full(data: Path, names: list[str]) -> Iterator[Row]:
    further = {
        name: trained.drawn(datasets.harmonised(datasets.read(data, name, "test")), Sizes().ood)
        for name in datasets.NEAR_CIFAR
    }
    for on in zoo.TRAINED_ON:
        sets = protocol.sets(data, on, Sizes()) | further
        for name, watched, make, file in models(data, on, names):
            module, facts = zoo.load(watched, file)
            for row in rows(name, watched, make, module.eval(), sets):
                yield {"on": on, "training": facts} | row
            if (on, name) == (kinds.ON, CORRUPTED):
                for row in corruptions(name, watched, module, sets, OF_CORRUPTIONS):
                    yield {"on": on} | row


def models(data: Path, on: str, names: list[str]) -> Iterator[tuple[str, Watched, Make, Path]]:
    """Each with what makes its adapter, and its weights."""
    if CORRUPTED in names:
        yield CORRUPTED, zoo.zoo()[CORRUPTED], bound, zoo.weights_file(on, CORRUPTED)
    chosen = [name for name in kinds.kinds() if name in names]
    if on == kinds.ON and chosen:
        for name, watched in kinds.every(data, chosen).items():
            make = functools.partial(kinds.bound, kinds.kinds()[name], levels=(50, 500))
            yield name, watched, make, kinds.weights_file(name)


def tiny() -> tuple[Watched, nn.Module, dict[str, Tensor], Any]:
    """A model of digits, trained for seconds, the sets that it is judged on, and facts of that."""
    sets = protocol.digits()
    images = sets.pop("train")
    torch.manual_seed(0)
    watched = trained.tiny()[CORRUPTED]
    module = watched.make()
    facts = trained.train(module, watched, images)
    return watched, module.eval(), sets, facts


def quick() -> Iterator[Row]:
    watched, module, sets, facts = tiny()
    for row in rows(CORRUPTED, watched, bound, module, sets):
        yield {"on": "digits", "training": facts} | row


def told(row: Row) -> str:
    if "wrong_label" in row:
        head = f"{row['on']:14}{row['model']:20}{row['method']:24}"
        return f"{head}wrong label  {row['wrong_label']:.4f}"
    return line(row)


def claims(rows: list[Row]) -> list[Row]:
    """What was to be reached, of the models at hand."""
    ours = [row for row in rows if "auroc" in row and row["method"] == OURS]
    unets = [row for row in ours if row["model"] == CORRUPTED]
    latents = [row for row in ours if row["model"] != CORRUPTED]
    found = []
    if unets:
        found.append(claim("UNets: 1 - mean AUROC of pairs", missing(map(five, unets)), 0.001))
    near = [{n: row["auroc"][n] for n in NEAR if n in row["auroc"]} for row in unets]
    if any(near):
        found.append(claim("UNets: 1 - mean AUROC of near pairs", missing(near), 0.004))
    if latents:
        missed = missing(map(five, latents))
        found.append(claim("kinds: 1 - mean AUROC of five sets", missed, 0.003))
    found += of_further(ours)
    for row in rows:
        if "wrong_label" in row and row["method"] == CHECKED:
            value = round(1 - row["wrong_label"], 4)
            found.append(claim(f"{row['model']}: 1 - AUROC of wrong labels, checked", value, 0.07))
        if "corrupted" in row and row["method"] == OURS:
            value = round(1 - row["mean"], 4)
            found.append(claim("UNet: 1 - mean AUROC of corruptions", value, 0.07))
    cost = max(max(row["forwards"].values()) for row in ours)
    found.append(claim("plain forward passes a score", cost, 2.2))
    memory = [row["memory"] for row in ours if row["memory"] is not None]
    if memory:
        found.append(claim("peak memory of a score in that of a plain pass", max(memory), 1.1))
    return found


def of_further(ours: list[Row]) -> list[Row]:
    sets = [{n: v for n, v in row["auroc"].items() if n in datasets.NEAR_CIFAR} for row in ours]
    text = f"1 - mean AUROC of {', '.join(datasets.NEAR_CIFAR)}, by which nothing was chosen"
    return [claim(text, missing(sets), 0.005)] if any(sets) else []


def five(row: Row) -> dict[str, float]:
    return {name: v for name, v in row["auroc"].items() if name not in datasets.NEAR_CIFAR}


def missing(aurocs: Any) -> float:
    """What the mean of all is short of 1."""
    values = [value for each in aurocs for value in each.values()]
    return round(1 - statistics.mean(values), 4)


def main(
    quick_run: Annotated[
        bool, typer.Option("--quick", help="A tiny model of 8x8 digits; needs no files.")
    ] = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    if not quick_run:
        datasets.require(data_dir, datasets.EVERY)
    names = model or [CORRUPTED, *kinds.kinds()]
    found = quick() if quick_run else full(data_dir, names)
    reported(found, told, claims, output, sizes=vars(Sizes()))


if __name__ == "__main__":
    typer.run(main)
