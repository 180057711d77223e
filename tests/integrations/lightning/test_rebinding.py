"""The module under test is the one that is scored, whichever object an adapter was made of."""

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.training.rebinding import bound_to
from support.foreign_cases import FOREIGN
from support.model_case import Model
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import term_values

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class VAE(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, 4), nn.Linear(2, width)
        self.register_buffer("scale", torch.rand(1))

    def encode(self, x: Tensor) -> Any:
        return (self.scale * self.encoder(x)).chunk(2, 1)  # type: ignore[operator]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)  # type: ignore[no-any-return]


class Trained(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vae, self.other = VAE(), nn.Linear(3, 3)
        self.shift = nn.Parameter(torch.randn(1))

    def prepared(self, batch: Tensor) -> Tensor:
        return batch + self.shift

    def log_prob(self, x: Tensor) -> Tensor:
        return -(self.vae.decode(self.vae.encode(x)[0]) + self.shift).square().sum(1)


class Twice(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.ema_vae = VAE()


def same(a: om.Adapter, b: om.Adapter, batch: Any = X) -> bool:
    found, expected = term_values(a, batch), term_values(b, batch)
    return all(torch.equal(found[name], expected[name]) for name in expected)


class Holder(nn.Module):
    """A module of which the model is a part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def perturbed(module: nn.Module) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return other


#: One closes over its network, by `scale=`: that is refused, as below.
WITHOUT_CLOSURE = [case for case in FOREIGN if case.name != "pixelcnn"]


@pytest.mark.parametrize("case", WITHOUT_CLOSURE, ids=lambda case: case.name)
def test_every_adapter_scores_the_module_under_test(case: Model) -> None:
    adapter, batch = case.make()
    other = perturbed(adapter.module)
    before, (kept, expected) = term_values(adapter, batch), (adapter.module, copy.copy(adapter))
    expected.module = other
    bound = bound_to(adapter, Holder(other))
    assert type(bound) is type(adapter)
    assert bound.module is other
    assert same(bound, expected, batch)
    assert adapter.module is kept
    assert all(map(torch.equal, term_values(adapter, batch).values(), before.values()))
    assert not same(bound, adapter, batch)


@pytest.mark.parametrize("of", [lambda model: model, lambda model: model.vae], ids=["all", "part"])
def test_an_adapter_of_the_module_is_itself(of: Callable[[Any], Any]) -> None:
    model = Trained()
    adapter = om.LogLikelihood(of(model), lambda module, x: model.log_prob(x))
    assert bound_to(adapter, model) is adapter
    assert bound_to(om.LogLikelihood(model.vae, len), Holder(model)).module is model.vae


def test_a_model_of_its_own_is_left_as_it_is() -> None:
    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

    vae = VAE()
    closed = om.LogLikelihood(vae, lambda module, x: -vae.encode(x)[0].square().sum(1))
    for adapter in (om.ELBO(vae), om.ELBO(VAE(7)), closed):
        assert bound_to(adapter, Classifier()) is adapter
        if adapter.module is not vae:
            assert bound_to(adapter, Trained()) is adapter


def test_several_parts_that_may_be_the_model_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"got 2, \['ema_vae', 'vae'\]: .* Define `adapter\(self\)`"
    ):
        bound_to(om.ELBO(Twice().vae), Twice())


class Own(om.Adapter):
    """Has its model in every way that can be replaced."""

    def __init__(self, model: Trained) -> None:
        self.module = model
        self.lock, self.note = threading.Lock(), {"text": ["a", 1]}
        self.parts: dict[str, Any] = {"list": [model.vae, (model.other,)], "set": {model.vae}}
        self.weight, self.buffer = model.shift, model.vae.scale
        self.method, self.plain = model.prepared, self.likelihood
        self.partial = functools.partial(torch.add, model.shift)
        self.inner = om.ELBO(model.vae)
        self.step = Step(model.vae)

    def likelihood(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]

    def log_likelihood(self, batch: Any) -> Any:
        yield "log_likelihood", self.module.log_prob(batch)  # type: ignore[operator]


@dataclass(frozen=True)
class Step:
    vae: VAE

    def __call__(self, x: Tensor) -> Tensor:
        return self.vae.encode(x)[0]  # type: ignore[no-any-return]


def test_the_model_is_replaced_wherever_the_adapter_has_it() -> None:
    old, new = Trained(), Trained()
    adapter = Own(old)
    bound = bound_to(adapter, new)
    assert bound.parts == {"list": [new.vae, (new.other,)], "set": {new.vae}}
    assert (bound.weight, bound.buffer) == (new.shift, new.vae.scale)
    assert bound.method.__self__ is new
    assert bound.plain.__self__ is bound
    assert bound.partial.args == (new.shift,)
    assert bound.inner.module is bound.step.vae is new.vae
    assert bound.lock is adapter.lock
    assert bound.note is adapter.note
    assert same(bound, om.LogLikelihood(new))
    assert (adapter.module, adapter.inner.module, adapter.method.__self__) == (old, old.vae, old)
    assert adapter.parts["list"][0] is old.vae


def test_a_compiled_part_is_replaced_by_the_modules_own() -> None:
    old, new = Trained(), Trained()
    compiled = torch.compile(old.vae, backend="eager")
    assert bound_to(om.LogLikelihood(compiled, len), new).module is new.vae


class View(nn.Module):
    """Another form of a module's parts."""

    def __init__(self, model: Trained) -> None:
        super().__init__()
        self.encoder, self.decoder = model.vae.encoder, model.vae.decoder

    def encode(self, x: Tensor) -> Any:
        return self.encoder(x).chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)  # type: ignore[no-any-return]


def test_a_module_that_is_put_together_of_parts_gets_the_new_ones() -> None:
    old, new = Trained(), Trained()
    adapter = om.ELBO(View(old))
    bound = bound_to(adapter, new)
    assert bound.module.encoder is new.vae.encoder
    assert same(bound, om.ELBO(View(new)))
    assert adapter.module.encoder is old.vae.encoder
    own = om.ELBO(View(new))
    assert bound_to(own, new).module is own.module


OLD = Trained()


def by_global(module: Any, x: Tensor) -> Tensor:
    return OLD.log_prob(x)


def by_another_function(module: Any, x: Tensor) -> Tensor:
    return by_global(module, x)


def with_a_name_of_a_part(module: Any, x: Tensor) -> Tensor:
    return -module.OLD.square().sum() + x.sum(1)  # type: ignore[no-any-return]


class ByGlobal(om.Adapter):
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def log_likelihood(self, batch: Any) -> Any:
        yield "log_likelihood", next(OLD for _ in range(1)).log_prob(batch)


def function(of: Callable[..., Any]) -> om.Adapter:
    return om.LogLikelihood(OLD.vae, of)


def closed(model: Any) -> Callable[..., Any]:
    return lambda module, x: model.log_prob(x)


CAPTURED: dict[str, Callable[[], om.Adapter]] = {
    "closure": lambda: function(closed(OLD)),
    "closure over a part": lambda: function(closed(OLD.vae.encoder)),
    "closure over a weight": lambda: function(closed(OLD.vae.scale)),
    "closure over a list": lambda: function(closed([OLD.vae])),
    "default": lambda: function(lambda module, x, model=OLD: model.log_prob(x)),
    "keyword default": lambda: function(lambda module, x, *, model=OLD: model.log_prob(x)),
    "global": lambda: function(by_global),
    "global of another function": lambda: function(by_another_function),
    "global of an own class": lambda: ByGlobal(OLD),
    "partial": lambda: function(functools.partial(closed(OLD))),
    "cached": lambda: function(functools.lru_cache(closed(OLD))),
    "wrapped": lambda: function(functools.wraps(len)(closed(OLD))),
    "inputs": lambda: om.ELBO(OLD.vae, inputs=lambda batch: OLD.prepared(batch)),
    "in a closure": lambda: function(closed(closed(OLD))),
}


@pytest.mark.parametrize("make", CAPTURED.values(), ids=CAPTURED)
def test_a_function_that_keeps_the_old_model_is_refused_by_name(
    make: Callable[[], om.Adapter],
) -> None:
    adapter = make()
    assert bound_to(adapter, OLD) is adapter
    with pytest.raises(ValueError, match=r"got the function .* uses the old one by .* Define `ad"):
        bound_to(adapter, Trained())


def test_a_function_of_its_argument_is_kept() -> None:
    for of in (with_a_name_of_a_part, lambda module, x: module.encode(x)[0].sum(1)):
        bound = bound_to(function(of), new := Trained())
        assert bound.module is new.vae
        assert bound._function is of  # type: ignore[attr-defined]


def test_an_encoder_that_is_a_part_of_the_module_is_refused_in_a_closure() -> None:
    class Latent(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vae, self.network = VAE(), nn.Conv2d(1, 1, 3, padding=1)

    old = Latent()
    adapter = om.DenoisingBound(
        old.network, torch.linspace(0.9, 0.1, 10), levels=[5], inputs=om.latent_mean(old.vae)
    )
    with pytest.raises(ValueError, match=r"latent_mean.*uses the old one by vae"):
        bound_to(adapter, Latent())


def test_a_weight_of_nobody_is_refused() -> None:
    adapter = om.ELBO(OLD.vae)
    adapter.prior = OLD.shift * 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"a tensor of shape \(1,\) that requires gradients"):
        bound_to(adapter, Trained())


def test_an_adapter_that_cannot_be_copied_is_refused() -> None:
    class Locked:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("cannot pickle it")

    adapter = om.ELBO(OLD.vae)
    adapter.locked = Locked(OLD.vae)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"that can be copied .* got TypeError: cannot pickle it"):
        bound_to(adapter, Trained())


def test_too_many_objects_are_refused() -> None:
    adapter = om.ELBO(OLD.vae)
    adapter.data = [[i] for i in range(20_000)]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="more than 10000"):
        bound_to(adapter, Trained())


def test_a_detector_goes_to_the_bound_adapter_with_what_it_has_learned() -> None:
    old = Trained()
    detector = om.Detector(om.ELBO(old.vae)).fit([torch.randn(100, 6)], progress=False)
    other = detector.on(bound_to(detector.adapter, new := Trained()))
    assert (other.adapter.module, detector.adapter.module) == (new.vae, old.vae)
    assert other.fitted is detector.fitted
    assert (other.is_stale, detector.is_stale) == (True, False)
    new.load_state_dict(old.state_dict())
    assert not other.is_stale
    assert torch.equal(other.score(X).p_value, detector.score(X).p_value)


def test_a_detector_does_not_go_to_another_model() -> None:
    detector = om.Detector(om.ELBO(VAE()))
    other = om.ELBO(VAE(7))
    assert detector.on(other).adapter is other
    detector.fit([torch.randn(100, 6)], progress=False)
    with pytest.raises(ValueError, match=r"with the detector's layers, got 'encoder.weight'"):
        detector.on(other)
