"""Drift deciders, each as what it makes of one calibration set: a step from a score to an alarm.

After an alarm a step starts anew, as whoever has looked into it would let it. river (0.26.1) runs
from `requirements-benchmarks.txt`. alibi-detect asks for numpy < 2 but runs with numpy 2.4, in a
throwaway environment, since what it imports is much:

    pip install --no-deps alibi-detect==0.13.0 numba llvmlite catalogue dill toml transformers \
        tokenizers scikit-image tifffile imageio lazy-loader

Evidently 0.7.23 cannot be imported beside pandas 3. Its rule for a numerical column of at most
1 000 reference values, `ks_2samp(reference, window).pvalue < 0.05`, is evaluated by scipy.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from ood_monitor.drift import EDetector

Array: TypeAlias = NDArray[np.float64]
Step: TypeAlias = Callable[[float], bool]
Start: TypeAlias = Callable[[Array, int], Step]

KS_WINDOW, KS_LEVEL = 100, 0.05
CVM_ERT, CVM_WINDOWS = 1000, [20, 50]


@dataclass(frozen=True)
class Method:
    """A decider and how much of it can be run.

    Attributes:
        name: What it is called in the rows.
        start: From calibration scores and a seed to a step.
        ert: The run length that it promises, if any.
        in_control: Streams without a change.
        cap: The longest of these, in samples.
        changed: Streams with each change.
        lead: Samples of them that it sees before the change; one that looks back at no more than
            100 samples need not see all.
    """

    name: str
    start: Start
    ert: float | None = None
    in_control: int = 200
    cap: int = 20_000
    changed: int = 300
    lead: int = 1000


def ours(ert: float) -> Start:
    def start(calibration: Array, seed: int) -> Step:
        detector = EDetector(calibration, ert=ert, seed=seed)

        def step(score: float) -> bool:
            alarm = detector.update(score).alarm
            if alarm:
                detector.restart()
            return alarm

        return step

    return start


def river(name: str, *, shown: int = 0, **options: Any) -> Start:
    """A detector of river's, which starts anew by itself and needs no reference.

    Args:
        name: Of its class.
        shown: So many of the latest calibration scores come before the stream.
        options: Other than its defaults.
    """
    make = getattr(import_module("river.drift"), name)

    def start(calibration: Array, seed: int) -> Step:
        detector = make(**({"seed": seed} if name == "KSWIN" else {}), **options)

        def step(score: float) -> bool:
            detector.update(score)
            return bool(detector.drift_detected)

        for score in calibration[len(calibration) - shown :].tolist():
            step(score)
        return step

    return start


def evidently_rule(level: float = KS_LEVEL) -> Start:
    """Every full window against the calibration scores, without memory."""

    def start(calibration: Array, seed: int) -> Step:
        window: list[float] = []

        def step(score: float) -> bool:
            window.append(score)
            if len(window) < KS_WINDOW:
                return False
            alarm = ks_2samp(calibration, window).pvalue < level
            window.clear()
            return bool(alarm)

        return step

    return start


def alibi_cvm(bootstraps: int) -> Start:
    """alibi-detect's online Cramér-von Mises test.

    Its thresholds depend on the number of calibration scores but not on the scores, and take 14 s:
    so they are simulated once, and each stream puts its own scores in.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make = import_module("alibi_detect.cd").CVMDriftOnline
    made: dict[int, Any] = {}

    def start(calibration: Array, seed: int) -> Step:
        n = len(calibration)
        if n not in made:
            options = {"n_bootstraps": bootstraps, "verbose": False}
            made[n] = make(calibration, ert=CVM_ERT, window_sizes=CVM_WINDOWS, **options)
        detector = made[n]
        detector.x_ref = calibration[:, None]
        detector._configure_ref()
        detector.reset_state()
        return cvm_step(detector)

    return start


def cvm_step(detector: Any) -> Step:
    def step(score: float) -> bool:
        alarm = bool(detector.predict(np.array([score]))["data"]["is_drift"])
        if alarm:
            detector.reset_state()
        return alarm

    return step


def peers(quick: bool) -> tuple[list[Method], list[str]]:
    """The peers that are installed, and a line for each that is not."""
    methods = [Method(f"KS p < {KS_LEVEL} every {KS_WINDOW} (Evidently's rule)", evidently_rule())]
    skipped = []
    if find_spec("river"):
        methods += [
            Method("river ADWIN", river("ADWIN"), cap=60_000),
            Method("river PageHinkley", river("PageHinkley")),
            Method("river KSWIN", river("KSWIN"), in_control=60, changed=60, lead=200),
        ]
    else:
        skipped.append("river is not installed: ADWIN, PageHinkley and KSWIN are skipped.")
    if quick:
        skipped.append("alibi-detect's CVM is skipped: it takes 14 s to set up, and this is quick.")
    elif find_spec("alibi_detect"):
        small = {"in_control": 60, "cap": 10_000, "changed": 40, "lead": 200}
        methods.append(Method("alibi-detect CVM", alibi_cvm(10_000), CVM_ERT, **small))
    else:
        skipped.append("alibi-detect is not installed: its CVM is skipped.")
    return methods, skipped
