"""Options of everything public: what is none is refused at once, by us and by name."""

import functools
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import ood_monitor_integrations
import pytest
import torch
from accelerate import Accelerator
from ood_monitor_integrations import accelerate, lightning, mlflow, prometheus, transformers
from ood_monitor_integrations import diffusers as watched
from ood_monitor_integrations.mlflow import flavour, pipelines, traces
from support import flavour_cases
from support.flavour_cases import FACTORY
from support.pipeline_cases import case_of
from torch import nn

import ood_monitor as om
from ood_monitor import densities
from ood_monitor.adapters import observations
from ood_monitor.alerts import Dispatcher, Spool
from ood_monitor.alerts.webhook import verify
from ood_monitor.calibration import conformal
from ood_monitor.densities import baselines
from ood_monitor.drift.correlation import expected_run_time
from ood_monitor.drift.mix import MixDetector
from ood_monitor.drift.power import expected_delay
from ood_monitor.gradients import terms_and_norms
from ood_monitor.report import html_report
from ood_monitor.saving.hub import Repository
from ood_monitor.statistics import denoiser_statistics, forward_statistics
from ood_monitor.testing import flagged_interval

#: The folders of our own code.
OURS = tuple(package.__path__[0] for package in (om, ood_monitor_integrations))


@dataclass(frozen=True)
class Kind:
    """What an option is, by values that are refused and values that are taken."""

    bad: tuple[Any, ...]
    good: tuple[Any, ...] = ()

    def but(self, *bad: Any, good: tuple[Any, ...] | None = None) -> "Kind":
        """With more that is refused; or with others that are taken."""
        return Kind((*self.bad, *bad), self.good if good is None else good)

    def or_none(self) -> "Kind":
        """With None for a default."""
        return Kind(tuple(bad for bad in self.bad if bad is not None), (*self.good, None))


NONE_OF_ALL = (None, math.nan, object())
COUNT = Kind((*NONE_OF_ALL, -1, 1.5, 10.0, True, "3", [3]), (8, np.int64(8)))
POSITIVE_COUNT = COUNT.but(0)
SEED = COUNT.but(2**64, good=(0, 7, np.int32(7)))
NUMBER = Kind((*NONE_OF_ALL, "x", "3", True, [0.5, 0.5]), (0.25, np.float32(0.25), Fraction(1, 4)))
SHARE = NUMBER.but(-0.1, 2, math.inf)
RATE = SHARE.but(0, 1)
POSITIVE = NUMBER.but(-1, 0, math.inf, good=(2.5, 3, np.float64(2.5)))
TIME = NUMBER.but(-1, good=(0.5, 1, np.float32(0.5), Fraction(1, 2)))
ERT = NUMBER.but(1, -1, math.inf, good=(100, 100.5, np.int64(100)))
TEXT = Kind((None, 3, b"x", "", " "), ("name",))
PATH = Kind((None, 3, True, "", b"x", Path), ("folder", Path("folder")))
FLAG = Kind((None, 0, 1, "no", "False"), (True, False, np.bool_(False)))
CALLABLE = Kind((None, 3, "x", [len]))
OBJECT = Kind((3, "x", object()))
WORD = Kind((3, "nonsense", "", ["x"], True))
LAYERS = Kind((3, "", b"x", [3], [""]), ("*", ["*"], ("*",), None))
RANGE = Kind(
    (None, 3, "01", (0,), (1, 0), (0, 0), (0, math.nan), (0, math.inf), ("0", "1"), (0, 1, 2)),
    ((0, 1), [0.0, 2.0], np.array([0.0, 1.0])),
)
LEVELS = Kind(
    (None, 3, "5", [], [-1], [1.5], [50.0], ["5"], [10**6], [5, 5], [True], [math.nan]),
    ([5], (5, 50), range(3), torch.tensor([5, 50])),
)
RATIOS = Kind(
    (None, 1, 4, 2.0, "23", [], [0], [-1.0], [math.nan], [math.inf], ["1"], True),
    (2, 3, [0.1], (1, np.float64(2))),
)
TIMEOUT = POSITIVE.but(10**9)


