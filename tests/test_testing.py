"""The contract: kept by every adapter here, and each way of breaking it is told apart."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zuko
from support.cases import slow_if_heavy
from support.foreign_cases import FOREIGN
from support.model_case import Model, perturbed
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch
from ood_monitor.adapters.elements import resolved
from ood_monitor.modules.random_state import _draws
from ood_monitor.testing import check_adapter


class Custom(om.Adapter):
    """A network with a term that a function gives."""

    def __init__(self, term: Callable[["Custom", Tensor], Tensor]) -> None:
        self.module, self._term, self.calls = nn.BatchNorm1d(3), term, 0
        self.module.weight.data.fill_(0.5)

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        self.calls += 1
        yield "log_likelihood", self._term(self, batch)


def right(adapter: Custom, x: Tensor) -> Tensor:
    return -0.5 * (adapter.module(x) - x).square().sum(1)


@pytest.mark.parametrize("case", [*map(slow_if_heavy, FOREIGN)])
def test_every_adapter_keeps_the_contract(case: Model) -> None:
    check_adapter(*case())


@pytest.mark.parametrize("case", [*map(slow_if_heavy, FOREIGN)])
def test_every_adapter_keeps_the_contract_in_single_precision(case: Model) -> None:
    check_adapter(*case(torch.float32))


def test_the_examples_own_adapter_keeps_the_contract() -> None:
    check_adapter(Custom(right), torch.randn(4, 3))


def moves_random_state(adapter: Custom, x: Tensor) -> Tensor:
    torch.rand(1)
    return right(adapter, x)


def writes_a_weight(adapter: Custom, x: Tensor) -> Tensor:
    with torch.no_grad():
        adapter.module.bias.add_(1)
    return right(adapter, x)


def writes_a_buffer(adapter: Custom, x: Tensor) -> Tensor:
    adapter.module.running_mean.add_(1)  # type: ignore[operator, union-attr]
    return right(adapter, x)


def leaves_a_gradient(adapter: Custom, x: Tensor) -> Tensor:
    right(adapter, x).sum().backward()
    return right(adapter, x)


def hooks(adapter: Custom, x: Tensor) -> Tensor:
    adapter.module.register_forward_hook(lambda *_: None)
    return right(adapter, x)


def moves_numpys_state(adapter: Custom, x: Tensor) -> Tensor:
    np.random.rand()
    return right(adapter, x)


def trains(adapter: Custom, x: Tensor) -> Tensor:
    adapter.module.train()
    return right(adapter, x)


BROKEN: dict[str, tuple[Callable[[Custom, Tensor], Tensor], str]] = {
    "other noise each time": (
        lambda a, x: right(
            a, x + torch.randn(x.shape, generator=torch.Generator().manual_seed(a.calls))
        ),
        "'log_likelihood' of a sample to be the same a second time",
    ),
    "noise of the batch's shape": (
        lambda a, x: right(a, x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))),
        "the same in another order",
    ),
    "a value of the batch": (lambda a, x: right(a, x) / len(x), "the same alone"),
    "samples that mix": (lambda a, x: right(a, x - x.mean(0)), "the same alone"),
    "not finite": (lambda a, x: right(a, x) / 0, "finite values of 'log_likelihood'"),
    "an infinite gradient": (
        lambda a, x: right(a, x) + (a.module.weight - 0.5).clamp(min=0).sum().sqrt(),
        "finite gradient norms of 'log_likelihood/",
    ),
    "no gradient": (lambda a, x: right(a, x).detach(), "depend on the parameters of BatchNorm1d"),
    "a gradient of zero": (lambda a, x: 0 * right(a, x), "depend on the parameters of BatchNorm1d"),
    "the global random state": (moves_random_state, r"no trace.*\['the global random state'\]"),
    "a weight": (writes_a_weight, r"no trace, got a change of \['bias'\]"),
    "a buffer": (writes_a_buffer, r"no trace, got a change of \['running_mean'\]"),
    "a gradient left": (leaves_a_gradient, r"no trace.*'weight\.grad', 'bias\.grad'"),
    "a hook": (hooks, r"no trace, got a change of \['hooks'\]"),
    "NumPy's random state": (moves_numpys_state, "no trace.*NumPy"),
    "train mode": (trains, r"no trace.*training"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_contract_is_named(name: str) -> None:
    term, message = BROKEN[name]
    with pytest.raises((AssertionError, ValueError), match=message):
        check_adapter(Custom(term), torch.randn(4, 3))


def draws_from_a_copy_of_the_global_state(adapter: Custom, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return right(adapter, x) * torch.rand(1)


def test_a_term_that_follows_the_global_random_state_is_named() -> None:
    with pytest.raises(AssertionError, match="to be the same a second time"):
        check_adapter(Custom(draws_from_a_copy_of_the_global_state), torch.randn(4, 3))


def test_a_check_is_no_draw_of_the_adapters() -> None:
    """Or each later score of it would be watched for draws, which takes longer than itself."""
    adapter, x, before = Custom(right), torch.randn(4, 3), torch.get_rng_state()
    check_adapter(adapter, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not _draws[adapter]


def test_a_batch_that_is_written_into_is_named() -> None:
    x = torch.randn(4, 3)

    class Shares(Custom):
        def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
            x.add_(1)  # the caller's own, not the copy that it was given
            yield "log_likelihood", right(self, batch)

    with pytest.raises(AssertionError, match=r"no trace, got a change of \['batch\[0\]'\]"):
        check_adapter(Shares(right), x)


def test_terms_that_come_and_go_are_named() -> None:
    class Varies(Custom):
        def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
            yield from super().log_likelihood(batch)
            if len(batch) > 1:
                yield "more", right(self, batch)

    with pytest.raises(AssertionError, match=r"terms \['log_.*', 'more'\] alone, got \['log_like"):
        check_adapter(Varies(right), torch.randn(4, 3))


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        check_adapter(Custom(right), torch.randn(1, 3))


# Nats


def flow() -> nn.Module:
    return zuko.flows.MAF(features=3, transforms=1, hidden_features=(8,))


def samples(flow: Any) -> Tensor:
    with torch.no_grad():
        return flow().sample((1000,))  # type: ignore[no-any-return]


class Scale(nn.Module):
    """Independent normals of trained scales: no density is differentiated twice for less."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(3))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.unnormalised(x) - (self.log_scale + 0.5 * math.log(2 * math.pi)).sum()

    def unnormalised(self, x: Tensor) -> Tensor:
        return -0.5 * (x / self.log_scale.exp()).square().sum(1)


