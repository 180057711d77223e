"""Realised gradient norms by input channel: as a part of a detector, and against plain autograd."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.fitted_cases import adapter_of, batch_of
from support.model_case import Gaussian
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ood_monitor as om
from ood_monitor.adapters.base import checked_terms, pieces
from ood_monitor.detector.channels import channel_norms


class Halves(nn.Module):
    """Positive samples go through one map, the others through the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), Conv1D(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        out = x.new_zeros(len(x), 2)
        for chosen, layer in ((first, self.one), (~first, self.two)):
            if chosen.any():
                out[chosen] = layer(x[chosen])
        return out


@dataclass(frozen=True)
class Case:
    """A network, the shape of a sample, and where a weight has its input channels."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dimensions: dict[str, int]


def followed(layer: nn.Module, shape: tuple[int, ...], dimension: int) -> Case:
    """Of one layer, and a square linear map after it."""
    net = nn.Sequential(layer, nn.Flatten(), nn.Tanh())
    with torch.no_grad():
        width = net(torch.zeros(1, *shape)).shape[1]
    net.append(nn.Linear(width, 2))
    return Case(lambda: net, shape, {"0.weight": dimension, "3.weight": 1})


def transposed_in_memory() -> nn.Linear:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return layer


def masked() -> nn.Module:
    """A square linear map of a weight that is computed."""
    layer = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Masked())
    return layer


class Masked(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.tensor([[0.0, 1.0, 2.0]]).to(weight)


CASES = {
    "linear": followed(nn.Linear(3, 5), (4, 3), 1),
    "square linear": followed(nn.Linear(3, 3), (3,), 1),
    "linear, transposed in memory": followed(transposed_in_memory(), (3,), 1),
    "wide linear": followed(nn.Linear(70, 3), (70,), 1),
    "convolution": followed(nn.Conv2d(3, 5, 3, padding=1), (3, 4, 4), 1),
    "square convolution": followed(nn.Conv2d(3, 3, 3), (3, 4, 4), 1),
    "depthwise convolution": followed(nn.Conv2d(4, 4, 3, groups=4), (4, 4, 4), 0),
    "transposed convolution": followed(nn.ConvTranspose2d(3, 5, 3), (3, 4, 4), 0),
    "square transposed convolution": followed(nn.ConvTranspose1d(3, 3, 2), (3, 4), 0),
    "a computed weight": replace(
        followed(masked(), (4, 3), 1),
        dimensions={"0.parametrizations.weight.original": 1, "3.weight": 1},
    ),
    "a matrix": followed(Conv1D(5, 3), (3,), 0),
    "a square matrix": followed(Conv1D(3, 3), (4, 3), 0),
}


def by_channel(adapter: om.Adapter, x: Tensor, case: Case) -> dict[str, Tensor]:
    """By plain autograd, one sample at a time."""
    found: dict[str, list[Tensor]] = {}
    named = dict(adapter.module.named_parameters())
    for i in range(len(x)):
        ((term, value),) = checked_terms(adapter, x[i : i + 1])
        for name, dimension in case.dimensions.items():
            gradient = torch.autograd.grad(value.sum(), named[name], retain_graph=True)[0]
            squares = gradient.movedim(dimension, 0).flatten(1).square().sum(1)
            groups = torch.arange(len(squares)) % 32
            sums = squares.new_zeros(min(32, len(squares))).index_add(0, groups, squares)
            found.setdefault(f"{term}/{name}", []).append(sums)
    return {key: torch.stack(each) for key, each in found.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_norms_are_those_of_gradients_by_input_channel(case: Case) -> None:
    adapter, x = Gaussian(case.net().double()), torch.randn(4, *case.shape).double()
    found = channel_norms(adapter, x, differentiated=adapter, layers=None, chunk_size=None).norms
    expected = by_channel(adapter, x, case)
    assert found.keys() == expected.keys()
    for key, norms in expected.items():
        torch.testing.assert_close(found[key], norms, msg=key)


# Which samples go to which map, the loop over samples sees.
@pytest.mark.filterwarnings("ignore:The fast path disagrees with the loop")
def test_a_layer_that_a_batch_does_not_call_has_zeros(tmp_path: Path) -> None:
    adapter, x = Gaussian(Halves().double()), torch.randn(60, 3).double()
    made = om.Detector(adapter, parts=["channel_norms"]).fit([x], progress=False)
    names = [f"channel_norms/log_likelihood/{name}.weight" for name in ("one", "two")]
    assert list(made.fitted.layers) == names
    made.save_pretrained(tmp_path, card=False)
    other = Gaussian(Halves().double())
    other.module.load_state_dict(adapter.module.state_dict())
    again = om.Detector.from_pretrained(tmp_path, other)  # of which nothing is known yet
    positive = x[:, 0] > 0
    torch.testing.assert_close(again.score(x[positive]).score, made.score(x).score[positive])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glow", "vae", "gpt2", "ddpm"])
def test_it_is_a_part_of_a_detector(name: str, tmp_path: Path) -> None:
    parts = ["channel_norms", "gradient_norms"]
    made = om.Detector(adapter_of(name), parts=parts, explain=8)
    fitted = made.fit(pieces(batch_of(name, 60, seed=1), 30), progress=False)
    new = batch_of(name, 5, seed=2)
    scores = fitted.score(new)
    assert bool(scores.valid.all())
    torch.testing.assert_close(sum(scores.layers.values()), scores.score)
    fitted.save_pretrained(tmp_path, card=False)
    loaded = om.Detector.from_pretrained(tmp_path, fitted.adapter)
    assert torch.equal(loaded.score(new).score, scores.score)


def test_layers_without_a_weight_of_channels_are_refused() -> None:
    adapter, x = Gaussian(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))), torch.randn(60, 3)
    detector = om.Detector(adapter, parts=["channel_norms"], layers="1.*")
    with pytest.raises(ValueError, match=r"layers='1\.\*' to choose weights of conv.*, got none"):
        detector.fit([x], progress=False)
