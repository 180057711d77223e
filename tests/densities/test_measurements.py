"""What a pass over samples gives: cut, joined, and sent elsewhere."""

import numpy as np
import pytest
import torch
from support.small_cases import SMALL
from torch import Tensor

import ood_monitor as om
from ood_monitor.densities.measurements import Measurements

BRANCHES = SMALL["branches"]
X = BRANCHES.data(100)


def by_sign(x: Tensor) -> list[str]:
    return ["up" if value > 0 else "down" for value in x[:, 0]]


def detector() -> om.Detector:
    return om.Detector(BRANCHES(), groups=by_sign, minimum_group=20)


def same(a: om.Detector, b: om.Detector) -> bool:
    new = BRANCHES.data(20, seed=1)
    p = [each.score(new).p_value for each in (a, b)]
    return a.fitted.fingerprint == b.fitted.fingerprint and torch.equal(*p)


def test_measured_parts_fit_the_detector_that_their_batches_do() -> None:
    parts = [detector().measure(batch, explain=30) for batch in X.split(30)]
    whole = detector().fit(X.split(30), progress=False)
    assert same(detector().fit_measured(Measurements.together(parts)), whole)


def test_parts_of_two_processes_are_put_in_order() -> None:
    even, odd = (Measurements.parse(detector().measure(X[i::2]).dump()) for i in (0, 1))
    order = np.arange(100).reshape(2, 50).T.ravel()  # 0, 50, 1, 51, ...
    together = Measurements.together([even, odd]).take(order)
    whole = detector().measure(X)
    assert together.groups == whole.groups
    np.testing.assert_allclose(together.norms, whole.norms, rtol=1e-9)
    np.testing.assert_allclose(together.log_likelihood, whole.log_likelihood, rtol=1e-9)


def test_dumped_samples_come_back_whole() -> None:
    measured = detector().measure(X)
    again = Measurements.parse(measured.dump())
    assert again.dump() == measured.dump()
    assert (again.terms, again.features, again.samples, again.groups) == (
        measured.terms,
        measured.features,
        measured.samples,
        measured.groups,
    )


@pytest.mark.parametrize("keep", [0, 20, 300])
def test_a_damaged_dump_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="Expected measured samples, got"):
        Measurements.parse(detector().measure(X).dump()[:keep])


def test_samples_of_other_layers_do_not_mix() -> None:
    some = om.Detector(BRANCHES(), layers=["left.*"]).measure(X)
    with pytest.raises(ValueError, match="same terms and layers"):
        Measurements.together([om.Detector(BRANCHES()).measure(X), some])