def scaled(module: nn.Module, factor: float) -> om.LogLikelihood:
    return om.LogLikelihood(module, lambda module, x: factor * module.log_prob(x))


@pytest.mark.parametrize("seed", range(2))
def test_log_likelihood_in_nats_is_taken_for_it(seed: int) -> None:
    torch.manual_seed(seed)
    model = flow()
    x = samples(model)
    check_adapter(om.LogLikelihood(model), x[:3], samples=x)


@pytest.mark.parametrize("factor", [2.0, 1 / 3])
def test_other_units_are_named(factor: float) -> None:
    x = torch.randn(1000, 3)
    with pytest.raises(AssertionError, match=r"in nats, got .* times a factor of \d"):
        check_adapter(scaled(Scale(), factor), x[:3], samples=x)


def test_samples_of_another_model_are_named() -> None:
    x = 1.5 * torch.randn(1000, 3)
    with pytest.raises(AssertionError, match="not the log-likelihood of the model that was samp"):
        check_adapter(om.LogLikelihood(Scale()), x[:3], samples=x)


def test_an_unnormalised_density_is_named() -> None:
    adapter = om.LogLikelihood(Scale(), lambda module, x: module.unnormalised(x))
    x = torch.randn(1000, 3)
    with pytest.raises(AssertionError, match="gradient of zero on average"):
        check_adapter(adapter, x[:3], samples=x)


def test_too_few_samples_of_the_model_are_refused() -> None:
    x = torch.randn(399, 3)
    with pytest.raises(ValueError, match="at least 400 samples of the model, got 399"):
        check_adapter(om.LogLikelihood(Scale()), x[:3], samples=x)


# Expectations


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(5, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)  # type: ignore[no-any-return]


