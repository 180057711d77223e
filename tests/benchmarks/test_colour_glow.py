"""What is told of the Glow of colour images: groups, layers, and images that come otherwise."""

import colorsys
import math
from itertools import starmap
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

import ood_monitor as om
from benchmarks.detection import colour_glow, layers
from benchmarks.detection.representations import (
    CHANGES,
    Represented,
    dequantised,
    invariance,
    to_hsv,
)
from ood_monitor.adapters.base import checked_terms
from ood_monitor.densities.measurements import Measurements


def images(count: int, size: int = 8) -> Tensor:
    """Of 256 values, in [0, 1], some of them grey."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(256, (count, 3, size, size), generator=generator) / 255
    found[:, :, 0] = found[:, :1, 0]
    return found


def flow(size: int = 8) -> om.models.Glow:
    return om.models.Glow(3, size, levels=1, steps=2, hidden=8).eval()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_invertible_and_its_log_determinant_is_autograds(name: str) -> None:
    change = CHANGES[name]
    x = dequantised(images(3, 2).double())
    torch.testing.assert_close(change.back(change.there(x)), x)
    for one, expected in zip(x.split(1), change.log_det(x), strict=True):
        jacobian = torch.autograd.functional.jacobian(change.there, one)
        torch.testing.assert_close(jacobian.reshape(12, 12).slogdet()[1], expected)


def test_hue_saturation_and_value_are_those_of_python() -> None:
    x = dequantised(images(2).double())
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 3)
    expected = torch.tensor(list(starmap(colorsys.rgb_to_hsv, pixels.tolist())))
    torch.testing.assert_close(to_hsv(x).permute(0, 2, 3, 1).reshape(-1, 3), expected.double())


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_flow_of_changed_images_has_the_same_norms_and_another_likelihood(
    name: str,
) -> None:
    x = dequantised(images(4))
    found = invariance(flow(), CHANGES[name], x)
    assert found["norms_relative_difference"] < 1e-9
    before, after = found["bits_per_dimension"]
    mean, _ = found["shift_mean_and_sd"]
    assert after - before == pytest.approx(mean, abs=2e-3)
    assert abs(mean) > 0.02
    adapter = om.LogLikelihood(Represented(flow(), CHANGES[name]))
    own = om.LogLikelihood(flow()).bits_per_dimension(x)
    shift = CHANGES[name].log_det(x) / (x[0].numel() * math.log(2))
    bits = adapter.bits_per_dimension(CHANGES[name].there(x))
    torch.testing.assert_close(bits, own + shift, rtol=1e-4, atol=1e-4)


def grouped(adapter: om.Adapter, x: Tensor, group: int) -> Measurements:
    forward = om.Detector(adapter, method="forward").measure(x)
    return colour_glow.of_groups(adapter, forward, x, group)


def test_single_images_are_measured_as_a_detector_measures_them() -> None:
    adapter = om.LogLikelihood(flow(), bins=256)
    found = grouped(adapter, images(6), 1)
    expected = om.Detector(adapter, method="both").measure(images(6))
    assert found.tables.keys() == expected.tables.keys()
    assert found.terms == expected.terms
    assert found.sample == expected.sample
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-5)
    for kind, table in expected.tables.items():
        assert found.tables[kind].names == table.names
        assert found.tables[kind].values == pytest.approx(table.values, rel=1e-4)


def test_a_group_has_its_own_gradient_and_means_of_the_rest() -> None:
    adapter = om.LogLikelihood(flow(), bins=256)
    single, groups = (grouped(adapter, images(10), group) for group in (1, 5))
    total = sum(value.sum() for _, value in checked_terms(adapter, images(10)[:5]))
    gradients = torch.autograd.grad(cast(Tensor, total), list(adapter.module.parameters()))
    assert groups.norms[0] == pytest.approx([float(g.square().sum()) for g in gradients], rel=1e-4)
    assert len(groups) == 2
    assert groups.total == pytest.approx(single.total.reshape(2, 5).mean(1))
    for kind in ("values", "expected_norms"):
        means = single.tables[kind].values.reshape(2, 5, -1).mean(1)
        assert groups.tables[kind].values == pytest.approx(means)


def test_layers_are_told_by_how_gaussian_alike_and_large_they_are() -> None:
    generator = np.random.default_rng(0)
    fit, test = generator.normal(size=(2, 500, 3))
    skewed = np.exp(2 * test)
    test[:, 2] = test[:, 1]
    normal = layers.fits(fit, test)
    # Of 500 samples on either side it is above .15 once in 10^5 or so.
    assert (normal < 0.15).all()
    assert (layers.fits(fit, skewed) > 0.4).all()
    assert layers.correlation(test) == pytest.approx(1 / 3, abs=0.1)
    odd = test + np.array([1.0, -1.0, 1.0])
    logs = {"fit": fit, "test": test, "calibration": test + 1, "odd": odd}
    assert layers.larger(logs) == {"odd": 0.6667}
