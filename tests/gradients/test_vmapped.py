"""The loop over samples by `vmap`: as exact, in one pass, and only where it can be had."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.model_case import Function
from support.reference import counted, gradients
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch
from ood_monitor.gradients import gradient_norms, ways
from ood_monitor.gradients.check import _known

B = 5


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def solved(m: Any, x: Tensor) -> Tensor:
    """As a flow's LU-composed map is inverted."""
    lower = m.lower.tril(-1) + torch.eye(4, dtype=x.dtype)
    y = torch.linalg.solve_triangular(lower, m.f(x).tanh()[..., None], upper=False)
    return m.out(y.squeeze(-1))


def normalised(m: Any, x: Tensor) -> Tensor:
    return m.out(m.norm(m.f(x)[:, None]).flatten(1))


def with_a_cache(m: Any, x: Tensor) -> Tensor:
    """What it keeps is of its view alone."""
    m.kept = m.f(x).tanh()
    return m.out(F.prelu(m.kept, m.slope))


def with_a_branch(m: Any, x: Tensor) -> Tensor:
    h = m.f(x).tanh()
    h = h if float(h.detach().abs().max()) <= 1 else h.clamp(-1, 1)
    return m.out(F.prelu(h, m.slope))


def with_a_counter(m: Any, x: Tensor) -> Tensor:
    m.seen += x.detach().sum()
    return m.out(F.prelu(m.f(x), m.slope))


def with_a_choice(m: Any, x: Tensor) -> Tensor:
    h = F.prelu(m.f(x), m.slope)
    return m.out(h).index_add(0, torch.arange(len(h))[h[:, 0] > 0], h[h[:, 0] > 0])


def of(forward: Callable[..., Tensor], **parts: Any) -> om.Adapter:
    torch.manual_seed(0)
    net = Function(forward, f=nn.Linear(4, 4), out=nn.Linear(4, 4), **parts)
    net.register_buffer("seen", torch.zeros(()))
    return om.LogLikelihood(net.double(), lambda m, x: -(m(x) - 1).square().sum(1))


VMAPPED: dict[str, Callable[[], om.Adapter]] = {
    "a triangular solve": lambda: of(solved, lower=draw(4, 4)),
    "a normalisation": lambda: of(normalised, norm=nn.InstanceNorm1d(1, affine=True)),
    "what a pass keeps": lambda: of(with_a_cache, slope=draw(4)),
}
LOOPED: dict[str, Callable[[], om.Adapter]] = {
    "a branch": lambda: of(with_a_branch, slope=draw(4)),
    "a buffer that is written": lambda: of(with_a_counter, slope=draw(4)),
    "a choice of rows": lambda: of(with_a_choice, slope=draw(4)),
}


def assert_exact(adapter: om.Adapter, x: Tensor, group: int = 1) -> None:
    found = gradient_norms(adapter, x, group=group)
    by_row = gradient_norms(adapter, x, group=group, granularity="row")
    for key, each in gradients(adapter, x, group).items():
        rows = each.square().reshape(*each.shape[:2], -1).sum(2)
        torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(by_row[key], rows, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "calls"),
    [*((m, 2) for m in VMAPPED.values()), *((m, 1 + B) for m in LOOPED.values())],
    ids=[*VMAPPED, *LOOPED],
)
def test_norms_are_exact_by_either_way(make: Callable[[], om.Adapter], calls: int) -> None:
    adapter, x = make(), draw(B, 4)
    assert_exact(adapter, x)
    before = {name: buffer.clone() for name, buffer in adapter.module.named_buffers()}
    with counted(adapter.module) as seen:
        gradient_norms(adapter, x)
    assert len(seen) == calls
    assert all(torch.equal(b, before[name]) for name, b in adapter.module.named_buffers())
    if calls == 2:
        assert_exact(adapter, x[:4], group=2)


class Terms(om.Adapter):
    """Two terms of one forward pass, one of them of one part alone, and noise of a seed."""

    def __init__(self) -> None:
        self.module = of(with_a_cache, slope=draw(4)).module

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        noise = torch.randn(4, generator=torch.Generator().manual_seed(0)).to(batch)
        output = self.module(batch + noise)
        yield "first", -output.square().sum(1)
        yield "second", self.module.f(batch).sum(1)


def test_terms_by_vmap() -> None:
    adapter, x = Terms(), draw(B, 4)
    assert_exact(adapter, x)
    gradient_norms(adapter, x)  # compares again, as the second term has no gradient of a slope
    with counted(adapter.module) as seen:
        gradient_norms(adapter, x)
    assert len(seen) == 2


def test_what_vmap_gets_wrong_goes_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, x = VMAPPED["a triangular solve"](), draw(B, 4)
    right = gradient_norms(adapter, x)
    true = ways.vmapped_norms

    def wrong(*given: Any) -> Any:
        found = true(*given)
        assert found is not None
        return {term: value + 1 for term, value in found[0].items()}, {}

    monkeypatch.setattr(ways, "vmapped_norms", wrong)
    for key, values in gradient_norms(adapter, x).items():
        torch.testing.assert_close(values, right[key])


def test_norms_that_vmap_gets_wrong_on_first_use_are_looped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ood_monitor.gradients import check

    true = check.vmapped_norms

    def doubled(*given: Any) -> Any:
        values, found = true(*given)  # type: ignore[misc]
        return values, {key: 2 * each for key, each in found.items()}

    monkeypatch.setattr(check, "vmapped_norms", doubled)
    adapter, x = VMAPPED["a triangular solve"](), draw(B, 4)
    assert_exact(adapter, x)
    assert not _known[adapter].vmapped


def test_a_model_that_is_scored_in_place_keeps_its_parameters() -> None:
    """By `vmap` they would be replaced where other threads may see them."""
    x, slope = draw(B, 4), nn.Parameter(draw(4))
    seen: list[bool] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        seen.append(net.slope is slope)
        return F.prelu(m.f(x).tanh(), m.slope)

    net = of(forward, slope=slope).module
    slope = net.slope

    class ByAName(om.Adapter):
        """Leaves its own module for one by another name."""

        def __init__(self) -> None:
            self.module = net

        def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
            yield "log_likelihood", -net(batch).square().sum(1)

    adapter = ByAName()
    assert_exact(adapter, x)
    found = gradient_norms(adapter, x, report=True)
    assert found.ways["slope"].name == "loop"
    assert all(seen)
