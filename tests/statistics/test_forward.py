"""All that a forward pass gives, in one."""

from typing import Any

import pytest
import torch
from support.model_case import Gaussian
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import term_values
from ood_monitor.adapters.elements import Elements
from ood_monitor.statistics import ForwardStatistics, expected_layers, forward_statistics
from ood_monitor.statistics.png import png_bits
from ood_monitor.statistics.surprise import surprise_map, value_columns

X = torch.rand(7, 1, 8, 8)


class Pixels(om.Adapter):
    """Bernoulli laws of pixels by a convolution."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)).eval()

    def log_likelihood(self, batch: Tensor) -> Any:
        logits = self.module(batch)
        sign = -torch.nn.functional.softplus(-logits), -torch.nn.functional.softplus(logits)
        p = logits.sigmoid()
        yield (
            "pixels",
            Elements(
                batch * sign[0] + (1 - batch) * sign[1],
                lambda: p * sign[0] + (1 - p) * sign[1],
                axes=(2, 3),
            ),
        )
        yield "rest", logits.flatten(1).mean(1)

    def images(self, batch: Tensor) -> Tensor:
        return batch


def columns(found: ForwardStatistics) -> dict[str, Tensor]:
    parts = ("log_likelihood", "values", "map", "expected_norms")
    return {f"{part}/{k}": v for part in parts for k, v in getattr(found, part).items()}


def test_one_pass_gives_all() -> None:
    adapter = Pixels()
    found = forward_statistics(adapter, X, sample="image", map=True)
    with torch.no_grad():
        terms = dict(adapter.log_likelihood(X))
    bits = {"png_bits": png_bits(X)}
    wanted = value_columns(terms, by_element=False) | bits
    assert found.values.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found.values[name], values)
    for name, values in surprise_map(terms).items():
        torch.testing.assert_close(found.map[name], values)
    for name, values in term_values(adapter, X).items():
        torch.testing.assert_close(found.log_likelihood[name], values)
    assert list(found.expected_norms) == ["0", "1"]
    torch.testing.assert_close(found.expected_norms["0"], X.square().sum((2, 3)))
    assert not any(v.requires_grad for v in columns(found).values())


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_pieces_give_the_same(chunk_size: int) -> None:
    adapter = Pixels()
    whole = columns(forward_statistics(adapter, X, sample="image", map=True))
    parts = forward_statistics(adapter, X, sample="image", map=True, chunk_size=chunk_size)
    for name, values in columns(parts).items():
        torch.testing.assert_close(values, whole[name], rtol=1e-5, atol=1e-5, msg=name)


def test_what_is_not_asked_for_is_not_made() -> None:
    adapter = Pixels()
    found = forward_statistics(adapter, X, sample="image", norms=False, values=False)
    assert (found.values, found.map, found.expected_norms) == ({}, {}, {})
    assert found.log_likelihood.keys() == {"pixels", "rest"}


@pytest.mark.parametrize(("sample", "is_there"), [("image", True), (None, False), ("row", False)])
def test_bits_are_an_images(sample: Any, is_there: bool) -> None:
    found = forward_statistics(Pixels(), X, sample=sample)
    assert ("png_bits" in found.values) == is_there


def test_values_of_a_sequence_are_by_element() -> None:
    found = forward_statistics(Pixels(), X, sample="sequence")
    whole = forward_statistics(Pixels(), X, sample=None)
    torch.testing.assert_close(
        found.values["pixels.surprise"], whole.values["pixels.surprise"] / 64
    )
    torch.testing.assert_close(found.values["log_length"], torch.full((7,), 64.0).double().log())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("index", [0, 3, 6])
def test_a_sample_that_is_not_finite_changes_no_other(value: float, index: int) -> None:
    x, others = X.clone(), [i for i in range(7) if i != index]
    x[index, 0, 2, 3] = value
    clean = columns(forward_statistics(Pixels(), X, sample="image", map=True))
    found = columns(forward_statistics(Pixels(), x, sample="image", map=True))
    for name, values in found.items():
        torch.testing.assert_close(values[others], clean[name][others], msg=name)
    assert not found["expected_norms/0"][index].isfinite().all()


def test_a_batch_of_which_nothing_is_finite_settles_nothing() -> None:
    adapter = Pixels()
    found = forward_statistics(adapter, torch.full_like(X, torch.nan), sample="image")
    assert all(v.isnan().all() for v in found.values.values())
    torch.testing.assert_close(
        columns(forward_statistics(adapter, X, sample="image")),
        columns(forward_statistics(Pixels(), X, sample="image")),
    )


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected samples, got a tensor"):
        forward_statistics(Pixels(), X[:0], sample=None)


RUNS: list[int] = []


def counted(module: nn.Module, x: Tensor) -> Tensor:
    RUNS.append(len(x))
    return module(x)  # type: ignore[no-any-return]


def test_a_piece_takes_one_pass_once_its_layout_is_known() -> None:
    adapter, x = Gaussian(nn.Sequential(nn.Linear(3, 3)), counted), torch.randn(5, 3)
    layers = expected_layers(adapter, x)
    del RUNS[:]
    forward_statistics(adapter, x, sample=None, layers=layers)
    assert RUNS == [5, 1, 1]
    del RUNS[:]
    forward_statistics(adapter, x, sample=None, layers=layers, chunk_size=3)
    assert RUNS == [3, 2]


class Energy(om.Adapter):
    """Score matching: a residual that is itself a gradient, of an energy by a network."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 1))
        self.module = nn.Sequential(*layers).double()

    def log_likelihood(self, batch: Tensor) -> Any:
        x = batch.requires_grad_()
        [score] = torch.autograd.grad(self.module(x).sum(), x, create_graph=True)
        yield "residual", -0.5 * (score + x).square().flatten(1).sum(1)


def test_a_model_that_differentiates_within_its_pass_is_measured() -> None:
    adapter = Energy()
    for _ in range(2):  # the second time it is known
        found = forward_statistics(adapter, X.double(), sample="image")
        wanted = [dict(adapter.log_likelihood(x[None].double()))["residual"] for x in X]
        torch.testing.assert_close(found.log_likelihood["residual"], torch.cat(wanted).detach())
        torch.testing.assert_close(found.expected_norms["0"], X.double().square().sum((2, 3)))
        assert not any(v.requires_grad for v in columns(found).values())
        terms = term_values(adapter, X.double())
        torch.testing.assert_close(terms["residual"], found.log_likelihood["residual"])
    assert X.grad is None
    assert all(p.grad is None for p in adapter.module.parameters())


def test_a_failure_of_another_kind_is_the_model_s_own() -> None:
    class Broken(Pixels):
        def log_likelihood(self, batch: Tensor) -> Any:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        forward_statistics(Broken(), X, sample="image")