def texts(module: Bigram, n: int = 1000, length: int = 6) -> Tensor:
    tokens = torch.randint(5, (n, 1))
    with torch.no_grad():
        for _ in range(length - 1):
            p = module(tokens[:, -1]).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1)], 1)
    return tokens


def glow_with_priors() -> om.models.Glow:
    flow = om.models.Glow(channels=1, size=4, levels=2, steps=1, hidden=4)
    perturbed(flow, 0.3)
    return flow.eval()


class Changed(om.Adapter):
    """The elements of another adapter, changed."""

    def __init__(self, adapter: om.Adapter, change: Callable[[om.Elements], om.Elements]) -> None:
        self.module, self._adapter, self._change = adapter.module, adapter, change

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor | om.Elements]]:
        for term, value in self._adapter.log_likelihood(batch):
            yield term, self._change(value) if isinstance(value, om.Elements) else value


def test_expectations_of_text_are_taken_for_them() -> None:
    module = Bigram()
    tokens = texts(module)
    check_adapter(om.SequenceLikelihood(module), tokens[:3], samples=tokens)


@pytest.mark.slow
def test_expectations_of_a_flow_are_taken_for_them() -> None:
    flow = glow_with_priors()
    images = flow.sample(1000)
    check_adapter(om.LogLikelihood(flow), images[:3], samples=images)


def test_the_law_of_samples_by_element_is_taken_for_it() -> None:
    net, x = nn.Linear(2, 4).double(), torch.randn(1000, 2).double()

    def law(net: nn.Module, x: Tensor, given: Tensor) -> torch.distributions.Distribution:
        mean, log_sd = net(given).chunk(2, 1)
        return torch.distributions.Normal(mean, log_sd.exp())

    adapter = om.LogLikelihood(net, law, condition=lambda batch: {"given": batch[1]})
    with torch.no_grad():
        drawn = law(net, x, x).sample()  # type: ignore[no-untyped-call]
    check_adapter(adapter, (drawn[:3], x[:3]), samples=(drawn, x))


def off(value: om.Elements, by: float) -> om.Elements:
    expected = value.expected
    assert callable(expected)
    return replace(value, expected=lambda: expected() + by)


def other_pair(value: om.Elements) -> om.Elements:
    pair = value.quadratic
    assert pair is not None
    return replace(value, quadratic=lambda: (pair()[0], 1.1 * pair()[1]))


def not_finite(value: om.Elements) -> om.Elements:
    return replace(value, expected=lambda: value.log_prob / 0)


class Doubled(om.Elements):
    def total(self) -> Tensor:
        return 2 * super().total()


def doubled(value: om.Elements) -> om.Elements:
    return Doubled(value.log_prob)


WRONG: dict[str, tuple[Callable[[om.Elements], om.Elements], str]] = {
    "minus the entropy and more": (lambda e: off(e, 0.1), r"`expected` of 'log_likelihood' to be"),
    "the entropy": (
        lambda e: replace(e, expected=lambda: -resolved(e.expected)),  # type: ignore[arg-type]
        "minus the entropy of the law",
    ),
    "what came": (lambda e: replace(e, expected=torch.zeros_like(e.log_prob)), "`expected` of"),
    "another pair": (other_pair, "the second of `quadratic` of 'log_likelihood' to be the mean"),
    "not finite": (not_finite, "expected of term 'log_likelihood' of Changed to be finite"),
    "the wrong shape": (
        lambda e: replace(e, expected=lambda: e.log_prob[:, :1]),
        "expected of term 'log_likelihood' of Changed to be of the shape",
    ),
    "another total": (doubled, "elements of 'log_likelihood' to add up to it, got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_expectation_is_named(name: str) -> None:
    change, message = WRONG[name]
    module = Bigram()
    tokens = texts(module)
    adapter = Changed(om.SequenceLikelihood(module), change)
    with pytest.raises((AssertionError, ValueError), match=message):
        check_adapter(adapter, tokens[:3], samples=tokens)


def test_a_long_check_says_how_far_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(400, 3)
    for progress in (True, False):
        check_adapter(om.LogLikelihood(Scale()), x[:3], samples=x, progress=progress)
        assert ("identities: 100%" in capfd.readouterr().err) is progress
