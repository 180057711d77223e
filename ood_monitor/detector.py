"""The detector: adapter, gradient norms, density and calibration, composed."""

import copy
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ood_monitor.adapters.base import Adapter, Batch, batch_size, describe, tensors_in
from ood_monitor.calibration import (
    MINIMUM_SCORES,
    ConformalPValue,
    GroupedPValue,
    autocorrelation_bound,
    lag1_autocorrelation,
)
from ood_monitor.densities import Array, Density, TermsAndNorms
from ood_monitor.features import Features, LogNorms, TermValues, layer_of, table
from ood_monitor.fitted import Fitted, digest
from ood_monitor.gradients import Granularity, terms_and_norms
from ood_monitor.gradients.layers import Layers, selection
from ood_monitor.gradients.scoring import dtype_of
from ood_monitor.measured import Measured
from ood_monitor.scores import Scores

__all__ = ["Detector", "Groups"]

#: Gives the group of each sample of a batch.
Groups: TypeAlias = Callable[[Batch], Tensor | Sequence[Any]]


class Detector:
    """Scores how unlike its training data a model finds a sample.

    Args:
        adapter: The model.
        density: Of the log squared norms, and of nothing else but for the default, which is
            :class:`~ood_monitor.TermsAndNorms`.
        layers: Which parameters are features; all by default.
        granularity: ``"tensor"`` as in the paper, or ``"row"``.
        chunk_size: Samples per pass, to bound memory.
        calibration_fraction: Share of the held-out samples that calibrates; the rest fits.
        trim: Share of the fit samples, the most anomalous, that are left out when the density is
            fitted again: for held-out data with foreign samples among them. Calibration samples are
            never left out; foreign ones make p-values larger, so that fewer samples are flagged.
        seed: Of the random split into fit and calibration samples.
        groups: Gives each sample's group, a tensor (B,) or a sequence, from the tensors of a batch:
            its class, prompt class, tenant. P-values are then within groups; the drift test looks
            at the whole stream. See :class:`~ood_monitor.calibration.GroupedPValue`.
        minimum_group: The fewest calibration samples that make a group of its own.
        source: Where the held-out samples come from, in words; it is saved with the detector.

    Raises:
        ValueError: ``calibration_fraction`` is not between 0 and 1, or ``trim`` not in [0, 0.5).
        TypeError: ``chunk_size`` or ``seed`` is no integer.

    Example:
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=8, levels=1, steps=1, hidden=4)
        >>> held_out = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> detector = om.Detector(om.LogLikelihood(flow)).fit([held_out], progress=False)
        >>> scores = detector.score(torch.zeros(2, 1, 8, 8))  # blank images
        >>> bool((scores.p_value < 0.05).all())
        True
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        density: Density | None = None,
        layers: Layers = None,
        granularity: Granularity = "tensor",
        chunk_size: int | None = None,
        calibration_fraction: float = 0.5,
        trim: float = 0.0,
        seed: int = 0,
        groups: Groups | None = None,
        minimum_group: int = 100,
        source: str = "",
    ) -> None:
        if not 0 < calibration_fraction < 1:
            raise ValueError(
                f"Expected calibration_fraction between 0 and 1, got {calibration_fraction}."
            )
        if not 0 <= trim < 0.5:
            raise ValueError(f"Expected a share to trim in [0, 0.5), got {trim}.")
        self.adapter, self.trim = adapter, float(trim)
        self.layers, self.granularity = layers, granularity
        # Python's own numbers, since these go into a file.
        self.chunk_size = None if chunk_size is None else operator.index(chunk_size)
        self.calibration_fraction, self.seed = float(calibration_fraction), operator.index(seed)
        self.groups, self.minimum_group = groups, operator.index(minimum_group)
        self.source = source
        self._density = TermsAndNorms() if density is None else density
        self._fitted: Fitted | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` has succeeded or a fitted detector was loaded."""
        return self._fitted is not None

    @property
    def fitted(self) -> Fitted:
        """What was learned.

        Raises:
            RuntimeError: Not fitted.
        """
        if self._fitted is None:
            raise RuntimeError("Expected a fitted detector, got one without fit: call `fit` first.")
        return self._fitted

    def fit(self, held_out: Iterable[Batch], *, progress: bool = True) -> Self:
        """Fit the density on a part of held-out data, and calibrate on the rest.

        Args:
            held_out: Batches of in-distribution data that the model was *not* trained on.
            progress: Show a progress bar.

        Returns:
            The detector itself; unchanged if anything is raised.

        Raises:
            ValueError: No batch, a single tensor, too few samples, one that is not finite, or a
                model that :func:`~ood_monitor.gradient_norms` refuses.

        Warns:
            UserWarning: Neighbouring calibration scores are positively correlated, which breaks the
                promise of every false-alarm rate. Sound data give it less than once in 1000 fits.
        """
        if isinstance(held_out, Tensor):  # iterable too, but over samples
            raise ValueError(
                f"Expected an iterable of batches, got {describe(held_out)}: pass `[tensor]`, or a "
                "loader."
            )
        bar = tqdm(held_out, desc="gradient norms", unit="batch", disable=not progress)
        self._fitted = self._fit(Measured.together(self.measure(batch) for batch in bar))
        return self

    def measure(self, batch: Batch) -> Measured:
        """What :meth:`fit` asks of a batch of B held-out samples, to gather before fitting.

        So several processes can each measure a part, and all fit the same detector.

        Raises:
            ValueError: A batch or a model that :func:`~ood_monitor.gradient_norms` refuses.
        """
        result = terms_and_norms(
            self.adapter,
            batch,
            layers=self.layers,
            granularity=self.granularity,
            chunk_size=self.chunk_size,
        )
        features, norms = table(result.norms)
        terms, values = table(result.log_likelihood)
        groups = () if self.groups is None else _named(self.groups(batch), len(norms))
        return Measured(terms, values, features, norms, _samples(batch), groups)

    def fit_measured(self, measured: Measured) -> Self:
        """:meth:`fit`, of held-out samples that :meth:`measure` has seen.

        Returns:
            The detector itself; unchanged if anything is raised.

        Raises:
            ValueError: As :meth:`fit`.

        Warns:
            UserWarning: As :meth:`fit`.
        """
        self._fitted = self._fit(measured)
        return self

    def score(self, batch: Batch) -> Scores:
        """Score B samples; the model is left as it was.

        Args:
            batch: As the held-out batches were; labels that the adapter does not take may be left
                out, or come on top.

        Returns:
            Scores, p-values and what each layer says.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: The batch has other shapes or types than the held-out data, is empty, or
                holds a value that is not finite.
        """
        fitted = self.fitted
        self.check(batch)
        measured = self.measure(batch)
        features = fitted.features(measured)
        parts = fitted.density.contributions(features)
        score = parts.sum(1)
        names = fitted.features.names
        means, shares = _by_layer(names, features, np.mean), _by_layer(names, parts, np.sum)
        return Scores(
            score=torch.from_numpy(score),
            p_value=torch.from_numpy(_p_value(fitted, score, measured.groups)),
            log_likelihood=torch.from_numpy(measured.log_likelihood.sum(1)),
            layers=_columns(fitted.layers, shares),
            z=_columns(fitted.layers, (means - fitted.layer_mean) / fitted.layer_sd),
            valid=torch.from_numpy(~np.isnan(score)),
        )

    def check(self, batch: Batch) -> None:
        """Refuse a batch that cannot be scored for its shapes or types; values do not matter.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: An empty batch, or other shapes or types than the held-out data.
        """
        if batch_size(batch) == 0:
            raise ValueError(f"Expected samples, got 0: {describe(batch)}.")
        _check_samples(batch, self.fitted.samples)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write ``detector.safetensors`` and ``config.json``; the model itself is not saved.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: ``layers`` is a function, which no file can hold; give name patterns.
        """
        self.fitted.save(Path(directory), self._options())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        adapter: Adapter,
        *,
        groups: Groups | None = None,
    ) -> Self:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            directory: The folder.
            adapter: The model that the detector was fitted on.
            groups: What gave the groups, if it was fitted with any.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A damaged file, a newer format, a model with other layers, or groups where
                there were none, or none where there were.

        Warns:
            UserWarning: The model's weights are not those that the detector was fitted on, so the
                calibration is stale.
        """
        return cls._restored(*Fitted.load(Path(directory)), adapter, groups)

    def state_dict(self) -> dict[str, str | bytes]:
        """What :meth:`save_pretrained` writes, as primitives for a checkpoint.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: ``layers`` is a function.
        """
        config, tensors = self.fitted.dump(self._options())
        return {"config": config, "tensors": tensors}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], adapter: Adapter, *, groups: Groups | None = None
    ) -> Self:
        """The detector whose :meth:`state_dict` this is; see :meth:`from_pretrained`.

        Raises:
            ValueError: As there.
        """
        missing = sorted({"config", "tensors"} - state.keys())
        if missing:
            raise ValueError(f"Expected the state of a detector, got one without {missing}.")
        return cls._restored(*Fitted.parse(state["config"], state["tensors"]), adapter, groups)

    @classmethod
    def _restored(
        cls, fitted: Fitted, options: dict[str, Any], adapter: Adapter, groups: Groups | None
    ) -> Self:
        if (fitted.grouped is None) != (groups is None):
            was, given = (
                "with" if it is not None else "without" for it in (fitted.grouped, groups)
            )
            raise ValueError(
                f"Expected `groups` as the detector was fitted, {was} groups, got it {given}."
            )
        _check_layers(fitted.parameters, _parameters(adapter, options.get("layers")))
        if digest(adapter.module) != fitted.model:
            warnings.warn(
                f"Stale calibration: the detector was fitted on weights {fitted.model}, the model "
                f"has {digest(adapter.module)}. Fit it again on held-out data.",
                stacklevel=3,
            )
        detector = cls(adapter, density=fitted.density, groups=groups, **options)
        detector._fitted = fitted
        return detector

    def _options(self) -> dict[str, Any]:
        if callable(self.layers):
            raise ValueError("Expected layers as name patterns to save, got a function.")
        names = (
            *("layers", "granularity", "chunk_size"),
            *("calibration_fraction", "trim", "seed", "minimum_group", "source"),
        )
        return {name: getattr(self, name) for name in names}

    def _fit(self, measured: Measured) -> Fitted:
        fit, calibrate = self._split(len(measured))
        dtype = dtype_of(self.adapter.module)
        eps = torch.finfo(dtype).eps
        seen, rest = self._trimmed(measured.take(fit), eps), measured.take(calibrate)
        features, density = self._learned(seen, eps)
        scores = density.score(features(rest))
        _warn_of_autocorrelation(scores)
        means = _by_layer(features.names, features(seen), np.mean)
        return Fitted(
            features=features,
            density=density,
            calibration=ConformalPValue.fit(scores),
            log_likelihood=rest.log_likelihood.sum(1),
            parameters=_parameters(self.adapter, self.layers),
            layer_mean=means.mean(0),
            layer_sd=np.maximum(means.std(0, ddof=1), eps),
            samples=measured.samples,
            model=digest(self.adapter.module),
            dtype=str(dtype),
            fit_count=len(seen),
            grouped=self._grouped(scores, rest.groups),
        )

    def _trimmed(self, samples: Measured, eps: float) -> Measured:
        """Without the most anomalous samples under a fit to all."""
        if not self.trim:
            return samples
        features, density = self._learned(samples, eps)
        scores = density.score(features(samples))
        return samples.take(np.flatnonzero(scores <= np.quantile(scores, 1 - self.trim)))

    def _learned(self, samples: Measured, eps: float) -> tuple[Features, Density]:
        """What is a feature of these samples, and the density fitted to them."""
        log_norms = LogNorms.fit(samples.features, samples.norms, eps)
        density = copy.deepcopy(self._density)
        features = Features(log_norms)
        if isinstance(density, TermsAndNorms):
            terms = TermValues.fit(samples.terms, samples.log_likelihood, eps)
            density, features = density.of(int(terms.live.sum())), Features(log_norms, terms)
        return features, density.fit(features(samples))

    def _grouped(self, scores: Array, groups: tuple[str, ...]) -> GroupedPValue | None:
        return None if self.groups is None else GroupedPValue(scores, groups, self.minimum_group)

    def _split(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices, disjoint: a random part to fit on, and the rest to calibrate; each in order."""
        calibration = round(count * self.calibration_fraction)
        fit = count - calibration
        if fit < self._density.minimum_samples or calibration < MINIMUM_SCORES:
            raise ValueError(
                f"Expected at least {self._density.minimum_samples} samples to fit on and "
                f"{MINIMUM_SCORES} to calibrate, got {fit} and {calibration} of {count} held-out "
                f"samples at calibration_fraction={self.calibration_fraction}."
            )
        chosen = np.zeros(count, dtype=bool)
        chosen[np.random.default_rng(self.seed).permutation(count)[:fit]] = True
        return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _named(groups: Tensor | Sequence[Any], count: int) -> tuple[str, ...]:
    """Groups as text, which a file can hold."""
    values = groups.tolist() if isinstance(groups, Tensor) else groups
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"Expected one group for each of {count} samples, got {values!r}.")
    return tuple(map(str, values))


def _p_value(fitted: Fitted, score: Array, groups: tuple[str, ...]) -> Array:
    if fitted.grouped is None:
        return fitted.calibration.p_value(score)
    return fitted.grouped.p_value(score, groups)


def _samples(batch: Batch) -> tuple[str, ...]:
    """Shape and type of each tensor of a batch, without B."""
    return tuple(f"{tuple(t.shape[1:])} {t.dtype}" for t in tensors_in(batch))


def _check_samples(batch: Batch, expected: tuple[str, ...]) -> None:
    found = _samples(batch)
    # What only one of them has, such as labels, is for the adapter to take or to miss.
    if any(a != b for a, b in zip(found, expected, strict=False)):
        raise ValueError(
            f"Expected samples as the detector was fitted on, {', '.join(expected)}, got "
            f"{', '.join(found)}."
        )


def _parameters(adapter: Adapter, layers: Layers) -> dict[str, tuple[int, ...]]:
    """Shapes of the chosen parameters, in module order."""
    chosen = selection(adapter.module, layers)
    named = adapter.module.named_parameters()
    return {name: tuple(p.shape) for name, p in named if chosen(name)}


def _check_layers(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"Expected a model with the detector's layers, got {name!r} of shape "
                f"{found.get(name, 'missing')} where the detector has "
                f"{expected.get(name, 'none')}."
            )


def _by_layer(names: tuple[str, ...], columns: Array, how: Any) -> Array:
    """Columns (N, F) brought together by layer, (N, L)."""
    positions: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        positions.setdefault(layer_of(name), []).append(i)
    return np.stack([how(columns[:, at], axis=1) for at in positions.values()], 1)


def _columns(names: tuple[str, ...], values: Array) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values[:, i].copy()) for i, name in enumerate(names)}


def _warn_of_autocorrelation(scores: Array) -> None:
    found, bound = lag1_autocorrelation(scores), autocorrelation_bound(len(scores))
    if found > bound:
        warnings.warn(
            f"Neighbouring calibration scores are correlated ({found:.2f}, expected at most "
            f"{bound:.2f}): p-values and drift alarms assume exchangeable samples. Shuffle the "
            "held-out data, or calibrate on independent units.",
            stacklevel=4,
        )
