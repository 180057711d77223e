"""The recorder puts into the graph what it was asked to follow, and only in its own thread."""

from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from ood_monitor.gradients.recorder import Recorder

X = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def recorder(net: nn.Module, *names: str) -> Recorder:
    return Recorder(net, names.__contains__, [X], n=4, by=lambda name: "tensor")


def test_followed_weights_get_norms_without_being_in_the_graph(net: nn.Sequential) -> None:
    with recorder(net, "0.weight", "2.weight") as record:
        value = net(X).sum(1)
    leaves = list(record.leaves.values())
    assert torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True) == (
        None,
        None,
    )
    assert record.squared_norms(value).keys() == record.leaves.keys() == {"0.weight", "2.weight"}


def test_what_comes_before_the_followed_needs_no_gradient(net: nn.Sequential) -> None:
    with recorder(net, "2.bias"):
        hidden = net[:2](X)
        assert not hidden.requires_grad
        assert net[2](hidden).requires_grad


def test_nothing_followed_is_a_plain_forward_pass(net: nn.Sequential) -> None:
    with recorder(net) as record:
        value = net(X)
    assert not value.requires_grad
    assert record.squared_norms(value.sum(1)) == {}
    torch.testing.assert_close(value, net(X).detach())


def test_parameters_are_neither_replaced_nor_written(net: nn.Sequential) -> None:
    before = {name: (id(p), p._version, p.clone()) for name, p in net.named_parameters()}
    with recorder(net, *before) as record:
        value = net(X).sum(1)
    record.squared_norms(value)
    for name, parameter in net.named_parameters():
        identity, version, values = before[name]
        assert (id(parameter), parameter._version) == (identity, version)
        assert parameter.grad is None
        assert torch.equal(parameter, values)


def test_other_threads_see_nothing(net: nn.Sequential) -> None:
    net.requires_grad_(False)
    seen: list[Tensor] = []
    with recorder(net, "0.weight"):
        thread = Thread(target=lambda: seen.append(net(X)))
        thread.start()
        thread.join()
        assert net(X).requires_grad
    assert not seen[0].requires_grad
