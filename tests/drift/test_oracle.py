"""The drift test's recursions against online-cp's, where `make benchmark-peers` installed it."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta

from ood_monitor.drift.bets import JUMP, Triple, log_power_bet, simple_jumper, smoothed_rank
from ood_monitor.drift.e_detector import EDetector

pytest.importorskip("online_cp", reason="online-cp is not installed: `make benchmark-peers`")

from online_cp.betting import FixedStrategy
from online_cp.classifiers import ConformalClassifier
from online_cp.martingale import PluginMartingale, ShiryaevRobertsWrapper, SimpleJumper

P_VALUES = {
    "uniform": np.random.default_rng(0).random(600),
    "small": np.random.default_rng(1).beta(0.5, 1.0, 600),
    "near 0": np.random.default_rng(2).random(300) ** 40,
    "large": np.random.default_rng(3).beta(3.0, 1.0, 300),
}
SMALL, MIDDLE = beta(0.5, 1.0), beta(2.0, 2.0)  # their densities are the bets


def power(p: NDArray) -> PluginMartingale:
    martingale = PluginMartingale(FixedStrategy(SMALL, check_integration=False))
    for value in p:
        martingale.update(value)
    return martingale


@pytest.mark.parametrize("ties", [False, True])
def test_smoothed_ranks_are_the_oracles(ties: bool) -> None:
    generator = np.random.default_rng(4)
    scores = generator.normal(size=200).round(1 if ties else 15)
    for n in range(1, len(scores)):
        u = generator.random()
        p, complement = smoothed_rank(sorted(scores[:n]), scores[n], u)
        theirs = ConformalClassifier._compute_p_value(scores[: n + 1], u)
        assert math.log(p) == pytest.approx(math.log(theirs), abs=1e-10)
        mirrored = ConformalClassifier._compute_p_value(-scores[: n + 1], 1.0 - u)
        assert math.log(complement) == pytest.approx(math.log(mirrored), abs=1e-10)


@pytest.mark.parametrize("p", P_VALUES.values(), ids=P_VALUES)
def test_the_simple_jumpers_capital_is_the_oracles(p: NDArray) -> None:
    oracle = SimpleJumper(J=JUMP, E=[-1, 0, 1])
    weights: Triple = (1 / 3, 1 / 3, 1 / 3)
    log_capital = 0.0
    for value in p.tolist():
        log_e, weights = simple_jumper(weights, value)
        log_capital += log_e
        oracle.update(value)
        assert log_capital == pytest.approx(oracle.logM, abs=1e-10)


@pytest.mark.parametrize("p", P_VALUES.values(), ids=P_VALUES)
def test_the_power_bets_capital_is_the_oracles(p: NDArray) -> None:
    ours = np.cumsum([log_power_bet(value) for value in p.tolist()])
    np.testing.assert_allclose(ours, power(p).log_martingale_values[1:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.5, -1.0])
def test_the_average_of_four_sums_is_the_oracles(shift: float) -> None:
    generator = np.random.default_rng(5)
    detector = EDetector(generator.normal(size=100), ert=1000.0)
    found = detector.update_many(generator.normal(shift, size=300))
    oracles = [
        ShiryaevRobertsWrapper(PluginMartingale(FixedStrategy(SMALL, check_integration=False))),
        ShiryaevRobertsWrapper(PluginMartingale(FixedStrategy(SMALL, check_integration=False))),
        ShiryaevRobertsWrapper(SimpleJumper(J=JUMP, E=[-1, 0, 1])),
        ShiryaevRobertsWrapper(PluginMartingale(FixedStrategy(MIDDLE, check_integration=False))),
    ]
    for evidence in found:
        p = evidence.p_value
        for oracle, value in zip(oracles, (p, 1.0 - p, p, p), strict=True):
            oracle.update(value)
        mean = sum(oracle.R for oracle in oracles) / 4.0
        assert evidence.log_e_value == pytest.approx(math.log(mean), abs=1e-10)
