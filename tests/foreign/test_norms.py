"""Norms of models of other packages are those of a backward pass for each sample.

In an environment of its own: `make test-foreign`. Elsewhere nothing here is collected.
"""

import pytest
import torch
from torch import Tensor

import ood_monitor as om
from benchmarks.foreign import FOREIGN, Foreign
from benchmarks.foreign.case import exact_norms, worst_error
from ood_monitor.adapters.base import tensors_in
from ood_monitor.gradients import ways

pytest.importorskip("sbi", reason="these packages are in the environment of `make test-foreign`")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are many

#: Those whose experts are computed in groups, which is there in single precision alone.
GROUPED = [case for case in FOREIGN if "experts" in case.small]


def named(case: Foreign) -> str:
    return case.name


def test_there_are_forty_of_them_and_none_twice() -> None:
    names = [case.name for case in FOREIGN]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize("case", FOREIGN, ids=named)
def test_a_case_is_made_anew_with_the_same_weights_and_samples(case: Foreign) -> None:
    (first, batch), (second, again) = case.made_small(3), case.made_small(3)
    for made, other in zip(
        first.module.state_dict().values(), second.module.state_dict().values(), strict=True
    ):
        assert torch.equal(made, other)
    for made, other in zip(tensors_in(batch), tensors_in(again), strict=True):
        assert torch.equal(made, other)


@pytest.mark.parametrize("alone", [True, False], ids=["by vmap alone", "by all ways"])
@pytest.mark.parametrize("case", FOREIGN, ids=named)
def test_norms_are_those_of_a_loop_of_autograd(
    case: Foreign, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not alone:
        monkeypatch.setattr(ways, "is_quick_alone", lambda *_: False)
    adapter, batch = case.made_small()
    exact = exact_norms(adapter, batch)
    assert all(values.isfinite().all() for values in exact.values())
    assert any(values.all() for values in exact.values())
    error, key = worst_error(om.gradient_norms(adapter, batch), exact)
    assert error <= case.tolerance, key


@pytest.mark.parametrize("case", FOREIGN, ids=named)
def test_norms_of_other_batches_are_too(case: Foreign) -> None:
    """What the first use found holds for other values and other sizes."""
    adapter, first = case.made_small(4)
    om.gradient_norms(adapter, first)
    for size, seed in ((1, 1), (7, 2)):
        _, batch = case.made_small(size, seed=seed)
        found = om.gradient_norms(adapter, batch)
        error, key = worst_error(found, exact_norms(adapter, batch))
        assert error <= case.tolerance, (key, size)


@pytest.mark.parametrize("case", GROUPED, ids=named)
def test_norms_of_experts_in_groups_are_those_of_experts_one_by_one(case: Foreign) -> None:
    adapter, batch = case.made()
    found = om.gradient_norms(adapter, batch)
    exact = exact_norms(adapter, batch)
    for key, values in exact.items():
        assert torch.allclose(found[key], values, rtol=4e-3, atol=1e-7 * largest(exact)), key


def largest(norms: dict[str, Tensor]) -> float:
    return max(float(values.max()) for values in norms.values())


def test_a_wrong_norm_is_seen() -> None:
    adapter, batch = FOREIGN[0].made_small(3)
    exact = exact_norms(adapter, batch)
    key = next(iter(exact))
    wrong = exact | {key: exact[key] * (1 + 1e-7)}
    assert worst_error(wrong, exact) == (pytest.approx(1e-7), key)
    assert worst_error(exact | {key: exact[key] * torch.nan}, exact)[0] == torch.inf
