"""From what was measured of held-out samples to what a detector learned."""

import logging
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ood_monitor.adapters.base import Adapter
from ood_monitor.calibration.conformal import (
    MINIMUM_SCORES,
    ConformalPValue,
    autocorrelation_bound,
    check_scores,
    lag1_autocorrelation,
)
from ood_monitor.calibration.groups import GroupedPValue, large_groups
from ood_monitor.calibration.usual import Usual
from ood_monitor.densities import Array
from ood_monitor.densities.features import layer_of
from ood_monitor.densities.joined import Joined, minimum_samples
from ood_monitor.densities.measurements import GRADIENT_NORMS, Measurements
from ood_monitor.detector.compatibility import parameters_of
from ood_monitor.detector.plan import Plan
from ood_monitor.gradients.layers import Layers
from ood_monitor.modules import dtype_of
from ood_monitor.saving.fingerprints import digest
from ood_monitor.saving.fitted import Fitted
from ood_monitor.saving.probe import Probe
from ood_monitor.saving.provenance import Provenance
from ood_monitor.statistics.png import PNG_BITS

__all__ = ["Fitting", "recalibrated"]

#: The share of samples above which what is not finite is a column's fault.
_MANY = 0.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitting:
    """How a detector learns; attributes are the arguments of :class:`~ood_monitor.Detector`.

    Attributes:
        plan: What is measured, and its parts, unfitted.
        layers: Which parameters are features.
        calibration_fraction: Share of the samples that calibrates.
        trim: Share of the fit samples that is left out.
        seed: Of the split.
        groups_of_adapter: Whether it is the adapter that told their groups, if they have any.
        minimum_group: The fewest calibration samples to be expected of a group of its own.
    """

    plan: Plan
    layers: Layers
    calibration_fraction: float
    trim: float
    seed: int
    groups_of_adapter: bool
    minimum_group: int

    def __call__(self, adapter: Adapter, measured: Measurements) -> Fitted:
        """The detector's part that is learned.

        Raises:
            ValueError: Too few samples, or no feature that varies.

        Warns:
            UserWarning: Neighbouring calibration scores are positively correlated.
        """
        usual = self._usual(adapter, measured)
        measured = _finite(measured)
        _tell_of_copies(measured)
        fit, calibrate = self._split(len(measured))
        if self.plan.has("gradient_norms"):
            _tell_of_no_gradient(measured)
        dtype = dtype_of(adapter.module)
        eps = torch.finfo(dtype).eps
        seen, rest = self._trimmed(measured.take(fit), eps), measured.take(calibrate)
        joined = Joined.fit(self.plan.parts, seen, eps)
        scores = joined.score(rest)
        calibration = ConformalPValue.fit(scores)
        grouped = self._grouped(scores, rest.groups, measured.take(fit).groups)
        _warn_of_autocorrelation(scores, grouped)
        means = joined.means_by_layer(joined.features(seen))
        return Fitted(
            joined=joined,
            method=self.plan.method,
            sample=self.plan.sample,
            reason=self.plan.reason,
            calibration=calibration,
            log_likelihood=rest.total,
            parameters=parameters_of(adapter, self.layers),
            layer_mean=means.mean(0),
            layer_sd=np.maximum(means.std(0, ddof=1), eps),
            samples=measured.samples,
            model=digest(adapter.module),
            dtype=str(dtype),
            fit_count=len(seen),
            grouped=grouped,
            groups_of_adapter=grouped is not None and self.groups_of_adapter,
            usual=usual,
            probe=Probe.of(rest.names, scores, _indices(grouped, rest)),
            provenance=Provenance.of(adapter, measured.terms, _counts(measured)),
        )

    def _usual(self, adapter: Adapter, measured: Measurements) -> Usual | None:
        samples = measured.explaining
        if samples is None:
            return None
        norms = measured.tables.get(GRADIENT_NORMS)
        if samples.norms is None and not samples.without and norms is not None:
            samples = replace(samples, norms=norms, count=len(measured))
        usual = Usual.of(samples, torch.finfo(dtype_of(adapter.module)).eps)
        if not usual.layers:
            _log.warning("Fitted without explanation by layer: %s [OOD110]", usual.without)
        return usual

    def _trimmed(self, samples: Measurements, eps: float) -> Measurements:
        """Without the most anomalous samples under a fit to all."""
        if not self.trim:
            return samples
        scores = Joined.fit(self.plan.parts, samples, eps).score(samples)
        return samples.take(np.flatnonzero(scores <= np.quantile(scores, 1 - self.trim)))

    def _grouped(
        self, scores: Array, calibrate: tuple[str, ...], fit: tuple[str, ...]
    ) -> GroupedPValue | None:
        """Scores by group; labels of samples that calibrate nothing say which groups are large."""
        if not calibrate:
            return None
        odds = self.calibration_fraction / (1 - self.calibration_fraction)
        large = large_groups(fit, self.minimum_group / odds)
        if not large:
            _log.warning(
                "No group of the %d has %d calibration samples, so that all are one group. "
                "[OOD107]",
                len({*calibrate, *fit}),
                self.minimum_group,
            )
        elif self.groups_of_adapter and (small := sorted({*calibrate, *fit} - {*large})):
            _log.warning(
                "Fewer than %d calibration samples, so no group of their own: %s. [OOD107]",
                self.minimum_group,
                ", ".join(small),
            )
        return GroupedPValue(scores, calibrate, large)

    def sizes(self, count: int) -> tuple[int, int]:
        """How many of `count` held-out samples fit, and how many calibrate.

        Raises:
            ValueError: They are too few.
        """
        calibration = round(count * self.calibration_fraction)
        fit = count - calibration
        fewest = minimum_samples(self.plan.parts)
        if fit < fewest or calibration < MINIMUM_SCORES:
            raise ValueError(
                f"Expected at least {fewest} samples to fit on and "
                f"{MINIMUM_SCORES} to calibrate, got {fit} and {calibration} of {count} held-out "
                f"samples at calibration_fraction={self.calibration_fraction}: give more."
            )
        return fit, calibration

    def _split(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices, disjoint: a random part to fit on, and the rest to calibrate; each in order."""
        fit, _ = self.sizes(count)
        chosen = np.zeros(count, dtype=bool)
        chosen[np.random.default_rng(self.seed).permutation(count)[:fit]] = True
        return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _finite(measured: Measurements) -> Measurements:
    """Without the samples of which something is not finite, each named by its place.

    What is not finite in many samples is a column's fault, and no sample's. So are bits of an image
    with values outside the range that it is shown in. Such a column is wholly nan, so that it is
    left out wherever the samples that show it fall.
    """
    terms = np.isfinite(measured.log_likelihood)
    sound: NDArray[np.bool_] = (terms | (terms.mean(0) < 1 - _MANY)).all(1)
    tables, left_out = dict(measured.tables), list[str]()
    for kind, table in measured.tables.items():
        finite = np.isfinite(table.values)
        bits = np.array([name == f"{kind}/{PNG_BITS}" for name in table.names], dtype=bool)
        of_many = ~bits & (finite.mean(0) < 1 - _MANY)
        of_column = of_many | (bits & ~finite.all(0))
        sound &= (finite | of_column).all(1)
        tables[kind] = replace(table, values=np.where(of_column, np.nan, table.values))
        left_out += np.array(table.names, dtype=object)[of_many].tolist()
    measured = replace(measured, tables=tables)
    if left_out:
        _log.warning(
            "Left out, as they are not finite in more than one held-out sample of twenty: %s%s. "
            "[OOD104]",
            ", ".join(left_out[:20]),
            f" and {len(left_out) - 20} more" if len(left_out) > 20 else "",
        )
    if sound.all():
        return measured
    _log.warning(
        "Left out of the held-out samples, as something of them is not finite: %d of %d, at "
        "%s. [OOD103]",
        (~sound).sum(),
        len(sound),
        np.flatnonzero(~sound)[:20].tolist(),
    )
    return measured.take(np.flatnonzero(sound))


def _counts(measured: Measurements) -> dict[str, int]:
    """How many different values there are of each condition."""
    return {name: len(values) for name, values in measured.conditions.items()}


def _tell_of_no_gradient(measured: Measurements) -> None:
    """Name the parameters whose gradient is zero for every sample; zero is no norm to watch."""
    without = (measured.norms == 0).all(0)
    parameters: dict[str, bool] = {}
    for name, is_zero in zip(measured.features, without, strict=True):
        parameter = layer_of(name).split("/", 1)[1]
        parameters[parameter] = parameters.get(parameter, True) and bool(is_zero)
    found = [name for name, is_zero in parameters.items() if is_zero]
    if found:
        _log.warning(
            "No gradient for any of the %d held-out samples, so not watched: %s. The likelihood "
            "does not use them, something multiplies them by zero, or the model keeps what it has "
            "computed from them between calls. [OOD106]",
            len(measured),
            ", ".join(found),
        )


def recalibrated(fitted: Fitted, measured: Measurements) -> Fitted:
    """What was learned, with calibration scores of other samples.

    Raises:
        ValueError: Fewer than :data:`~ood_monitor.calibration.conformal.MINIMUM_SCORES` samples
            that can be scored.

    Warns:
        UserWarning: Neighbouring calibration scores are positively correlated.
    """
    _tell_of_copies(measured)
    scores = fitted.joined.score(measured)
    known = np.flatnonzero(np.isfinite(scores))
    if len(known) < len(scores):
        _log.warning(
            "Left out, as they have no finite score: %d of %d samples. [OOD105]",
            len(scores) - len(known),
            len(scores),
        )
    scores, measured = check_scores(scores[known]), measured.take(known)
    calibration, grouped = ConformalPValue.fit(scores), fitted.grouped
    if grouped is not None:
        grouped = GroupedPValue(scores, measured.groups, grouped.large)
    _warn_of_autocorrelation(scores, grouped)
    return replace(
        fitted,
        calibration=calibration,
        grouped=grouped,
        log_likelihood=measured.total,
        probe=Probe.of(measured.names, scores, _indices(grouped, measured)),
    )


def _indices(grouped: GroupedPValue | None, measured: Measurements) -> NDArray[np.int64] | None:
    return None if grouped is None else grouped.indices(measured.groups, len(measured))


def _tell_of_copies(measured: Measurements) -> None:
    """Copies make a calibration look larger than it is."""
    copies = len(measured.names) - len(set(measured.names))
    if copies:
        _log.warning(
            "%d of %d held-out samples are copies of others: unless samples repeat themselves by "
            "nature, normal ones are flagged more often than at fpr. Leave one of each. "
            "[OOD102]",
            copies,
            len(measured.names),
        )


def _warn_of_autocorrelation(scores: Array, grouped: GroupedPValue | None) -> None:
    """Of scores in their order; of groups by the ranks within each, which is what is promised."""
    if grouped is not None:
        scores = -grouped.p_value(scores, grouped.labels)
    found, bound = lag1_autocorrelation(scores), autocorrelation_bound(len(scores))
    if found > bound:
        warnings.warn(
            f"Neighbouring calibration scores are correlated ({found:.2f}, expected at most "
            f"{bound:.2f}): p-values and drift alarms assume exchangeable samples. Shuffle the "
            "held-out data, or calibrate on independent units. [OOD101]",
            stacklevel=4,
        )
