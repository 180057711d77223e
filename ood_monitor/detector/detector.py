"""The detector: adapter, gradient norms, density and calibration, composed."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    SampleKind,
    batch_size,
    describe,
    map_tensors,
    usable_by,
)
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.calibration.conformal import samples_for
from ood_monitor.calibration.scores import Scores
from ood_monitor.calibration.usual import Usual
from ood_monitor.checks import flag, function, number, seed_of, text, whole
from ood_monitor.densities import Array, Density
from ood_monitor.densities.measurements import Explaining, Measurements
from ood_monitor.densities.parts import Method
from ood_monitor.detector.compatibility import (
    check_layers,
    check_samples,
    parameters_of,
    samples_of,
    warn_of_other_model,
)
from ood_monitor.detector.explaining import Explanation, explained_by
from ood_monitor.detector.fitting import Fitting, recalibrated
from ood_monitor.detector.measuring import explaining_of, is_measurable, measured_by
from ood_monitor.detector.plan import (
    Parts,
    Plan,
    check_any_size,
    checked_method,
    planned,
    without_statistics,
)
from ood_monitor.detector.pretrained import Groups, Pretrained
from ood_monitor.detector.summed import Summed
from ood_monitor.detector.verifying import remembered_in, verified
from ood_monitor.gradients import Granularity
from ood_monitor.gradients.layers import Layers, checked_layers
from ood_monitor.saving.fingerprints import digest, fingerprints_of, names_of
from ood_monitor.saving.fitted import Fitted
from ood_monitor.saving.probe import Verification
from ood_monitor.statistics.live import LivePass, live_pass

__all__ = ["Detector", "Groups"]


class Detector(Pretrained):
    """Scores how unlike its training data a model finds a sample.

    Args:
        adapter: The model.
        method: ``"gradient_norms"``: layer-wise norms and their joint density, as in the paper.
            ``"forward"``: what one forward pass gives: expected and surprise of the likelihood, and
            the norms that the model expected; of a diffusion model two passes without noise.
            ``"both"``: the two joined. By default it is ``"forward"`` if the adapter says that
            samples are images, sequences, rows of a table or what a diffusion model denoises, else
            ``"gradient_norms"``.
        density: The density of gradient norms; giving one chooses that method. By default
            :class:`~ood_monitor.TermsAndNorms`, which also looks at the values of the terms.
        parts: Instead of a method: a list of :class:`~ood_monitor.Part`, or of their kinds.
        layers: Which parameters are features, by default all.
        granularity: What a gradient norm is of: ``"tensor"`` as in the paper, ``"row"`` or
            ``"column"``. The latter two choose the method ``"gradient_norms"``.
        chunk_size: Samples per pass, to bound memory.
        calibration_fraction: Share of the held-out samples that calibrates; the rest fits.
        trim: Share of the fit samples to leave out, the most anomalous first, in a second fit of
            the density: for held-out data with foreign samples among them. Calibration samples are
            never left out. Foreign ones make p-values larger, so that fewer samples are flagged.
        seed: Seed of the random split into fit and calibration samples.
        groups: A function of the tensors of a batch that gives each sample's group, a tensor (B,)
            or a sequence: its class, prompt class or tenant. P-values and the drift test then
            compare a sample with its own group. See
            :class:`~ood_monitor.calibration.groups.GroupedPValue`.
        minimum_group: The fewest calibration samples that make a group of its own. How many a group
            will have is estimated from the labels of the fit samples. Smaller groups, and labels
            never seen, form one group together.
        any_size: Whether one density serves samples of several sizes. It takes a denoiser and the
            method ``"forward"``, whose sums over positions are then means; see
            ``ood_monitor.statistics.denoiser_statistics``. Without ``groups`` each shape is a group
            and, for a pipeline, each set of adapters that its denoiser has on. Their mix is not
            tested for drift, since users choose the size. Samples are not explained by layer.
        source: Where the held-out samples come from, in words; it is saved with the detector.
        explain: How many held-out samples :meth:`explain` compares with; 0 for none. Their gradient
            norms are taken even if the method needs none, a few samples at a time if the model is
            large. If they cannot be taken, the detector explains nothing by layer, and says so.

    Raises:
        ValueError: ``calibration_fraction`` is not between 0 and 1, ``trim`` not in [0, 0.5), or
            a method, density, parts, granularity and ``any_size`` that do not go together.
        TypeError: An option of another type.

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
        method: Method | None = None,
        density: Density | None = None,
        parts: Parts | None = None,
        layers: Layers = None,
        granularity: Granularity = "tensor",
        chunk_size: int | None = None,
        calibration_fraction: float = 0.5,
        trim: float = 0.0,
        seed: int = 0,
        groups: Groups | None = None,
        minimum_group: int = 100,
        any_size: bool = False,
        source: str = "",
        explain: int = 100,
    ) -> None:
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"Expected an adapter, such as `om.LogLikelihood(model)`, got {type(adapter)}."
            )
        self.adapter, self.trim = adapter, number("trim", trim, 0, 0.5, ends="[)")
        self.method = checked_method(method, density, parts, granularity)
        self.density, self.parts = density, parts
        self.layers, self.granularity = checked_layers(layers), granularity
        # Python's own numbers, since these go into a file.
        self.chunk_size = None if chunk_size is None else whole("chunk_size", chunk_size, 1)
        fraction = number("calibration_fraction", calibration_fraction, 0, 1, ends="()")
        self.calibration_fraction, self.seed = fraction, seed_of("seed", seed)
        self.groups = None if groups is None else function("groups", groups)
        self.minimum_group = whole("minimum_group", minimum_group, 1)
        self.any_size = flag("any_size", any_size)
        if self.any_size:  # at once what the method says, and of its samples when they are known
            check_any_size(planned("diffusion", self.method, density, parts))
        self.source = text("source", source, may_be_empty=True)
        self.explained = whole("explain", explain)
        self._fitted: Fitted | None = None
        self._summed: Summed | None = None

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

    @property
    def takes_gradients(self) -> bool:
        """Whether scores take a backward pass, as fitted or, before that, as was asked for.

        Before a fit the default is taken to need none.
        """
        plan = planned(None, self.method or "forward", None, self.parts)
        if self._fitted is not None:
            plan = Plan.of(self._fitted)
        return any(part.needs_gradients for part in plan.parts)

    def on(self, adapter: Adapter) -> Self:
        """The same detector, with what it has learned, on another model object.

        For a model that was loaded again, or a copy of it with averaged weights. Whether these are
        the weights that it was fitted on is asked by :attr:`is_stale`.

        Args:
            adapter: The other model, as the detector's own adapter has its model.

        Returns:
            A copy; the detector itself is left as it was.

        Raises:
            ValueError: It is fitted, and the model has other layers.
        """
        if self._fitted is not None:
            check_layers(self._fitted.parameters, parameters_of(adapter, self.layers))
        other = copy.copy(self)
        other.adapter, other._summed = adapter, None
        return other

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
        bar = tqdm(
            _checked_batches(held_out), desc="held-out data", unit="batch", disable=not progress
        )
        measured = Measurements.together(self._measured_all(bar))
        self._fitted = self._fitting(measured)(self.adapter, measured)
        return self

    def measure(self, batch: Batch, *, explain: int = 0) -> Measurements:
        """What :meth:`fit` asks of a batch of B held-out samples, to gather before fitting.

        So several processes can each measure a part, and all fit the same detector.

        Args:
            batch: The samples.
            explain: How many of them, the first, :meth:`explain` is to go by.

        Raises:
            ValueError: A batch or a model that :func:`~ood_monitor.gradient_norms` refuses.
        """
        given, batch = batch, without_ignored(self.adapter, batch)
        count = min(explain, batch_size(batch))  # which refuses what is no batch
        sample = self.adapter.sample_of(batch)
        plan = self._plan(sample, lambda plan: is_measurable(plan, self.adapter, batch))
        measured = self._measured(plan, batch, None, given)
        measured = replace(measured, conditions=self._conditions(batch), names=names_of(batch))
        if count == 0:
            return measured
        return replace(measured, explaining=self._explaining(plan, batch, count))

    def _conditions(self, batch: Batch) -> dict[str, tuple[str, ...]]:
        """The different values of what the model is told beside samples."""
        found = self.adapter.conditions(usable_by(self.adapter.module, batch))
        return {name: fingerprints_of(values) for name, values in found.items()}

    def _measured_all(self, batches: Iterable[Batch]) -> Iterator[Measurements]:
        left = self.explained
        for batch in batches:
            yield (measured := self.measure(batch, explain=left))
            left = max(0, left - len(measured))

    def _explaining(self, plan: Plan, batch: Batch, count: int) -> Explaining:
        if self.any_size:
            reason = "any_size=True, and a gradient's norms depend on the size"
            return Explaining(None, {}, count, reason)
        # By tensor they are measured of all samples.
        is_measured = plan.has("gradient_norms") and self.granularity == "tensor"
        return explaining_of(
            self.adapter,
            map_tensors(lambda tensor: tensor[:count], batch),
            sample=plan.sample,
            layers=self.layers,
            chunk_size=self.chunk_size,
            norms=None if is_measured else self._differentiated,
        )

    def fit_measured(self, measured: Measurements) -> Self:
        """:meth:`fit`, of held-out samples that :meth:`measure` has seen.

        Returns:
            The detector itself; unchanged if anything is raised.

        Raises:
            ValueError: As :meth:`fit`.

        Warns:
            UserWarning: As :meth:`fit`.
        """
        self._fitted = self._fitting(measured)(self.adapter, measured)
        return self

    def check_held_out(self, measured: Measurements, count: int | None, fpr: float) -> None:
        """Refuse what :meth:`fit_measured`, or a monitor after it, would refuse of more samples.

        Args:
            measured: Of a few of them, from :meth:`measure`.
            count: How many there will be; None where nobody knows.
            fpr: The rate at which single samples are to be flagged.

        Raises:
            ValueError: They will be too few to fit and calibrate on, or to flag any sample.
        """
        if count is None:
            return
        _, calibration = self._fitting(measured).sizes(count)
        if (needed := samples_for(fpr)) > calibration:
            raise ValueError(
                f"Expected at least {needed} calibration samples for fpr={fpr:g}, got "
                f"{calibration} of {count} held-out samples: give more, or a larger `fpr`."
            )

    def recalibrate(self, normal: Iterable[Batch], *, progress: bool = True) -> Self:
        """Keep the fitted densities, and calibrate on other samples that are known to be normal.

        For a model that stays as it is while what is normal changes. Samples that a monitor has
        flagged are in only if they are given. A monitor goes on with the calibration that it was
        made with, until :meth:`~ood_monitor.Monitor.accept`.

        Args:
            normal: Batches, as of :meth:`fit`, of samples that nothing was fitted on.
            progress: Show a progress bar.

        Returns:
            The detector itself; unchanged if anything is raised.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: The model has other weights than the detector was fitted on, fewer than 20
                samples can be scored, or what :meth:`score` refuses.

        Warns:
            UserWarning: As :meth:`fit`.
        """
        fitted = self.fitted
        if self.is_stale:
            raise ValueError(
                f"Expected the model with the weights {fitted.model} that the detector was fitted "
                "on, got others: fit a detector of them."
            )
        bar = tqdm(_checked_batches(normal), desc="normal data", unit="batch", disable=not progress)
        measured = Measurements.together(self._seen_by(fitted, batch) for batch in bar)
        self._fitted = recalibrated(fitted, measured)
        return self

    def _seen_by(self, fitted: Fitted, batch: Batch) -> Measurements:
        self.check(batch)
        given, batch = batch, without_ignored(self.adapter, batch)
        measured = self._measured(Plan.of(fitted), batch, fitted, given)
        return replace(measured, names=names_of(batch))

    def verify(self, held_out: Iterable[Batch], *, fpr: float = 0.01) -> Verification:
        """Score some of the calibration samples again: on this device, in these versions.

        The detector remembers sixteen of them by their SHA-256, and their scores.

        Args:
            held_out: Batches that hold some of them: the data that it was fitted on, to the bit.
            fpr: The rate at which samples are flagged.

        Returns:
            How many were found, and by how much their p-values differ.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: It remembers none, none is among the data, or a p-value differs by more
                than half of ``fpr``; the message has types, devices and versions.
        """
        fitted, rate = self.fitted, number("fpr", fpr, 0, 1)
        if fitted.probe is None:
            raise ValueError(
                "Expected a detector that remembers samples, got one of an earlier release: fit it "
                "again."
            )
        found: dict[str, tuple[float, int]] = {}
        batches = (without_ignored(self.adapter, it) for it in _checked_batches(held_out))
        for names, batch in remembered_in(fitted.probe, batches):
            scores = self.score(batch)
            groups = [0] * len(names) if scores.group is None else scores.group.tolist()
            found |= zip(names, zip(scores.score.tolist(), groups, strict=True), strict=True)
        return verified(fitted, self.adapter.module, found, rate)

    def live(self, batch: Batch) -> LivePass | None:
        """What listens to a pass over B texts that the user makes, so that scoring makes none.

        ::

            live = detector.live(batch)
            with live.listening():
                output = model(**batch)  # in eval mode, without gradients and mixed precision
            live.ended(output.logits)
            scores = detector.score(batch, live=live)

        Args:
            batch: What the model is about to be given.

        Returns:
            What listens, or None where scoring needs a pass of its own, as of other models than a
            :class:`~ood_monitor.SequenceLikelihood`, by a method that takes gradients, or of a
            model of which nothing was scored yet.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: The batch is none of texts.
        """
        plan = Plan.of(self.fitted)
        if plan.kinds != plan.of_forward or self.chunk_size is not None:
            return None
        layers = (self.fitted.expected_layers or ()) if plan.has("expected_norms") else ()
        return live_pass(self.adapter, batch, layers)

    def score(self, batch: Batch, *, live: LivePass | None = None) -> Scores:
        """Score B samples; the model is left as it was.

        Args:
            batch: As the held-out batches were; labels that the adapter does not take may be left
                out, or come on top.
            live: A pass over the same batch, which has ended.

        Returns:
            Scores, p-values and what each layer says.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: The batch has other shapes or types than the held-out data, is empty, or
                holds a value that is not finite; or ``live`` was over another batch, in training
                mode or in mixed precision, or has not ended.
        """
        fitted = self.fitted
        self.check(batch)
        if live is not None:
            live.check(batch)
        given, batch = batch, without_ignored(self.adapter, batch)
        measured = self._measured(Plan.of(fitted), batch, fitted, given, live)
        features = fitted.joined.features(measured)
        parts = fitted.joined.contributions(features)
        score = parts.sum(1)
        means = fitted.joined.means_by_layer(features)
        shares = fitted.joined.sums_by_layer(parts)
        group = fitted.group(measured.groups, len(score))
        return Scores(
            score=torch.from_numpy(score),
            p_value=torch.from_numpy(fitted.p_value(score, measured.groups)),
            group=None if group is None else torch.from_numpy(group),
            log_likelihood=torch.from_numpy(measured.total),
            layers=_columns(fitted.layers, shares),
            z=_columns(fitted.layers, (means - fitted.layer_mean) / fitted.layer_sd),
            valid=torch.from_numpy(~np.isnan(score)),
        )

    def explain(self, batch: Batch, *, layers: bool = False, places: bool = True) -> Explanation:
        """Where B samples are unusual, and on demand which layers say so.

        Args:
            batch: As of :meth:`score`.
            layers: Whether to take gradient norms, for what takes several forward passes.
            places: Whether to take the surprise by place, for what takes one.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: As :meth:`score`; or it was fitted without what explains by layer.

        Example:
            >>> import ood_monitor as om
            >>> flow = om.models.Glow(channels=1, size=8, steps=1, hidden=4)
            >>> held_out = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            >>> detector = om.Detector(om.LogLikelihood(flow)).fit([held_out], progress=False)
            >>> why = detector.explain(held_out[:2], layers=True)
            >>> why.surprise["latent_1"].shape  # by place
            torch.Size([2, 4, 4])
            >>> sum(why.shares.values())
            tensor([1.0000, 1.0000], dtype=torch.float64)
        """
        fitted = self.fitted
        self.check(batch)
        batch = without_ignored(self.adapter, batch)
        return explained_by(
            fitted.usual or Usual(0),
            self.adapter,
            batch,
            norms=self._differentiated if layers else None,
            places=places,
            layers=self.layers,
            chunk_size=self.chunk_size,
        )

    def check(self, batch: Batch) -> None:
        """Refuse a batch that cannot be scored for its shapes or types; values do not matter.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: An empty batch, or other shapes or types than the held-out data.
        """
        batch = without_ignored(self.adapter, batch)
        if batch_size(batch) == 0:
            raise ValueError(f"Expected samples, got 0: {describe(batch)}.")
        check_samples(self.adapter, batch, self.fitted.samples, any_size=self.any_size)

    @property
    def is_stale(self) -> bool:
        """Whether the model's weights are now other than those that it was fitted on.

        Reads all weights; on a GPU they are copied.

        Raises:
            RuntimeError: The detector is not fitted.
        """
        return digest(self.adapter.module) != self.fitted.model

    @classmethod
    def _restored(
        cls, fitted: Fitted, options: dict[str, Any], adapter: Adapter, groups: Groups | None
    ) -> Self:
        needs_groups = fitted.grouped is not None and not fitted.groups_of_adapter
        if needs_groups != (groups is not None):
            was, given = ("a function", "none") if needs_groups else ("none", "a function")
            raise ValueError(
                f"Expected {was} as `groups`, as when the detector was fitted, got {given}: give "
                "what `Detector(groups=)` was given then."
            )
        check_layers(fitted.parameters, parameters_of(adapter, options.get("layers")))
        warn_of_other_model(fitted, adapter, stacklevel=3)
        detector = cls(adapter, groups=groups, **Plan.of(fitted).arguments, **options)
        detector._fitted = fitted
        return detector

    def _measured(
        self,
        plan: Plan,
        batch: Batch,
        fitted: Fitted | None,
        given: Batch,
        live: LivePass | None = None,
    ) -> Measurements:
        """Of a batch, and of all that was given with it, of which groups may be told."""
        measured = measured_by(
            plan,
            self.adapter,
            batch,
            differentiated=self._differentiated,
            layers=self.layers,
            granularity=self.granularity,
            chunk_size=self.chunk_size,
            any_size=self.any_size,
            fitted=fitted,
            live=live,
        )
        groups = self._groups_of(given, batch, len(measured))
        return replace(measured, samples=samples_of(batch), groups=groups, sample=plan.sample)

    def _groups_of(self, given: Batch, batch: Batch, count: int) -> tuple[str, ...]:
        """Of all that was given, by the user's word; else of what the adapter takes, by its own."""
        if self.groups is not None:
            return _named(self.groups(given), count)
        own = self.adapter.group_of(batch) if self.any_size else None
        return () if own is None else _named(own, count)

    @property
    def _differentiated(self) -> Adapter:
        """One object for an adapter, of which facts are known after its first use."""
        if not self.adapter.is_one_pass:
            return self.adapter
        if self._summed is None or self._summed.of is not self.adapter:
            self._summed = Summed(self.adapter)
        return self._summed

    def _plan(self, sample: SampleKind | None, is_measurable: Callable[[Plan], bool]) -> Plan:
        """What is measured of samples of a kind; by default only what can be."""
        has_null = self.adapter.has_null_condition
        plan = planned(sample, self.method, self.density, self.parts, has_null=has_null)
        is_default = self.method is None and self.parts is None
        plan = without_statistics(sample) if is_default and not is_measurable(plan) else plan
        if self.any_size:
            check_any_size(plan)
        return plan

    def _fitting(self, measured: Measurements) -> Fitting:
        return Fitting(
            plan=self._plan(measured.sample, lambda plan: plan.kinds <= measured.tables.keys()),
            layers=self.layers,
            calibration_fraction=self.calibration_fraction,
            trim=self.trim,
            seed=self.seed,
            groups_of_adapter=self.groups is None,
            minimum_group=self.minimum_group,
        )

    def _options(self) -> dict[str, Any]:
        if callable(self.layers):
            raise ValueError(
                "Expected layers as name patterns to save, got a function: give `layers=` the "
                "names that it returns."
            )
        names = (
            *("layers", "granularity", "chunk_size"),
            *("calibration_fraction", "trim", "seed", "minimum_group", "source"),
        )
        options = {name: getattr(self, name) for name in names} | {"explain": self.explained}
        # Versions before it read what does without, and refuse what they would misread.
        return options | ({"any_size": True} if self.any_size else {})


def _checked_batches(batches: Iterable[Batch]) -> Iterable[Batch]:
    if isinstance(batches, (Tensor, Mapping)):  # iterable too, but over samples or keys
        raise ValueError(
            f"Expected an iterable of batches, got {describe(batches)}: pass `[batch]`, or a "
            "loader."
        )
    return batches


def _named(groups: Tensor | Sequence[Any], count: int) -> tuple[str, ...]:
    """Groups as text, which a file can hold."""
    values = groups.tolist() if isinstance(groups, Tensor) else groups
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"Expected one group for each of {count} samples, got {values!r}.")
    return tuple(map(str, values))


def _columns(names: tuple[str, ...], values: Array) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values[:, i].copy()) for i, name in enumerate(names)}