def words(*good: str | None) -> Kind:
    return Kind(WORD.bad, good)


SAMPLE = words("image", "row", None)
METHOD = words("gradient_norms", "forward", "both", None)


@dataclass(frozen=True)
class Case:
    """A public callable.

    Attributes:
        call: What it is, or what calls it and gives back what it took.
        given: Gives arguments that are valid.
        options: Its options by their names, as keywords.
        is_quick: Whether good values are tried too; if not, each would take seconds or a server.
    """

    call: Callable[..., Any]
    given: Callable[[], dict[str, Any]] = dict
    options: dict[str, Kind] = field(default_factory=dict)
    is_quick: bool = True


SCORES = np.random.default_rng(0).normal(size=40)
X = flavour_cases.images(4)
BATCH = {"batch": X}


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 4), nn.Linear(2, 16)

    def encode(self, x: torch.Tensor) -> Any:
        return self.encoder(x.flatten(1)).chunk(2, 1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z).view(-1, 1, 4, 4)


class Denoiser(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def bound() -> om.DenoisingBound:
    return om.DenoisingBound(Denoiser(), torch.linspace(0.9999, 0.01, 100), levels=[5])


@functools.cache
def detector() -> om.Detector:
    return flavour_cases.fitted(method="gradient_norms", explain=0)


@functools.cache
def pipe() -> Any:
    return case_of("ddpm")()


@functools.cache
def pipe_detector() -> om.Detector:
    data = [case_of("ddpm").images(220)]
    call = case_of("ddpm").call_of_one()
    options: dict[str, Any] = {"levels": [5], "explain": 0, "progress": False}
    return watched.fit_pipeline(pipe(), data, call=call, watches="outputs", **options)


def monitoring(**options: Any) -> None:
    watched.monitor_pipeline(pipe(), **options).ood_monitor.detach()


def wrapping(**options: Any) -> None:
    with watched.wrap(pipe(), **options):
        pass


def dispatching(**options: Any) -> None:
    Dispatcher(**options).close()


async def asynchronous(alert: om.Alert) -> None:
    raise AssertionError


def spooling(**options: Any) -> None:
    Spool(**options).close(5.0)


def monitored(**options: Any) -> None:
    om.Monitor(detector(), **options).close()


def flushing(**options: Any) -> None:
    with Dispatcher([]) as dispatcher:
        dispatcher.flush(**options)


def smoothed(**options: Any) -> None:
    conformal.ConformalPValue.fit(SCORES).smoothed_p_value(SCORES, **options)


def typical_threshold(**options: Any) -> None:
    baselines.GroupTypicality(2, draws=10).fit(SCORES).threshold(**options)


def verifying(**options: Any) -> None:
    verify(b"", {}, "whsec_" + "A" * 32, **options)


NETWORK = {"module": nn.Linear(4, 4)}
NORMS: dict[str, Kind] = {
    "layers": LAYERS,
    "granularity": words("tensor", "row"),
    "group": POSITIVE_COUNT.but(good=(2, np.int64(2))),
    "chunk_size": POSITIVE_COUNT.or_none(),
}
PIPELINE: dict[str, Kind] = {
    "sample_rate": SHARE.but(0).or_none(),
    "max_latency_ms": POSITIVE.or_none(),
    "batch": CALLABLE.or_none(),
    "raise_on_error": FLAG,
}
BOUND: dict[str, Kind] = {
    "levels": LEVELS,
    "ratios": RATIOS,
    "condition_check": FLAG,
    "seed": SEED.but(2**63),
}
IN_MLFLOW: dict[str, Kind] = {
    "factory": TEXT.but("x", good=()),
    "weights": FLAG,
    "groups": TEXT.or_none(),
    "arguments": Kind(({"x": math.nan}, {"x": object()})),
    "files": Kind(({"x": ""}, {"x": 3})),
}

CASES: dict[str, Case] = {
    # Adapters.
    "LogLikelihood": Case(
        om.LogLikelihood,
        lambda: {"module": flavour_cases.Flow()},
        {
            "function": CALLABLE.or_none(),
            "inputs": CALLABLE,
            "condition": CALLABLE,
            "bins": COUNT.but(1).or_none(),
            "value_range": RANGE,
            "seed": SEED,
            "sample": SAMPLE,
        },
    ),
    "ELBO": Case(
        om.ELBO,
        lambda: {"module": Autoencoder()},
        {
            "observation": OBJECT.but(observations.Gaussian),
            "draws": POSITIVE_COUNT,
            "importance_weighted": FLAG.but(good=(False, np.bool_(False))),
            "inputs": CALLABLE,
            "condition": CALLABLE,
            "seed": SEED,
            "sample": SAMPLE,
        },
    ),
    "DenoisingBound": Case(
        om.DenoisingBound,
        lambda: {
            "network": Denoiser(),
            "schedule": torch.linspace(0.99, 0.01, 100),
            "levels": [5],
        },
        {
            "levels": LEVELS,
            "prediction_type": words("epsilon", "sample", None),
            "loss": words("l1", "l2"),
            "draws": POSITIVE_COUNT,
            "antithetic": FLAG,
            "inputs": CALLABLE,
            "condition": CALLABLE,
            "time": CALLABLE,
            "seed": SEED.but(2**63),
            "ratios": RATIOS,
            "null_condition": CALLABLE.or_none(),
        },
    ),
    "DenoisingBound.with_levels": Case(
        lambda **options: bound().with_levels(**options),
        lambda: {"levels": [5]},
        {"levels": LEVELS, "seed": SEED.but(2**63).or_none()},
    ),
    "SequenceLikelihood": Case(
        om.SequenceLikelihood,
        lambda: {"module": nn.Embedding(5, 5)},
        {
            "shifted": FLAG,
            "class_dim": Kind((None, 1.0, "1", True), (1, -1, np.int64(1))),
            "per_token": FLAG,
            "padding": Kind((1.0, "0", True), (0, -100, None)),
            "padding_is_end": Kind(FLAG.bad[1:], (False, None)),
            "given": COUNT.but(good=(0, 3, lambda batch: batch)),
            "ignore_index": Kind((1.0, "0", True), (0, -100, None)),
            "labels": CALLABLE,
            "inputs": CALLABLE,
            "condition": CALLABLE,
            "scale": CALLABLE,
            "sample": words("sequence", "image", None),
        },
    ),
    "SequenceLikelihood.with_padding": Case(
        lambda **options: om.SequenceLikelihood(nn.Embedding(5, 5)).with_padding(**options),
        options={"left": COUNT, "right": COUNT},
    ),
    "latent_mean": Case(
        om.latent_mean,
        lambda: {"vae": nn.Linear(1, 1)},
        {"inputs": CALLABLE, "value_range": RANGE},
    ),
    "NoiseSchedule": Case(
        om.NoiseSchedule,
        lambda: dict.fromkeys(("alpha", "sigma", "t"), torch.zeros(3)),
        {"alpha": OBJECT, "sigma": OBJECT, "t": OBJECT, "prediction_type": TEXT},
    ),
    "NoiseSchedule.flow": Case(
        om.NoiseSchedule.flow,
        lambda: {"convention": "noise_minus_data"},
        {
            "steps": POSITIVE_COUNT,
            "shift": POSITIVE,
            "convention": words("noise_minus_data", "data_minus_noise"),
        },
    ),
    "NoiseSchedule.nearest": Case(bound().schedule.nearest, options={"ratio": POSITIVE}),
    "Gaussian": Case(observations.Gaussian, options={"variance": POSITIVE.or_none()}),
    "DiscretizedLogistic": Case(
        observations.DiscretizedLogistic,
        options={
            "bins": COUNT.but(0, 1),
            "low": NUMBER.but(1.0, 2, math.inf),
            "high": NUMBER.but(-1.0, -2, math.inf),
        },
    ),
    "Glow": Case(
        om.models.Glow,
        lambda: {"channels": 1, "size": 4, "levels": 1, "steps": 1, "hidden": 4},
        {
            "channels": POSITIVE_COUNT,
            "size": POSITIVE_COUNT.but((4,), (4.0, 4), good=(4, (4, 8), [4, np.int64(8)])),
            "levels": POSITIVE_COUNT.but(good=(1, np.int64(2))),
            "steps": POSITIVE_COUNT.but(good=(1, np.int64(2))),
            "hidden": POSITIVE_COUNT,
            "log_scale_bound": POSITIVE,
            "seed": SEED,
        },
    ),
    "Glow.sample": Case(
        lambda **options: om.models.Glow(1, 4, levels=1, steps=1, hidden=4).sample(**options),
        lambda: {"n": 1},
        {"n": COUNT, "temperature": TIME.but(math.inf)},
    ),
    # Norms and statistics.
    "gradient_norms": Case(
        om.gradient_norms,
        lambda: {"adapter": flavour_cases.build()} | BATCH,
        NORMS | {"report": FLAG},
    ),
    "terms_and_norms": Case(
        terms_and_norms, lambda: {"adapter": flavour_cases.build()} | BATCH, NORMS
    ),
    "last_layers": Case(
        om.last_layers,
        lambda: {"adapter": flavour_cases.build()} | BATCH,
        {"k": POSITIVE_COUNT.but(100, good=(1, np.int64(2)))},
    ),
    "forward_statistics": Case(
        forward_statistics,
        lambda: (
            {"adapter": om.LogLikelihood(om.models.Glow(1, 4, levels=1)), "sample": "image"} | BATCH
        ),
        {"chunk_size": POSITIVE_COUNT.or_none(), "sample": SAMPLE},
    ),
    "denoiser_statistics": Case(
        denoiser_statistics,
        lambda: {"adapter": bound()} | BATCH,
        {
            "chunk_size": POSITIVE_COUNT.or_none(),
            "layers": LAYERS,
            "any_size": FLAG.but(good=(False, np.bool_(False))),
        },
    ),
    "diagnose": Case(
        om.diagnose,
        lambda: {"adapter": flavour_cases.build(), "held_out": X[:0]},
        {"layers": LAYERS, "density": OBJECT.but(densities.ShrunkGaussian)},
        is_quick=False,
    ),
    # Densities.
    "ShrunkGaussian": Case(
        densities.ShrunkGaussian,
        options={"shrinkage": SHARE.but(0, good=(0.5, 1, "oas", np.float32(0.5)))},
    ),
    "PrincipalGaussian": Case(densities.PrincipalGaussian, options={"explained": RATE}),
    "StudentT": Case(
        densities.StudentT, options={"largest_dof": POSITIVE.but(4, good=(5, 4.5, np.float32(9)))}
    ),
    "Maximum": Case(densities.Maximum, options={"folds": COUNT.but(0, 1)}),
    "TermsAndNorms": Case(
        densities.TermsAndNorms, options={"terms": COUNT, "folds": COUNT.but(0, 1)}
    ),
    "GaussianMixture": Case(
        densities.GaussianMixture,
        options={
            "components": POSITIVE_COUNT,
            "regularisation": TIME.but(math.inf),
            "seed": SEED.but(2**32),
        },
    ),
    "Part": Case(
        om.Part,
        lambda: {"kind": "expected_norms"},
        {
            "kind": words("expected_norms"),
            "density": OBJECT.but(densities.OneSided, good=(densities.OneSided(), None)),
            "floor": words("median", "mean", None),
        },
    ),
    "GroupTypicality": Case(
        baselines.GroupTypicality,
        lambda: {"group": 2},
        {"group": POSITIVE_COUNT, "draws": POSITIVE_COUNT, "seed": SEED.but(good=(0, 7))},
    ),
    "GroupTypicality.threshold": Case(typical_threshold, options={"fpr": SHARE.but(0, 1, 0.05)}),
    "ChiSquare": Case(
        baselines.ChiSquare,
        options={"dof": Kind((3, "12", [0], [-1], [math.nan], ["1"]), ([1, 2.5], None))},
    ),
    "OneClassSVM": Case(baselines.OneClassSVM, options={"nu": SHARE.but(0)}),
    "IsolationForest": Case(baselines.IsolationForest, options={"seed": SEED.but(2**32)}),
    # Calibration and drift.
    "smoothed_p_value": Case(smoothed, options={"seed": SEED}),
    "samples_for": Case(conformal.samples_for, options={"fpr": RATE}),
    "autocorrelation_bound": Case(
        conformal.autocorrelation_bound,
        lambda: {"n": 10},
        {"n": COUNT.but(0, 2), "confidence": RATE},
    ),
    "binomial_interval": Case(
        conformal.binomial_interval,
        lambda: {"successes": 1, "n": 10},
        {"successes": COUNT.but(11), "n": COUNT.but(0), "confidence": RATE},
    ),
    "EDetector": Case(
        om.EDetector,
        lambda: {"calibration_scores": SCORES, "ert": 100},
        {"ert": ERT, "seed": COUNT, "max_history": POSITIVE_COUNT},
    ),
    "MixDetector": Case(
        MixDetector, lambda: {"counts": [20, 20], "ert": 100}, {"ert": ERT, "seed": COUNT}
    ),
    "expected_run_time": Case(
        expected_run_time,
        lambda: {"ert": 100, "correlation": 0.1},
        {"ert": NUMBER.but(1, good=(100, 2.5)), "correlation": NUMBER.but(-1.5, 2)},
    ),
    "expected_delay": Case(
        expected_delay,
        lambda: {"calibration_scores": SCORES, "ert": 100, "runs": 1, "horizon": 10},
        {
            "ert": ERT,
            "contamination": SHARE.but(0),
            "shift": NUMBER.but(math.inf, -math.inf, good=(-1, 2.5)),
            "runs": POSITIVE_COUNT.but(good=(1, np.int64(2))),
            "horizon": POSITIVE_COUNT,
            "seed": SEED,
        },
    ),
    "TrainingStream": Case(
        om.TrainingStream,
        options={
            "layers": LAYERS,
            "half_life": POSITIVE,
            "threshold": POSITIVE,
            "warm_up": COUNT.but(0, 1),
        },
    ),
    # Detector and monitor.
    "Detector": Case(
        om.Detector,
        lambda: {"adapter": flavour_cases.build()},
        {
            "method": METHOD,
            "density": OBJECT.but(densities.OneSided, good=(densities.OneSided(), None)),
            "parts": Kind((3, "values", [], ["nonsense"], [3]), (["values"], (om.Part("map"),))),
            "layers": LAYERS,
            "granularity": words("tensor", "row", "column"),
            "chunk_size": POSITIVE_COUNT.or_none(),
            "calibration_fraction": RATE,
            "trim": SHARE.but(0.5, good=(0, 0.25)),
            "seed": SEED,
            "groups": CALLABLE.or_none(),
            "minimum_group": POSITIVE_COUNT,
            "any_size": FLAG,
            "source": Kind((None, 3, b"x"), ("", "a folder")),
            "explain": COUNT.but(good=(0, np.int64(8))),
        },
    ),
    "Monitor": Case(
        monitored,
        options={
            "ert": ERT,
            "fpr": RATE,
            "sinks": Kind((None, 3, "x", [3]), ([], (print,))),
            "name": TEXT,
            "cooldown": COUNT,
            "summary_every": POSITIVE_COUNT,
            "thin": POSITIVE_COUNT,
            "seed": COUNT,
            "identify": Kind((3, "nonsense", ""), ("hash", None)),
            "weights_every": COUNT,
            "recovery": POSITIVE_COUNT,
            "spool": PATH.or_none(),
        },
    ),
    "Discoveries": Case(
        om.Discoveries,
        lambda: {"calibration": 10_000},
        {
            "calibration": COUNT.but(0, good=(10_000, np.int64(10_000))),
            "fdr": RATE,
            "window": POSITIVE_COUNT,
        },
    ),
    # Alerts.
    "LoggingSink": Case(om.LoggingSink, options={"logger": OBJECT}),
    "WebhookSink": Case(
        om.WebhookSink,
        lambda: {"url": "https://host/path"},
        {
            "url": Kind((None, 3, "", "host", "ftp://host", "https://", b"https://host")),
            "secret": Kind((3, "", "x", b"whsec_", "whsec_QQ=="), (None,)),
            "timeout": TIMEOUT,
            "payload": CALLABLE.or_none(),
            "headers": Kind((3, "x: y", ["x"], {"x": 3}, {"x": "a\nb"}), ({"x": "y"}, None)),
            "name": TEXT.or_none(),
        },
    ),
    "webhook.verify": Case(verifying, options={"tolerance": TIME}, is_quick=False),
    "Dispatcher": Case(
        dispatching,
        lambda: {"sinks": []},
        {
            "sinks": Kind((None, 3, "x", [3], [asynchronous]), ([], (print,))),
            "capacity": POSITIVE_COUNT,
            "tries": POSITIVE_COUNT,
            "spool": PATH.or_none(),
        },
    ),
    "Dispatcher.flush": Case(flushing, options={"timeout": TIME}),
    "Spool": Case(
        spooling,
        lambda: {"folder": "spool", "sinks": ["x"]},
        {
            "folder": PATH,
            "sinks": Kind((None, 3, "x", [3], [""], ["x", "x"]), ([], ("x",))),
            "capacity": POSITIVE_COUNT,
        },
    ),
    "PageSink": Case(
        om.alerts.PageSink,
        lambda: {"path": "page.html"},
        {"path": PATH, "title": TEXT, "refresh": Kind((None, "x", 0, 86_401), (1, 86_400.0))},
    ),
    # Files, reports, tests.
    "Repository": Case(
        Repository, lambda: {"name": "a/b"}, {"name": TEXT, "revision": TEXT.or_none()}
    ),
    "html_report": Case(
        html_report,
        lambda: {"fitted": detector().fitted},
        {"fpr": RATE, "ert": ERT, "title": TEXT},
        is_quick=False,
    ),
    "flagged_interval": Case(
        flagged_interval,
        lambda: {"samples": 10, "calibration": 100, "fpr": 0.1},
        {
            "samples": POSITIVE_COUNT,
            "calibration": POSITIVE_COUNT,
            "fpr": RATE,
            "level": RATE,
            "cells": POSITIVE_COUNT,
        },
    ),
    # Integrations.
    "OODMonitor": Case(
        lightning.OODMonitor,
        options={
            "adapter": Kind((3, "x")),
            "detector": Kind((3, "", b"x"), ("folder", Path("folder"), None)),
            "held_out": Kind((3, "", "train", b"x", X, iter([X])), ([X], None)),
            "calibrate": Kind((3, "", "first", b"x"), ("best", "never", None)),
            "calibrate_samples": POSITIVE_COUNT,
            "calibrate_every_n_epochs": Kind((0, -1, 1.5, "x")),
            "watch": Kind((None, 3, "val", ["nonsense"], [3]), (["val"], ("train", "validate"))),
            "ert": ERT,
            "fpr": RATE,
            "every_n_batches": POSITIVE_COUNT,
            "method": METHOD,
            "layers": LAYERS,
            "training": OBJECT.but(om.TrainingStream, good=(om.TrainingStream(), None)),
            "sinks": Kind((None, 3, "x", [3]), ([], (print,))),
            "scores_dir": PATH.or_none(),
            "log_alerts": FLAG,
            "console": FLAG,
            "with_scores": FLAG,
            "name": TEXT,
            "progress": FLAG,
            "strict": FLAG,
        },
    ),
    "OODCallback": Case(
        transformers.OODCallback,
        options={
            "adapter": Kind((3, "x")),
            "adapter_of": CALLABLE.or_none(),
            "batch": CALLABLE.or_none(),
            "detector": Kind((3, "", b"x"), ("folder", Path("folder"), None)),
            "held_out": Kind((3, "", "train", b"x", X, iter([X])), ([X], None)),
            "calibrate": Kind((3, "", "first", b"x"), ("best", "never", None)),
            "calibrate_samples": POSITIVE_COUNT,
            "calibrate_every_n_evaluations": Kind((0, -1, 1.5, "x")),
            "watch": Kind((None, 3, "eval", ["nonsense"], [3]), (["eval"], ("train", "predict"))),
            "ert": ERT,
            "fpr": RATE,
            "every_n_batches": POSITIVE_COUNT,
            "method": METHOD,
            "layers": LAYERS,
            "training": OBJECT.but(om.TrainingStream, good=(om.TrainingStream(), None)),
            "sinks": Kind((None, 3, "x", [3]), ([], (print,))),
            "scores_dir": PATH.or_none(),
            "log_alerts": FLAG,
            "console": FLAG,
            "name": TEXT,
            "progress": FLAG,
            "strict": FLAG,
        },
    ),
    "AcceleratorMonitor": Case(
        accelerate.AcceleratorMonitor,
        lambda: {"accelerator": Accelerator(cpu=True), "model": nn.Linear(2, 2)},
        {
            "adapter": Kind((3, "x")),
            "batch": CALLABLE.or_none(),
            "detector": Kind((3, "", b"x"), ("folder", None)),
            "calibrate_samples": POSITIVE_COUNT,
            "method": METHOD,
            "layers": LAYERS,
            "ert": ERT,
            "fpr": RATE,
            "sinks": Kind((None, 3, "x", [3]), ([], (print,))),
            "name": TEXT,
            "progress": FLAG,
        },
    ),
    "FileTracker": Case(accelerate.FileTracker, options={"folder": PATH}),
    "monitor_pipeline": Case(
        monitoring,
        lambda: {"monitor": pipe_detector()},
        PIPELINE
        | {
            "what": words("outputs"),
            "mode": words("sync", "background", None),
            "queue_size": POSITIVE_COUNT,
            "seed": SEED.but(good=(0, 7)).or_none(),
        },
    ),
    "wrap": Case(
        wrapping,
        lambda: {"monitor": pipe_detector()},
        PIPELINE | {"what": words("outputs"), "seed": SEED.or_none()},
    ),
    "OODBlock": Case(
        watched.OODBlock,
        lambda: {"denoise": nn.Module(), "monitor": None},
        {"raise_on_error": FLAG},
        is_quick=False,
    ),
    "fit_pipeline": Case(
        watched.fit_pipeline,
        lambda: {
            "pipe": pipe(),
            "data": [case_of("ddpm").images(2)],
            "call": case_of("ddpm").call_of_one(),
            "progress": False,
        },
        BOUND
        | {
            "levels": LEVELS.or_none(),
            "ratios": RATIOS.or_none(),
            "max_overhead": POSITIVE.or_none(),
            "layers": LAYERS,
            "samples": POSITIVE_COUNT,
            "progress": FLAG,
            "chunk_size": POSITIVE_COUNT.or_none(),
        },
        is_quick=False,
    ),
    "replayed_bound": Case(
        watched.replayed_bound,
        lambda: {"pipe": pipe(), "call": case_of("ddpm").call_of_one()},
        BOUND,
        is_quick=False,
    ),
    "plan_costs": Case(
        watched.plan_costs,
        lambda: {"pipe": pipe(), "call": case_of("ddpm").call_of_one(), "rounds": 1},
        {
            "levels": Kind((3, "5", [3], [[-1]], [[1.5]])),
            "layers": Kind((3, "*", [3], [""])),
            "rounds": POSITIVE_COUNT,
        },
        is_quick=False,
    ),
    "MLflowSink": Case(
        mlflow.MLflowSink,
        options={
            "run_id": Kind(("", " ", 3, b"x")),
            "tracking_uri": Kind(("", 3)),
            "model_version": Kind((3, "x", ("x",), ("", 1), ("x", 0), ("x", 1.5), (3, 1))),
            "stage": Kind(("", " ", 3, "a//b", "/a", "../a", "a/.", "a*", "x" * 300)),
            "metrics": FLAG.but(good=()),
            "first_step": COUNT.but(good=()),
        },
        is_quick=False,
    ),
    "flavour.save_model": Case(
        flavour.save_model,
        lambda: {"detector": detector(), "path": "folder", "factory": FACTORY},
        IN_MLFLOW | {"path": PATH},
        is_quick=False,
    ),
    "flavour.log_model": Case(
        flavour.log_model,
        lambda: {"detector": detector(), "name": "detector", "factory": FACTORY},
        IN_MLFLOW | {"name": TEXT, "registered_model_name": TEXT.or_none()},
        is_quick=False,
    ),
    "flavour.load_model": Case(
        flavour.load_model,
        lambda: {"model_uri": "nowhere"},
        {"model_uri": TEXT, "dst_path": PATH.or_none()},
        is_quick=False,
    ),
    "pipelines.denoising_bound": Case(
        pipelines.denoising_bound,
        lambda: {"folder": "folder"},
        {"folder": PATH, "revision": TEXT.or_none()},
        is_quick=False,
    ),
    "pipelines.replayed": Case(
        pipelines.replayed,
        lambda: {"folder": "folder"},
        {"folder": PATH, "revision": TEXT.or_none()},
        is_quick=False,
    ),
    "traces.trace_scores": Case(
        traces.trace_scores,
        lambda: {"scores": om.Scores.none()},
        {"fpr": RATE},
        is_quick=False,
    ),
    "PrometheusSink": Case(
        prometheus.PrometheusSink,
        options={
            "registry": OBJECT,
            "model": TEXT.or_none(),
            "detector": TEXT.or_none(),
            "buckets": Kind((None, 3, "12", [], [2, 1], [1, 1], [math.nan], ["1"]), ([1, 2.5],)),
        },
    ),
    "PrometheusSink.dropped": Case(
        lambda **options: prometheus.PrometheusSink().dropped(**options), options={"count": COUNT}
    ),
}

#: Public, and without options: results, protocols and modules, or a batch is all that they take.
WITHOUT = {
    *("Adapter", "Alert", "Diagnosis", "DiagonalGaussian", "Elements", "Explanation", "Scores"),
    *("latents_and_log_det", "models", "observations"),
    *("Called", "Counts", "DenoiserCall", "Step", "PipelineMonitor", "PlanCost", "ReplayedBound"),
    *("FlaggedBatch", "StageScores", "WatchingPlan", "score_buckets"),
    *("FLAVOR_NAME", "traced_update", "AcceleratorSink", "unpacked"),
}


OPTIONS = [
    pytest.param(case, option, id=f"{name}-{option}")
    for name, case in CASES.items()
    for option in case.options
]


def refusal(case: Case, option: str, value: Any) -> str | None:
    """What is wrong with how a value is refused, if anything is."""
    try:
        case.call(**case.given() | {option: value})
    except (TypeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = last.filename.startswith(OURS) and str(error).startswith("Expected ")
        return None if is_ours else f"{value!r}: {error!r} of {last.filename}"
    except Exception as error:  # of any other kind
        return f"{value!r}: {error!r}"
    return f"{value!r}: taken"


@pytest.mark.parametrize(("case", "option"), OPTIONS)
def test_an_option_that_is_none_is_refused_at_once_by_name(
    case: Case, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [refusal(case, option, value) for value in case.options[option].bad]
    assert not [what for what in found if what is not None]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("case", "option"), [o for o in OPTIONS if o.values[0].is_quick])
def test_an_option_that_is_one_is_taken(
    case: Case, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in case.options[option].good:
        case.call(**case.given() | {option: value})


def test_everything_public_is_here() -> None:
    modules = (
        om,
        watched,
        lightning,
        transformers,
        accelerate,
        mlflow,
        flavour,
        pipelines,
        traces,
        prometheus,
    )
    public = {name for module in modules for name in module.__all__}
    public |= set(densities.DENSITIES) - {"FisherCombination", "OneSided"}
    named = {name.rpartition(".")[2] for name in CASES}
    assert public - named == WITHOUT
