"""Means over positions, which are the same at any size, against loops over samples in float64."""

from typing import Any

import pytest
import torch
from support.model_case import Function
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.statistics import denoiser_statistics
from ood_monitor.statistics.spectrum import band_energies

PRODUCTS = torch.linspace(0.9999, 0.01, 1000)


class Labelled(nn.Module):
    """A denoiser that is told a number of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.net(x * (1 + label[:, None, None, None]))  # type: ignore[no-any-return]


#: Names of the layers of :func:`stationary` with as many positions as the image has.
OF_POSITIONS = ("first", "second", "last")


def stationary(*, last: nn.Module | None = None) -> om.DenoisingBound:
    """Of convolutions that see an image as a torus: tiled, it gives the same, tiled."""
    torch.manual_seed(0)
    circular: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
    net = {
        "first": nn.Conv2d(2, 40, 3, **circular),
        "time": nn.Linear(1, 40),
        "second": nn.Conv2d(40, 5, 3, stride=1, **circular),
        "last": last or nn.Conv2d(5, 2, 3, **circular),
    }

    def forward(m: Any, x: Tensor, t: Tensor) -> Tensor:
        told = m.time(t[:, None].to(x) / 1000 + 1)
        h = torch.tanh(m.first(x) + told[:, :, None, None])
        return m.last(torch.tanh(m.second(h)))  # type: ignore[no-any-return]

    network = Function(forward, **net).double()
    return om.DenoisingBound(network, PRODUCTS, ratios=[0.02, 3.0])


def samples(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 6, 7, generator=generator, dtype=torch.float64)


def mean_energy(adapter: om.DenoisingBound, sample: Tensor, layer: str) -> dict[str, float]:
    """Of what a layer is given of one sample: the mean over positions, one after the other."""
    found, seen = dict[str, float](), list[Tensor]()
    part = adapter.module.get_submodule(layer)
    handle = part.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for name, _ in adapter.residuals(sample):
        positions = seen.pop()[0].flatten(1).T if part.weight.ndim == 4 else [seen.pop()[0]]
        found[name] = sum(float(h.square().sum()) for h in positions) / len(positions)
    handle.remove()
    return found


@pytest.mark.parametrize("tiles", [(1, 1), (2, 1), (2, 3)], ids=str)
def test_means_are_those_of_one_tile_whatever_the_size(tiles: tuple[int, int]) -> None:
    adapter, x = stationary(), samples()
    found = denoiser_statistics(adapter, x.repeat(1, 1, *tiles), any_size=True)
    for layer in (*OF_POSITIONS, "time"):
        for i, sample in enumerate(x.split(1)):
            for level, expected in mean_energy(adapter, sample, layer).items():
                value = float(found.energies[f"{level}/input.{layer}"][i])
                assert value == pytest.approx(expected, rel=1e-9)
    of_one = denoiser_statistics(adapter, x).output_layer
    for name, sums in of_one.items():
        # The gradient of a mean over positions, squared.
        positions = 42**2 if name.endswith("norm") else 42
        torch.testing.assert_close(found.output_layer[name], sums / positions, rtol=1e-9, atol=0)


@pytest.mark.parametrize("layers", [None, ["second.*"]], ids=["all", "one"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_sums_are_means_times_positions_to_the_bit(layers: Any, chunk_size: int | None) -> None:
    adapter, x = stationary(), samples()
    options = {"layers": layers, "chunk_size": chunk_size}
    sums = denoiser_statistics(adapter, x, **options)
    means = denoiser_statistics(adapter, x, any_size=True, **options)
    for name, values in sums.energies.items():
        if "/input." in name:
            positions = 1 if name.endswith("time") else 42
            assert torch.equal(means.energies[name], values / positions), name
    assert means.cosines.keys() == sums.cosines.keys()
    assert all(torch.equal(means.cosines[name], sums.cosines[name]) for name in sums.cosines)


def test_bands_of_white_noise_are_alike_at_any_size() -> None:
    # Means of 2 000 images' energies, of which the band of fewest frequencies has one: a standard
    # error of .032, so that one of the 18 means is beyond five of them once in 90 000 runs.
    for side in (8, 12, 16):
        noise = torch.randn(2000, 1, side, side, generator=torch.Generator().manual_seed(side))
        found = band_energies(noise, any_size=True).mean(0)
        torch.testing.assert_close(found, torch.ones(6), rtol=0.16, atol=0)


def test_images_without_frequencies_in_a_band_are_refused() -> None:
    with pytest.raises(ValueError, match="6 by 6 and larger, got 5 by 4: fit a detector for each"):
        band_energies(torch.ones(1, 1, 5, 4), any_size=True)


def test_a_condition_gain_is_a_mean_over_the_residuals_numbers() -> None:
    network = Labelled().double()
    adapter = om.DenoisingBound(
        network,
        PRODUCTS,
        inputs=lambda batch: batch["x"],
        condition=lambda batch: {"label": batch["label"]},
        null_condition=lambda batch: {"label": torch.zeros_like(batch["label"])},
    )
    batch = {"x": samples(), "label": torch.ones(3, dtype=torch.float64)}
    [sums] = denoiser_statistics(adapter, batch).condition.values()
    [means] = denoiser_statistics(adapter, batch, any_size=True).condition.values()
    assert torch.equal(means, sums / (2 * 6 * 7))
