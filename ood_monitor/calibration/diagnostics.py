r"""Whether a model is fit to be watched, from held-out data alone.

The method rests on a model that has converged: under the model's own samples
:math:`E[\nabla_\theta \log p] = 0`, and what is left of a sample's gradient is its own. An
undertrained or diverged model has a gradient that all samples share. Its share of a sample's
squared gradient,

.. math:: \rho_l = \frac{E[g_l(x) \cdot g_l(x')]}{E[\lVert g_l(x) \rVert^2]}

for independent x and x', is 0 for a model that has converged on the data and 1 where all gradients
are alike. Samples are taken from different batches, each with its own noise, since noise that two
samples share is no flaw of the model.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    batch_size,
    checked_terms,
    map_tensors,
    reseeded,
)
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.checks import having
from ood_monitor.densities import Array, Density, ShrunkGaussian
from ood_monitor.densities.autologging import without_autologging
from ood_monitor.densities.baselines import effective_dof
from ood_monitor.densities.features import LogNorms, table
from ood_monitor.gradients.layers import Layers, checked_layers, selection
from ood_monitor.gradients.norms import gradient_norms
from ood_monitor.modules import Passes, device_of, dtype_of, leaf_parameters, scored

__all__ = ["Diagnosis", "diagnose"]

#: Beyond these a model or a fit is said to have a problem: rho in one of ten layers, shares of
#: dead and of badly fitted features, and what a fit, or scores under other noise, should reach.
_SHARED, _DEAD, _MISFITS, _KS, _NOISE = 0.2, 0.5, 0.2, 0.2, 0.2

#: How much likelier two populations must be than one, and how far apart.
_BIC, _ASHMAN = 10.0, 3.0


@dataclass(frozen=True)
class Diagnosis:
    """What held-out data say of a model and of the density of its gradient norms.

    Attributes:
        shared_gradient: rho of each parameter's gradient of the log-likelihood, at most 1, about 0
            or slightly below for a model that has converged.
        features: Number of features, "term/parameter".
        dropped: Why features were left out, ``{feature: "constant", "dead" or "not finite"}``.
        ks: Kolmogorov-Smirnov distance between the log norms of one half of the samples and a
            Normal fitted to the other, by feature, in [0, 1].
        effective_dof: Degrees of freedom of the chi-square law that a feature's spread asks for,
            beside the number of its parameter's elements, which the paper's argument says.
        mean_correlation: Mean absolute correlation between features: about 0 where the paper's
            independent layers hold.
        mixed: Share of the samples that score like another population, further off than the rest;
            0 if there is none.
        noise_correlation: Rank correlation of the scores under two draws of the adapter's noise,
            or None for an adapter without noise.
        problems: What is wrong, in words; empty if nothing was found.
    """

    shared_gradient: dict[str, float]
    features: int
    dropped: dict[str, str]
    ks: dict[str, float]
    effective_dof: dict[str, float]
    mean_correlation: float
    mixed: float
    noise_correlation: float | None
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.problems) or "No problem found."


def diagnose(
    adapter: Adapter,
    held_out: Iterable[Batch],
    *,
    layers: Layers = None,
    density: Density | None = None,
) -> Diagnosis:
    """Look for what makes scores of a model worthless: before fitting a detector, or instead.

    Makes a plain backward pass over the held-out data, and two or three of gradient norms.

    Args:
        adapter: The model.
        held_out: At least two batches of in-distribution samples that it was not trained on, 100
            samples or more in all.
        layers: Which parameters; all by default.
        density: Of the log norms; :class:`~ood_monitor.ShrunkGaussian` by default.

    Returns:
        What was found.

    Raises:
        ValueError: Fewer than two batches, or too few samples to fit the density on.
        TypeError: An option of another type.

    Example:
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=4, steps=1, hidden=4)
        >>> untrained_on = torch.rand(200, 1, 4, 4).split(50)
        >>> diagnosis = diagnose(om.LogLikelihood(flow), untrained_on)
        >>> print(diagnosis.problems[0].split(":")[0])
        Undertrained or diverged
    """
    layers = checked_layers(layers)
    if density is not None:
        having("density", density, "fit", "score")
    batches = [without_ignored(adapter, batch) for batch in held_out]
    if len(batches) < 2:
        raise ValueError(
            f"Expected at least two held-out batches, got {len(batches)}: give smaller ones, "
            "such as `samples.split(50)`."
        )
    shared = _shared_gradient(adapter, batches, layers)
    names, norms = _norms(adapter, batches, layers)
    log_norms = LogNorms.fit(names, norms, torch.finfo(dtype_of(adapter.module)).eps)
    features = log_norms(norms)
    scores = _scores(density or ShrunkGaussian(), features)
    again = None
    if hasattr(adapter, "seed"):
        other = log_norms(_norms(_with_noise(adapter, 1), batches, layers)[1])
        again = _scores(density or ShrunkGaussian(), other)
    found = Diagnosis(
        shared_gradient=shared,
        features=len(names),
        dropped=log_norms.dropped,
        ks=dict(zip(log_norms.live_names, _ks(features), strict=True)),
        effective_dof=dict(
            zip(log_norms.live_names, effective_dof(features).tolist(), strict=True)
        ),
        mean_correlation=_mean_correlation(features),
        mixed=_second_population(scores),
        noise_correlation=None if again is None else _rank_correlation(scores, again),
    )
    return replace(found, problems=(*_problems_of_model(found), *_problems_of_fit(found)))


class _Total(Adapter):
    """The sum of an adapter's terms as one."""

    def __init__(self, adapter: Adapter) -> None:
        self.module, self._adapter = adapter.module, adapter

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        values = [value for _, value in checked_terms(self._adapter, batch)]
        yield "log_likelihood", torch.stack(values).sum(0)


