"""All noise levels of a small batch by one pass: the same figures, by fewer calls."""

import dataclasses
from typing import Any

import pytest
import torch
from support.diffusers_cases import FAMILIES, Family
from support.model_case import perturbed
from support.reference import counted, looped
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, OnePass, map_tensors
from ood_monitor.gradients import terms_and_norms

LEVELS = [10, 500, 999]
TEN = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)


class Small(nn.Module):
    """Pixels, and the level as a trained scale and shift of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.time = nn.Linear(1, 2)
        self.out = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.time(t.to(x)[:, None] / 10)[:, :, None, None]
        return self.out(torch.tanh(self.conv(x) * t + t))


class OfTheFirst(Small):
    """Takes the first row's level for all: right only if all rows have one."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t[:1].expand(len(x)))


def images(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)


def passes(adapter: om.Adapter, batch: Batch, **options: Any) -> int:
    """How often the network is called, once the model is known."""
    om.gradient_norms(adapter, batch, **options)
    found = []
    for _ in range(2):  # the first of which compares again what gave no verdict
        with counted(adapter.module) as calls:
            om.gradient_norms(adapter, batch, **options)
        found.append(len(calls))
    return min(found)


def check(adapter: om.Adapter, batch: Batch, n: int, group: int = 1) -> None:
    """Terms and norms by row against the loop over samples."""
    found = terms_and_norms(adapter, batch, granularity="row", group=group)
    values, norms = looped(adapter, batch, n)
    torch.testing.assert_close(found.log_likelihood, values, rtol=1e-6, atol=1e-9)
    assert list(found.norms) == list(norms)
    noise = 1e-12 * max(float(rows.max()) for rows in norms.values())
    for name, rows in norms.items():
        torch.testing.assert_close(found.norms[name], rows, rtol=1e-6, atol=noise, msg=name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_the_loops_norms_in_one_pass(family: Family) -> None:
    network = family.network().eval()
    perturbed(network)
    network = nn.Module.to(network, torch.float64)
    batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, family.batch(2))
    adapter = family.adapter(network, levels=LEVELS)
    assert passes(adapter, batch) == 1
    check(adapter, batch, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "l1"}, {"draws": 2}, {"antithetic": True}, {"prediction_type": "v_prediction"}],
    ids=str,
)
def test_losses_and_draws_are_those_of_the_levels_passes(options: dict[str, Any]) -> None:
    adapter = om.DenoisingBound(Small().double(), TEN, levels=[1, 4, 8], **options)
    assert passes(adapter, images(4)) == 1
    check(adapter, images(4), 4)
    check(adapter, images(4), 2, group=2)


def test_each_row_has_its_samples_condition() -> None:
    class Labelled(Small):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            assert label is not None
            return super().forward(x, t) * label[:, None, None, None]

    adapter = om.DenoisingBound(
        Labelled().double(), TEN, levels=[1, 8], condition=lambda batch: {"label": batch[1]}
    )
    batch = (images(3), torch.tensor([1.0, 5.0, 9.0]).double())
    assert passes(adapter, batch) == 1
    check(adapter, batch, 3)


def test_the_variational_bound_keeps_a_pass_a_level() -> None:
    adapter = om.DenoisingBound(Small().double(), TEN, levels=[1, 8], loss="vlb")
    assert passes(adapter, images(3)) == 2
    check(adapter, images(3), 3)


def test_many_samples_keep_a_pass_a_level() -> None:
    adapter = om.DenoisingBound(Small().double(), TEN, levels=[1, 8])
    assert passes(adapter, images(17)) == 2
    assert passes(adapter, images(17), chunk_size=9) == 2  # a pass for each chunk


def test_a_network_that_looks_at_one_rows_level_keeps_a_pass_a_level() -> None:
    adapter = om.DenoisingBound(OfTheFirst().double(), TEN, levels=[1, 8])
    assert passes(adapter, images(3)) == 2
    check(adapter, images(3), 3)


def test_an_adapter_that_changes_the_terms_keeps_its_own() -> None:
    class Shifted(om.DenoisingBound):
        def log_likelihood(self, batch: Batch) -> Any:
            for term, value in super().log_likelihood(batch):
                yield term, value + 1

    adapter = Shifted(Small().double(), TEN, levels=[1, 8])
    assert passes(adapter, images(3)) == 2
    check(adapter, images(3), 3)


def test_one_pass_of_other_gradients_is_not_taken() -> None:
    class Doubled(om.DenoisingBound):
        def one_pass(self, batch: Batch) -> OnePass | None:
            one = super().one_pass(batch)
            assert one is not None

            def values(rows: Batch) -> Tensor:
                value = one.values(rows)
                return 2 * value - value.detach()

            return dataclasses.replace(one, values=values)

    adapter = Doubled(Small().double(), TEN, levels=[1, 8])
    assert passes(adapter, images(3)) == 2
    check(adapter, images(3), 3)
