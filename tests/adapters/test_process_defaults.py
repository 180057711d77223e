"""What the process makes its tensors of by default changes no score, to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import pytest
import torch
from support.fitted_cases import ADAPTERS, adapter_of, batch_of, fitted
from support.foreign_cases import FOREIGN
from support.model_case import Model
from torch import Tensor

import ood_monitor as om
from ood_monitor.adapters.base import Batch, checked_terms
from ood_monitor.cli.data import readable
from ood_monitor.cli.images import ImageFormat

Default: TypeAlias = torch.dtype | str

#: Types, and a device that nothing can be computed on.
DEFAULTS: tuple[Default, ...] = (torch.float64, torch.bfloat16, torch.float16, "meta")

#: Flows that make tensors on the default device themselves, and fail on any other than their own.
ON_THE_DEFAULT_DEVICE = ("zuko-maf", "zuko-nsf")


@contextmanager
def process_of(default: Default) -> Iterator[None]:
    if isinstance(default, str):
        with torch.device(default):
            yield
        return
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        yield
    finally:
        torch.set_default_dtype(before)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert list(found) == list(expected)


@torch.no_grad()
def terms(adapter: om.Adapter, batch: Batch) -> dict[str, Tensor]:
    return dict(checked_terms(adapter, batch))


def figures(detector: om.Detector, batch: Batch) -> dict[str, Tensor]:
    found = detector.score(batch)
    return {"p_value": found.p_value, "score": found.score, **found.layers}


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.name)
@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_terms_are_the_same_under_any_default(case: Model, default: Default) -> None:
    if default == "meta" and case.name in ON_THE_DEFAULT_DEVICE:
        pytest.skip("the flow itself makes tensors on the default device")
    adapter, batch = case(torch.float32)
    expected = terms(adapter, batch)
    with process_of(default):
        same(terms(adapter, batch), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_p_values_are_the_same_under_any_default(name: str) -> None:
    detector, batch = fitted(name), batch_of(name, 20, seed=2)
    expected = figures(detector, batch)
    for default in DEFAULTS:
        with process_of(default):
            same(figures(detector, batch), expected)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_a_detector_fitted_under_any_default_is_the_same(default: Default) -> None:
    adapter, held_out = adapter_of("vae"), batch_of("vae", 80, seed=1).split(40)
    batch = batch_of("vae", 20, seed=2)
    expected = figures(fitted("vae"), batch)
    with process_of(default):
        detector = om.Detector(adapter).fit(held_out, progress=False)
    same(figures(detector, batch), expected)


def test_a_time_that_is_divided_is_the_same_under_any_default() -> None:
    """An integer over a thousand is of the default type: 0.333 in eight bits is 0.332."""
    told: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return x

    module = torch.nn.Linear(1, 1)
    module.forward = network
    products = torch.linspace(0.99, 0.01, 1000)
    adapter = om.DenoisingBound(module, products, levels=[333], time=lambda t: t / 1000)
    batch = torch.zeros(2, 1, 2, 2)
    for default in (torch.float32, *DEFAULTS):
        with process_of(default):
            terms(adapter, batch)
    expected = torch.full((2,), 333 / 1000, dtype=torch.float32)
    assert [t.dtype for t in told] == [torch.float32] * len(told)
    assert all(torch.equal(t, expected) for t in told)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_schedules_are_the_same_under_any_default(default: Default) -> None:
    products = torch.linspace(0.99, 0.01, 10)
    flow = partial(om.NoiseSchedule.flow, convention="data_minus_noise")
    with process_of(default):
        schedules = om.NoiseSchedule.of(products), flow(10)
    assert torch.equal(schedules[0].t, torch.arange(10))
    assert torch.equal(schedules[1].sigma, torch.arange(1, 11, dtype=torch.float64) / 10)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_bits_per_dimension_are_the_same_under_any_default(default: Default) -> None:
    adapter, batch = adapter_of("glow"), batch_of("glow", 4, seed=2)
    expected = adapter.bits_per_dimension(batch)
    with process_of(default):
        assert torch.equal(adapter.bits_per_dimension(batch), expected)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_a_glow_of_one_seed_is_the_same_under_any_default(default: Default) -> None:
    expected = om.models.Glow(channels=1, size=4, steps=1, hidden=4).state_dict()
    with process_of(default):
        found = om.models.Glow(channels=1, size=4, steps=1, hidden=4).state_dict()
    for name, value in found.items():
        assert value.device.type == ("meta" if default == "meta" else "cpu")
        if value.device.type == "cpu" and value.is_floating_point():
            # Each is rounded once, from one draw.
            rtol = max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps)
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_images_with_one_that_cannot_be_read_are_the_same_under_any_default(
    default: Default,
) -> None:
    class Half:
        ids = ("good", "bad")
        images = ImageFormat("L", (2, 2))

        def read(self, index: int) -> Tensor:
            if index:
                raise ValueError("damaged")
            return torch.ones(1, 2, 2, dtype=torch.float32, device="cpu")

    with process_of(default):
        found, reasons = readable(Half(), [0, 1])
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    assert reasons == {"bad": "damaged"}