def _shared_gradient(adapter: Adapter, batches: list[Batch], layers: Layers) -> dict[str, float]:
    """Rho by parameter, over pairs of samples from different batches."""
    sums: dict[str, Tensor] = {}
    within: defaultdict[str, float] = defaultdict(float)
    squares: defaultdict[str, float] = defaultdict(float)
    for i, batch in enumerate(batches):
        total = _Total(_with_noise(adapter, i))
        for name, gradient in _gradients_of_sum(total, batch, layers).items():
            sums[name] = sums[name] + gradient if name in sums else gradient
            within[name] += float(gradient.square().sum())
        for key, values in gradient_norms(total, batch, layers=layers).items():
            squares[key.split("/", 1)[1]] += float(values.double().sum())
    sizes = np.array([batch_size(batch) for batch in batches])
    pairs = sizes.sum() ** 2 - np.square(sizes).sum()
    return {
        name: (float(gradient.square().sum()) - within[name]) / pairs / squares[name] * sizes.sum()
        for name, gradient in sums.items()
        if squares[name] > 0
    }


def _with_noise(adapter: Adapter, i: int) -> Adapter:
    """The adapter with its i-th noise, of which the first is its own."""
    return reseeded(adapter, getattr(adapter, "seed", 0) + i) or adapter


def _gradients_of_sum(total: _Total, batch: Batch, layers: Layers) -> dict[str, Tensor]:
    """The gradient of the batch's log-likelihood by parameter, in double precision."""
    selected, device = selection(total.module, layers), device_of(total.module)

    def gradients(passes: Passes[_Total]) -> dict[str, Tensor]:
        view = passes.fresh()
        with leaf_parameters(view.module) as named:
            leaves = {name: leaf for name, leaf in named.items() if selected(name)}
            ((_, values),) = view.log_likelihood(map_tensors(lambda t: t.to(device), batch))
            found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
        pairs = zip(leaves, found, strict=True)
        return {name: gradient.double() for name, gradient in pairs if gradient is not None}

    return scored(gradients, total, total.module)


