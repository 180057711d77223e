"""What a report judges: a case is a stream or held-out samples, and the verdict that is right."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from support.cli_cases import flow, grey_images

import ood_monitor as om
from ood_monitor.report.course import Drift, drift_of
from ood_monitor.report.findings import Finding, findings_of
from ood_monitor.report.samples import HeldOut, Stream
from ood_monitor.saving import Fitted


@functools.cache
def fitted() -> Fitted:
    images = torch.tensor(grey_images(240) / 255, dtype=torch.float32).unsqueeze(1)
    return om.Detector(flow()).fit([images], progress=False).fitted


def known() -> np.ndarray:
    return fitted().calibration.scores


def usual(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(known(), count)


@functools.cache
def rising() -> np.ndarray:
    """A stream whose evidence rises to its end, one sample short of an alarm."""
    scores = np.concatenate([usual(100), np.full(60, np.quantile(known(), 0.95))])
    drift = drift_of(fitted(), stream_of(scores), ert=10_000, fpr=0.05)
    assert drift is not None
    return scores[: drift.alarms[0] - 1]


def stream_of(scores: np.ndarray, **known: object) -> Stream:
    stream = Stream(
        name="s",
        ids=[str(i) for i in range(len(scores))],
        score=scores,
        p_value=fitted().calibration.p_value(scores),
        top_layers=[None] * len(scores),
    )
    return replace(stream, **known)  # type: ignore[arg-type]


def z(count: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, 1.0, count)


@dataclass(frozen=True)
class Case:
    """What is judged, and of the finding whose sentence or figures hold `about`, its verdict."""

    about: str
    verdict: str
    scores: Callable[[], np.ndarray] | None = None
    held_out: HeldOut | None = None
    fpr: float = 0.05
    told: float | None = None


CASES: dict[str, Case] = {
    "a usual stream": Case("looks like the samples", "good", lambda: usual(300)),
    "evidence that rises to the end": Case("keep watching", "note", rising),
    "evidence that has fallen again": Case(
        "for a while", "note", lambda: np.concatenate([rising()[:-1], usual(300, 1)])
    ),
    "an alarm": Case("since about sample", "problem", lambda: np.full(100, known()[-1])),
    "a stream too short for an alarm": Case("too short", "unknown", lambda: usual(3)),
    "a stream without a score": Case(
        "has changed cannot be told", "unknown", lambda: np.full(3, math.nan)
    ),
    "no stream": Case("There is no sample", "unknown", lambda: np.zeros(0)),
    "few samples": Case("There are too few samples", "unknown", lambda: usual(5)),
    "enough samples": Case("No more samples are flagged", "good", lambda: usual(300)),
    "many flags": Case("More samples are anomalous", "problem", lambda: np.full(9, known()[-1])),
    "none can be flagged": Case("as none can be flagged", "unknown", lambda: usual(149), fpr=0.001),
    "too few calibration samples": Case("too few normal samples", "problem", fpr=0.001),
    "just enough calibration samples": Case("just enough normal", "note", fpr=0.01),
    "enough calibration samples": Case("seen enough normal", "good"),
    "features that are left out": Case("does not look at them", "note"),
    "held-out samples without a layer": Case("cannot be told", "unknown", held_out=HeldOut({})),
    "no held-out sample": Case("cannot be told", "unknown", held_out=HeldOut({"a": z(0)})),
    "few held-out samples": Case("cannot be told", "unknown", held_out=HeldOut({"a": z(3)})),
    "a layer that says nothing": Case(
        "nobody can tell", "unknown", held_out=HeldOut({"a": np.full(50, math.nan), "b": z(50)})
    ),
    "layers that fit": Case("fits normal samples.", "good", held_out=HeldOut({"a": z(50)})),
    "one of ten layers that does not": Case(
        "but for a few", "note", held_out=HeldOut({str(i): z(99, 3.0 * (i == 4)) for i in range(9)})
    ),
    "layers that do not": Case("are not like those", "problem", held_out=HeldOut({"a": z(50, 3)})),
    "a diagnosis that was not made": Case(
        "was not examined", "unknown", held_out=HeldOut({"a": z(50)}, "too few samples")
    ),
    "a file of another rate": Case("at fpr 0.2", "note", lambda: usual(300), told=0.2),
}


def found(case: Case) -> list[Finding]:
    stream, drift = None, None
    if case.scores is not None:
        stream = stream_of(case.scores(), fpr=case.told)
        drift = drift_of(fitted(), stream, ert=10_000, fpr=case.fpr)
    return findings_of(fitted(), case.held_out, stream, drift, fpr=case.fpr, ert=10_000)


@pytest.mark.parametrize("name", CASES)
def test_a_finding_has_the_right_verdict(name: str) -> None:
    case = CASES[name]
    findings = found(case)
    [verdict] = {it.verdict for it in findings if case.about in f"{it.text} {it.detail}"}
    assert verdict == case.verdict, findings
    order = ["problem", "unknown", "note", "good"]
    assert [order.index(it.verdict) for it in findings] == sorted(
        order.index(it.verdict) for it in findings
    )


@pytest.mark.parametrize("name", CASES)
def test_each_finding_is_one_plain_sentence_and_figures_beside_it(name: str) -> None:
    """Words that only statisticians know stand in the figures."""
    for finding in found(CASES[name]):
        assert finding.text[0].isupper()
        assert finding.text.endswith(".")
        assert ". " not in finding.text
        assert len(finding.text) < 110
        found_words = re.findall(r"e\^|%|[\w-]+", finding.text)
        for word in ("e^", "p-value", "Kolmogorov", "fpr", "ert", "correlation", "%"):
            assert word not in found_words
        assert finding.detail


def test_the_chance_of_as_much_evidence_holds_in_normal_streams() -> None:
    """Of 400 of 200 samples, at most a share c reaches evidence of chance c, but for sampling."""
    calibration = np.random.default_rng(0).normal(size=400)
    reached = []
    for seed in range(400):
        test = om.EDetector(calibration, ert=10_000, seed=seed)
        scores = np.random.default_rng(1000 + seed).normal(size=200)
        values = np.array([it.log_e_value for it in test.update_many(scores)])
        drift = Drift(values, np.arange(1, 201), (), "OK", is_long_enough=True)
        reached.append(min(drift.chance(sample) for sample in (100, 200)))
    for chance in (0.05, 0.1, 0.3):
        assert np.mean(np.array(reached) <= chance) <= chance * 1.5


def halves(batch: torch.Tensor) -> list[str]:
    return ["dark" if sample.mean() < 0.5 else "light" for sample in batch]


def test_without_its_groups_a_stream_of_a_detector_with_groups_is_not_judged() -> None:
    images = torch.tensor(grey_images(400) / 255, dtype=torch.float32).unsqueeze(1)
    detector = om.Detector(flow(), groups=halves, minimum_group=50).fit([images], progress=False)
    learned, scores = detector.fitted, detector.score(images[:150])
    assert scores.group is not None
    stream = stream_of(scores.score.numpy())
    assert drift_of(learned, stream, ert=10_000, fpr=0.05) is None
    findings = findings_of(learned, None, stream, None, fpr=0.05, ert=10_000)
    [finding] = [it for it in findings if "has changed" in it.text]
    assert finding.verdict == "unknown"
    assert "groups" in finding.detail
    drift = drift_of(learned, replace(stream, groups=scores.group.numpy()), ert=10_000, fpr=0.05)
    assert drift is not None
    with om.Monitor(detector, fpr=0.05) as monitor:
        monitor.observe(scores)
    assert drift.value(drift.last) == monitor.log_e_value


def test_the_smallest_p_value_is_that_of_a_group() -> None:
    images = torch.tensor(grey_images(400) / 255, dtype=torch.float32).unsqueeze(1)
    detector = om.Detector(flow(), groups=halves, minimum_group=50).fit([images], progress=False)
    learned = detector.fitted
    assert learned.grouped is not None
    together, largest = len(learned.calibration.scores), learned.grouped.most
    fpr = 1.5 / (together + 1)
    assert largest < 1 / fpr - 1
    [finding] = [
        it
        for it in findings_of(learned, None, None, None, fpr=fpr, ert=10_000)
        if it.verdict == "problem"
    ]
    assert f"{largest:,} calibration samples in the largest group" in finding.detail
