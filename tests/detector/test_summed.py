"""Gradient norms of the likelihood as a whole, where its terms come of one forward pass."""

from typing import Any

import pytest
import torch
from support.fitted_cases import adapter_of, batch_of
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import term_values
from ood_monitor.densities.measurements import GRADIENT_NORMS
from ood_monitor.detector.summed import Summed, norms_of
from ood_monitor.gradients import check


def by_the_loop(adapter: om.Adapter, batch: Any) -> dict[str, Tensor]:
    """Plain autograd of the sum of all terms, sample by sample."""
    rows: dict[str, list[Tensor]] = {}
    module = adapter.module.eval()
    named = dict(module.named_parameters())
    for i in range(len(batch)):
        total: Any = sum(
            value.total() if isinstance(value, om.Elements) else value
            for _, value in adapter.log_likelihood(batch[i : i + 1])
        )
        found = torch.autograd.grad(total.sum(), list(named.values()), allow_unused=True)
        for name, g in zip(named, found, strict=True):
            rows.setdefault(name, []).append(torch.zeros(()) if g is None else g.square().sum())
    return {name: torch.stack(each) for name, each in rows.items()}


@pytest.mark.parametrize("name", ["glow", "vae", "gpt2", "ddpm"])
@pytest.mark.parametrize("method", ["gradient_norms", "both"])
def test_norms_are_of_the_whole_where_terms_share_a_pass(name: str, method: Any) -> None:
    adapter, batch = adapter_of(name), batch_of(name, 4, seed=1)
    measured = om.Detector(adapter, method=method).measure(batch)
    values = term_values(adapter, batch)
    assert measured.terms == tuple(values)
    for i, value in enumerate(values.values()):
        found = torch.from_numpy(measured.log_likelihood[:, i]).to(value)  # to its own precision
        torch.testing.assert_close(found, value)
    table = measured.tables[GRADIENT_NORMS]
    if name == "ddpm":  # a pass for each level
        wanted = om.gradient_norms(adapter, batch)
    else:
        wanted = {f"log_likelihood/{k}": v for k, v in by_the_loop(adapter, batch).items()}
    assert set(table.names) == set(wanted)
    for i, key in enumerate(table.names):
        found = torch.from_numpy(table.values[:, i])
        torch.testing.assert_close(found, wanted[key].double(), rtol=1e-3, atol=1e-6)


class Two(om.Adapter):
    """Of which one term has the name that the sum would have."""

    is_one_pass = True

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2).double()

    def log_likelihood(self, batch: Tensor) -> Any:
        out = self.module(batch)
        yield "log_likelihood", -out[:, 0].square()
        yield "rest", out[:, 1]


def test_the_sum_has_a_name_of_its_own() -> None:
    adapter, batch = Two(), torch.randn(4, 3, dtype=torch.float64)
    found = norms_of(Summed(adapter), batch, layers=None, chunk_size=None)
    assert list(found.log_likelihood) == ["log_likelihood", "rest"]
    wanted = by_the_loop(adapter, batch)
    assert found.norms.keys() == {"total/weight", "total/bias"}
    torch.testing.assert_close(found.norms["total/weight"], wanted["weight"])


def test_values_without_a_gradient_are_not_compared_again() -> None:
    summed, batch = Summed(Two()), torch.randn(4, 3, dtype=torch.float64)
    norms_of(summed, batch, layers=None, chunk_size=None)
    assert check._open[summed].keys == set()


def test_facts_of_a_model_are_found_once_a_detector() -> None:
    made = om.Detector(adapter_of("glow"), method="gradient_norms")
    assert made._differentiated is made._differentiated
    other = adapter_of("glow")
    made.adapter = other
    assert made._differentiated.module is other.module
    of_levels = om.Detector(adapter_of("ddpm"))
    assert of_levels._differentiated is of_levels.adapter