def _norms(adapter: Adapter, batches: list[Batch], layers: Layers) -> tuple[tuple[str, ...], Array]:
    """Names of the features, and the norms of all samples, (N, F)."""
    tables = [table(gradient_norms(adapter, batch, layers=layers)) for batch in batches]
    return tables[0][0], np.concatenate([norms for _, norms in tables])


def _ks(features: Array) -> list[float]:
    """Of each feature's later half to a Normal fitted to its earlier one."""
    from scipy.stats import kstest

    fit, rest = np.array_split(features, 2)
    mean, sd = fit.mean(0), fit.std(0, ddof=1)
    columns = ((rest - mean) / sd).T
    return [float(kstest(column, "norm").statistic) for column in columns]


def _scores(density: Density, features: Array) -> Array:
    """Of the later half, under a fit to the earlier one."""
    fit, rest = np.array_split(features, 2)
    return copy.deepcopy(density).fit(fit).score(rest)


def _rank_correlation(one: Array, other: Array) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def _mean_correlation(features: Array) -> float:
    count = features.shape[1]
    if count == 1:
        return 0.0
    absolute = np.abs(np.corrcoef(features, rowvar=False))
    return float((absolute.sum() - count) / (count * (count - 1)))


def _second_population(scores: Array) -> float:
    """The share of the upper of two Normals, if two are far likelier than one and well apart.

    Ashman's D tells two populations from a long tail, which two Normals fit better than one too.
    """
    from sklearn.mixture import GaussianMixture

    z = ((scores - scores.mean()) / scores.std())[:, None]
    models = (GaussianMixture(k, n_init=3, reg_covar=1e-3, random_state=0) for k in (1, 2))
    with without_autologging():
        one, two = (model.fit(z) for model in models)
    means, variances = two.means_.ravel(), two.covariances_.ravel()
    apart = abs(means[0] - means[1]) * math.sqrt(2 / variances.sum())
    if one.bic(z) - two.bic(z) < _BIC or apart < _ASHMAN:
        return 0.0
    return float(two.weights_[means.argmax()])


def _problems_of_model(found: Diagnosis) -> Iterator[str]:
    upper = float(np.quantile(list(found.shared_gradient.values()), 0.9))
    if upper > _SHARED:
        yield (
            f"Undertrained or diverged: in a tenth of the layers {upper:.0%} or more of a sample's "
            f"squared gradient is shared by all samples (expected less than {_SHARED:.0%}): its "
            "norm says more of the model than of the sample. Train on, or check the training."
        )
    for why, share in (("not finite", 0.0), ("dead", _DEAD)):
        count = sum(reason == why for reason in found.dropped.values())
        if count > share * found.features:
            yield (
                f"{count} of {found.features} features are {why}: check the model and its "
                "precision."
            )


def _problems_of_fit(found: Diagnosis) -> Iterator[str]:
    poor = [name for name, distance in found.ks.items() if distance > _KS]
    if len(poor) > _MISFITS * len(found.ks):
        yield (
            f"The log norms of {len(poor)} of {len(found.ks)} features are not what a Normal says "
            f"that is fitted to the first half of the held-out samples (Kolmogorov-Smirnov above "
            f"{_KS}), such as {poor[0]!r}: the halves differ, or their tails are heavy."
        )
    if found.mixed:
        yield (
            f"Two populations: {found.mixed:.0%} of the held-out samples score apart from the "
            "others. If they are not what you call normal, take them out, or fit with `trim=`."
        )
    noise_correlation = found.noise_correlation
    if noise_correlation is not None and noise_correlation < _NOISE:
        yield (
            f"Scores depend on the noise: under another draw their rank correlation is "
            f"{noise_correlation:.2f} (expected at least {_NOISE}). Use more draws, or other noise "
            "levels."
        )
