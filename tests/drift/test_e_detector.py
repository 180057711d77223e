"""The drift test against loops, integrals, linear-space recursions and simulation."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.stats import kstest

from ood_monitor.calibration.conformal import autocorrelation_bound, lag1_autocorrelation
from ood_monitor.drift import Evidence, pooled_log_e_value
from ood_monitor.drift.bets import (
    JUMP,
    Sums,
    Triple,
    log1p_exp,
    log_mean_exp,
    log_middle_bet,
    log_power_bet,
    simple_jumper,
    smoothed_rank,
)
from ood_monitor.drift.e_detector import EDetector

EQUAL_WEIGHTS: Triple = (1 / 3, 1 / 3, 1 / 3)
LAWS: dict[str, Callable[[NDArray], NDArray]] = {
    "continuous": lambda z: z,
    "heavy tails": lambda z: np.sinh(20.0 * z),
    "tied": np.round,
    "constant": lambda z: 0.0 * z,
}
CHANGES: dict[str, Callable[[np.random.Generator, NDArray], NDArray]] = {
    "mean": lambda generator, z: z + 1.0,
    "too small": lambda generator, z: z - 1.0,
    "variance": lambda generator, z: 1.5 * z,
    "contamination": lambda generator, z: z + 3.0 * (generator.random(len(z)) < 0.1),
}


def normal_detector(m: int = 100, ert: float = 1000.0, **options: int) -> EDetector:
    return EDetector(np.random.default_rng(0).normal(size=m), ert=ert, **options)


def normal_stream(n: int, seed: int = 1) -> NDArray:
    return np.random.default_rng(seed).normal(size=n)


def p_values(evidence: list[Evidence]) -> NDArray:
    return np.array([one.p_value for one in evidence])


# Sequential ranks


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("u", [2.0**-53, 0.3, 1.0 - 2.0**-53])
def test_smoothed_rank_equals_loop(law: Callable[[NDArray], NDArray], u: float) -> None:
    history, scores = law(normal_stream(30)), law(normal_stream(40, seed=2))
    for score in scores:
        p, complement = smoothed_rank(sorted(history), score, u)
        greater, tied = sum(h > score for h in history), sum(h == score for h in history)
        assert p == (greater + u * (1 + tied)) / 31
        assert complement == pytest.approx(1.0 - p, abs=1e-15)


@pytest.mark.parametrize("score", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("u", [2.0**-53, 1.0 - 2.0**-53])
def test_no_rank_is_zero(score: float, u: float) -> None:
    p, complement = smoothed_rank([0.0] * 100, score, u)
    assert 0.0 < p <= 1.0
    assert 0.0 < complement <= 1.0
    assert math.isfinite(log_power_bet(p) + log_power_bet(complement))


def test_no_tie_breaker_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = normal_detector()
    monkeypatch.setattr(detector._ties, "_draw", np.random.Generator(ZeroBits().bits).random)
    evidence = detector.update(1e9)
    assert evidence.p_value > 0.0
    assert math.isfinite(evidence.log_e_value)


class ZeroBits:
    """PCG64 in the one state in which the next draw is 0."""

    def __init__(self) -> None:
        self.bits = np.random.PCG64(0)
        state = self.bits.state
        # The output function maps state 0 to 0, and this state steps to 0.
        inverse = pow(0x2360ED051FC65DA44385DF649FCCF645, -1, 2**128)
        state["state"]["state"] = -state["state"]["inc"] * inverse % 2**128
        self.bits.state = state


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("max_history", [100, 600, 5000], ids="history={}".format)
def test_detector_ranks_against_calibration_and_past(
    law: Callable[[NDArray], NDArray], max_history: int
) -> None:
    calibration, stream = law(normal_stream(100)), law(normal_stream(1000, seed=2))
    detector = EDetector(calibration, ert=1000, max_history=max_history)
    u = []
    for t, (score, p) in enumerate(
        zip(stream, p_values(detector.update_many(stream)), strict=True)
    ):
        history = np.r_[calibration, stream[:t]][:max_history]
        greater, tied = np.sum(history > score), np.sum(history == score)
        u.append((p * (len(history) + 1) - greater) / (1 + tied))
    assert kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_sequential_ranks_are_uniform_and_independent(law: Callable[[NDArray], NDArray]) -> None:
    # Few calibration scores, so that ranks against these alone would fail.
    p = []
    for seed in range(100):
        scores = law(normal_stream(220, seed=seed))
        detector = EDetector(scores[:20], ert=1000, seed=seed)
        p.append(p_values(detector.update_many(scores[20:])))
    assert kstest(np.concatenate(p), "uniform").pvalue > 1e-3
    # Dependent ranks have the right mean over streams, but means that vary too much.
    assert np.var([one.mean() for one in p]) < 1.5 / 12 / 200
    assert abs(lag1_autocorrelation(np.concatenate(p))) < autocorrelation_bound(20_000)


def test_tie_breakers_are_not_those_of_the_users_generator() -> None:
    p = p_values(EDetector(np.zeros(20), ert=10, seed=0).update_many(np.zeros(10)))
    assert np.all(np.abs(p - np.random.default_rng(0).random(10)) > 1e-6)
    assert np.all(np.abs(p + np.random.default_rng(0).random(10) - 1.0) > 1e-6)


def test_seed_decides_tie_breakers() -> None:
    first, same, other = (normal_detector(seed=seed).update(0.0).p_value for seed in (3, 3, 4))
    assert first == same != other


# Bets


@pytest.mark.parametrize(
    "log_e",
    [
        log_power_bet,
        lambda p: log_power_bet(1.0 - p),
        lambda p: log_middle_bet(p, 1.0 - p),
        lambda p: simple_jumper(EQUAL_WEIGHTS, p)[0],
        lambda p: simple_jumper((0.9, 0.1, 0.0), p)[0],
        lambda p: simple_jumper((0.0, 0.0, 1.0), p)[0],
    ],
    ids=["large", "small", "middle", "jumper", "jumper on small p", "jumper on large p"],
)
def test_bet_is_an_e_value(log_e: Callable[[float], float]) -> None:
    mean, error = quad(lambda p: math.exp(log_e(p)), 0.0, 1.0, epsabs=1e-10)
    assert mean == pytest.approx(1.0, abs=1e-8)
    assert error < 1e-7


def test_simple_jumper_equals_its_algorithm() -> None:
    # Vovk et al. (2021), Algorithm 1, with the capital itself.
    p, weights, log_capital = np.random.default_rng(0).random(300), EQUAL_WEIGHTS, 0.0
    capital = np.full(3, 1 / 3)
    for p_n in p:
        capital = (1.0 - JUMP) * capital + JUMP / 3 * capital.sum()
        capital *= 1.0 + np.array([-1.0, 0.0, 1.0]) * (p_n - 0.5)
        log_e, weights = simple_jumper(weights, p_n)
        log_capital += log_e
        assert log_capital == pytest.approx(np.log(capital.sum()), abs=1e-12)
        np.testing.assert_allclose(weights, capital / capital.sum(), rtol=1e-12)


# Sums


@pytest.mark.parametrize("x", [-1000.0, -40.0, -1.0, 0.0, 1.0, 40.0, 1000.0])
def test_log1p_exp(x: float) -> None:
    assert log1p_exp(x) == pytest.approx(np.logaddexp(0.0, x), rel=1e-15)


@pytest.mark.parametrize(
    "x", [(1.0, 2.0, 3.0, 4.0), (-2000.0, -2001.0, -1999.0, -2002.0), (0.0, 900.0, 2e4, -1.0)]
)
def test_log_mean_exp(x: Sums) -> None:
    assert log_mean_exp(x) == pytest.approx(np.logaddexp.reduce(x) - math.log(4), rel=1e-14)


@pytest.mark.parametrize("shift", [0.0, 0.5, -1.0])
def test_sums_equal_recursion_in_linear_space(shift: float) -> None:
    evidence = normal_detector().update_many(normal_stream(100) + shift)
    sums, capital = np.zeros(4), np.full(3, 1 / 3)
    for t, one in enumerate(evidence, start=1):
        p = one.p_value
        before = capital.sum()
        capital = (1.0 - JUMP) * capital + JUMP / 3 * before
        capital *= 1.0 + np.array([-1.0, 0.0, 1.0]) * (p - 0.5)
        powers = [0.5 / math.sqrt(p), 0.5 / math.sqrt(1.0 - p)]
        e = np.array([*powers, capital.sum() / before, 6.0 * p * (1.0 - p)])
        sums = (1.0 + sums) * e
        assert one.log_e_value == pytest.approx(math.log(sums.mean()), abs=1e-12)
        assert one.n == t
        assert one.alarm == (sums.mean() >= 1000.0)


def test_alarm_is_at_the_threshold() -> None:
    reached = math.exp(normal_detector().update_many(np.full(3, 9.0))[-1].log_e_value)
    below, above = (
        normal_detector(ert=factor * reached).update_many(np.full(3, 9.0))[-1].alarm
        for factor in (1.0 - 1e-9, 1.0 + 1e-9)
    )
    assert below
    assert not above


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_score_ranks_beyond_all(sign: float) -> None:
    stream = np.array([0.3, sign * math.inf, -0.2, sign * math.inf])
    single, many, finite = normal_detector(), normal_detector(), normal_detector()
    evidence = many.update_many(stream)
    assert [single.update(score) for score in stream] == evidence
    assert evidence == finite.update_many(np.clip(stream, -1e300, 1e300))
    state = json.loads(json.dumps(many.state_dict(), allow_nan=False))
    single.load_state_dict(state)
    assert single.update_many(stream) == many.update_many(stream)


@pytest.mark.parametrize("score", [1e300, -1e300])
def test_evidence_stays_finite(score: float) -> None:
    evidence = normal_detector(max_history=200).update_many(np.full(20_000, score))
    assert all(math.isfinite(one.log_e_value) for one in evidence)
    assert evidence[-1].log_e_value > 800.0, "beyond what a float holds outside the log"


# The promise, and what it costs


def run_lengths(
    runs: int,
    cap: int,
    law: Callable[[NDArray], NDArray] = LAWS["continuous"],
    m: int = 100,
    ert: float = 200.0,
    max_history: int = 5000,
) -> NDArray:
    """Samples to the first alarm of streams in control: less than the truth beyond the cap."""
    lengths = []
    for seed in range(runs):
        scores = law(normal_stream(m + cap, seed=seed))
        detector = EDetector(scores[:m], ert=ert, seed=seed, max_history=max_history)
        alarms = (t for t, score in enumerate(scores[m:], 1) if detector.update(score).alarm)
        lengths.append(next(alarms, cap))
    return np.array(lengths)


def surely(lengths: NDArray) -> float:
    """A mean that the true one is above, at three standard errors."""
    return float(lengths.mean() - 3.0 * lengths.std() / math.sqrt(len(lengths)))


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_mean_run_length_is_as_promised(law: Callable[[NDArray], NDArray]) -> None:
    lengths = run_lengths(runs=250, cap=2000, law=law)
    assert surely(lengths) >= 200.0, lengths.mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "max_history"), [(500, 5000), (20, 5000), (5000, 5000)], ids=["grows", "few", "frozen"]
)
def test_mean_run_length_is_as_promised_for_longer(m: int, max_history: int) -> None:
    lengths = run_lengths(runs=300, cap=10_000, m=m, ert=1000.0, max_history=max_history)
    assert surely(lengths) >= 1000.0, lengths.mean()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("seed", range(5))
def test_change_is_found(
    change: Callable[[np.random.Generator, NDArray], NDArray], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    detector = EDetector(generator.normal(size=2000), ert=10_000, seed=seed)
    before = detector.update_many(generator.normal(size=300))
    after = detector.update_many(change(generator, generator.normal(size=500)))
    assert not any(one.alarm for one in before)
    assert any(one.alarm for one in after)


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: x + 1.0,
        lambda x: x - 1.0,
        lambda x: 2.0 * x,
        lambda x: 0.5 * x,
        lambda x: np.where(np.arange(len(x)) % 5 == 0, 3.0, x),
    ],
    ids=["larger", "smaller", "wider", "narrower", "contaminated"],
)
def test_every_kind_of_change_is_seen(changed: Callable[[NDArray], NDArray]) -> None:
    detector = EDetector(normal_stream(500, seed=1), ert=1000.0)
    detector.update_many(normal_stream(100, seed=2))
    after = detector.update_many(changed(normal_stream(200, seed=3)))
    assert any(one.alarm for one in after)


def test_restart_begins_an_episode() -> None:
    detector, fresh = normal_detector(), normal_detector().update(0.3)
    detector.update_many(normal_stream(50) + 3.0)
    detector.restart()
    began = detector.update(0.3)
    assert began.n == 1
    # The same rank, but the tie-breakers have gone on.
    assert int(began.p_value * 101) == int(fresh.p_value * 101)
    assert began.p_value != fresh.p_value
    assert began.log_e_value < math.log(20.0)
    assert detector.state_dict()["stream"] == [0.3]


def test_restart_sees_what_the_history_hides() -> None:
    stream, detector = normal_stream(3000) + 1.0, normal_detector(ert=10_000)
    detector.update_many(stream[:2000])
    hidden = p_values(detector.update_many(stream[2000:])).mean()
    detector.restart()
    assert p_values(detector.update_many(stream[:50])).mean() < hidden - 0.1


# Batches and state


@given(cuts=st.lists(st.integers(0, 60), max_size=5))
@settings(deadline=None, max_examples=30)
def test_batches_equal_singles(cuts: list[int]) -> None:
    stream = np.round(normal_stream(60), 1)
    singles, batches = normal_detector(), normal_detector()
    expected = [singles.update(score) for score in stream]
    actual = [e for part in np.split(stream, sorted(cuts)) for e in batches.update_many(part)]
    assert actual == expected


@pytest.mark.parametrize("score", [1, np.float32(1.0), np.float64(1.0)], ids=type)
def test_update_takes_any_real_number(score: float) -> None:
    evidence = normal_detector().update(score)
    assert evidence == normal_detector().update(1.0)
    assert type(evidence.p_value) is type(evidence.log_e_value) is float
    assert type(evidence.alarm) is bool


@given(at=st.integers(0, 150), max_history=st.sampled_from([1, 150, 5000]))
@settings(deadline=None, max_examples=30)
def test_resumes_to_the_bit(at: int, max_history: int) -> None:
    stream = np.round(normal_stream(150), 2)
    detector = normal_detector(max_history=max_history)
    detector.update_many(stream[:at])
    state = json.loads(json.dumps(detector.state_dict(), allow_nan=False))
    resumed = normal_detector(max_history=max_history, seed=99)
    resumed.update_many(stream[:7])
    resumed.load_state_dict(state)
    assert resumed.update_many(stream[at:]) == detector.update_many(stream[at:])
    assert resumed.state_dict() == detector.state_dict()


def test_resumes_in_a_second_episode() -> None:
    detector, resumed = normal_detector(), normal_detector()
    detector.update_many(normal_stream(20))
    detector.restart()
    detector.update_many(normal_stream(20, seed=2))
    resumed.load_state_dict(detector.state_dict())
    assert resumed.update(0.5) == detector.update(0.5)


def test_state_is_a_copy() -> None:
    detector = normal_detector()
    state = detector.state_dict()
    detector.update_many(normal_stream(20))
    assert state == normal_detector().state_dict()
    loaded = normal_detector()
    loaded.load_state_dict(state)
    state["stream"].append(1.0)
    assert loaded.state_dict() == normal_detector().state_dict()


def test_state_holds_no_calibration_scores() -> None:
    assert len(json.dumps(normal_detector(m=4000).state_dict())) < 1000
    detector = normal_detector(max_history=120)
    stream = normal_stream(50)
    detector.update_many(stream)
    assert detector.state_dict()["stream"] == stream[:20].tolist()


def test_calibration_scores_are_a_set() -> None:
    scores = np.r_[normal_stream(100), 0.0]
    detector = EDetector(scores, ert=1000)
    detector.update(0.1)
    reordered = EDetector(np.r_[-0.0, scores[:-1][::-1]], ert=1000)
    reordered.load_state_dict(detector.state_dict())
    assert reordered.update(0.2) == detector.update(0.2)


def test_calibration_scores_are_copied() -> None:
    scores = normal_stream(100)
    given_scores, detector = scores.copy(), EDetector(scores, ert=1000)
    np.testing.assert_array_equal(scores, given_scores)
    scores[:] = 0.0
    assert detector.update(0.1) == EDetector(given_scores, ert=1000).update(0.1)


# Refusals


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (normal_detector(m=101), r"another calibration: expected \w{64}, got \w{64}"),
        (normal_detector(ert=999.0), "another ert: expected 1000.0, got 999.0"),
        (normal_detector(max_history=7), "another max_history: expected 5000, got 7"),
    ],
    ids=["calibration", "ert", "max_history"],
)
def test_refuses_state_of_another(other: EDetector, message: str) -> None:
    assert_refused(other.state_dict(), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "another format: expected 4, got 1"),
        ({"format": None}, "another format: expected 4, got None"),
        ({"weights": [0.5, 0.5]}, "Malformed drift state: .*at least 3 scores"),
        ({"weights": [0.25] * 4}, "Malformed drift state: .*too many"),
        ({"log1p_sums": [0.0, math.nan, 0.0, 0.0]}, "Malformed drift state: .*finite"),
        ({"log1p_sums": None}, "Malformed drift state"),
        ({"stream": ["x", 0.0]}, "Malformed drift state: .*could not convert"),
        ({"stream": [0.0]}, "Malformed drift state: .*1 scores after 2 samples"),
        ({"n": None}, "Malformed drift state: TypeError"),
        ({"generator": {"state": "1"}}, "Malformed drift state: KeyError.*inc"),
        ({"generator": {"state": "-1", "inc": "1"}}, "Malformed drift state"),
        ({"generator": {"state": "x", "inc": "1"}}, "Malformed drift state: ValueError"),
    ],
)
def test_refuses_malformed_state(change: dict[str, Any], message: str) -> None:
    other = normal_detector()
    other.update_many([0.1, 0.2])
    assert_refused(other.state_dict() | change, message)


@pytest.mark.parametrize("key", ["format", "calibration", "ert", "max_history"])
def test_refuses_state_without(key: str) -> None:
    state = normal_detector().state_dict()
    del state[key]
    assert_refused(state, f"another {key}: expected .*, got None")


@pytest.mark.parametrize("key", ["n", "log1p_sums", "weights", "stream", "generator"])
def test_refuses_incomplete_state(key: str) -> None:
    state = normal_detector().state_dict()
    del state[key]
    assert_refused(state, f"Malformed drift state: KeyError.*{key}")


def assert_refused(state: dict[str, Any], message: str) -> None:
    detector = normal_detector()
    detector.update_many(normal_stream(10))
    before = detector.state_dict()
    with pytest.raises(ValueError, match=message):
        detector.load_state_dict(state)
    assert detector.state_dict() == before


def test_refuses_nan() -> None:
    detector = normal_detector()
    detector.update(0.5)
    before = detector.state_dict()
    with pytest.raises(ValueError, match="Expected a score that is a number, got nan"):
        detector.update(math.nan)
    with pytest.raises(ValueError, match="Expected finite scores, got 1 of 3"):
        detector.update_many([0.0, 1.0, math.nan])
    assert detector.state_dict() == before


def test_refuses_shape() -> None:
    detector = normal_detector()
    before = detector.state_dict()
    with pytest.raises(ValueError, match=r"Expected scores of shape \(n,\), got shape \(2, 1\)"):
        detector.update_many(np.zeros((2, 1)))
    assert detector.state_dict() == before


@pytest.mark.parametrize("ert", [1.9, 0.0, -5.0, math.nan, math.inf])
def test_refuses_ert(ert: float) -> None:
    with pytest.raises(ValueError, match=r"Expected (ert in \[2, inf\]|a finite ert), got"):
        normal_detector(ert=ert)


@pytest.mark.parametrize("max_history", [0, -1])
def test_refuses_max_history(max_history: int) -> None:
    with pytest.raises(ValueError, match="Expected max_history of at least 1, got"):
        normal_detector(max_history=max_history)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "Expected at least 20 scores, got 0"),
        (np.zeros((30, 2)), r"got shape \(30, 2\)"),
        ([math.nan] * 30, "Expected finite scores, got 30 of 30"),
    ],
)
def test_refuses_calibration_scores(scores: NDArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDetector(scores, ert=1000)


# Several workers


def test_pooled_e_value_is_the_mean_of_e_values() -> None:
    logs = np.log([1.0, 5.0, 0.3])
    assert pooled_log_e_value(logs) == pytest.approx(np.log(6.3 / 3))
    assert pooled_log_e_value([-math.inf, math.log(4.0)]) == pytest.approx(math.log(2.0))
    assert pooled_log_e_value([2000.0, 0.0]) == pytest.approx(2000.0 - math.log(2))


@pytest.mark.parametrize("values", [[], [0.0, math.nan]])
def test_no_worker_or_nan_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="log e-values of at least one worker, got"):
        pooled_log_e_value(values)


def pooled_run(seed: int, ert: float, shift: float = 0.0, workers: int = 3) -> int:
    """Samples of each worker to the common alarm, one calibration set and a stream for each."""
    generator = np.random.default_rng(seed)
    calibration = generator.normal(size=200)
    detectors = [EDetector(calibration, ert=ert, seed=i) for i in range(workers)]
    for n in itertools.count(1):
        logs = [d.update(generator.normal(shift)).log_e_value for d in detectors]
        if pooled_log_e_value(logs) >= math.log(ert) or n == 20 * ert:
            return n
    raise AssertionError


def test_workers_keep_the_promise_together() -> None:
    runs = np.array([pooled_run(seed, ert=60) for seed in range(60)])
    assert runs.mean() > 60 - 3 * runs.std() / math.sqrt(60)


def test_workers_see_together_what_each_would_see_later() -> None:
    together = [pooled_run(seed, ert=1000, shift=0.8) for seed in range(15)]
    alone = [pooled_run(seed, ert=1000, shift=0.8, workers=1) for seed in range(15)]
    assert np.median(together) <= np.median(alone)
