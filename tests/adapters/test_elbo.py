"""The evidence lower bound against torch.distributions, and on diffusers' autoencoder."""

import math
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import ood_monitor as om
from ood_monitor.adapters.base import checked_terms
from ood_monitor.adapters.observations import Gaussian


class VAE(nn.Module):
    """Of linear maps, from (B, 1, 2, 3) to two latents and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.double()

    def encode(self, x: Tensor) -> Any:
        mean, log_variance = self.encoder(x.flatten(1)).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Any:
        return self.decoder(z).reshape(-1, 1, 2, 3)


class Diffusers(VAE):
    """The same with the attributes of diffusers' outputs."""

    def encode(self, x: Tensor) -> Any:
        mean, log_variance = super().encode(x)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=log_variance))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=super().decode(z))


def bound(adapter: om.Adapter, batch: Any) -> dict[str, Tensor]:
    return {term: value.detach() for term, value in checked_terms(adapter, batch)}


def elbo(module: VAE, x: Tensor, variance: float, seed: int, **options: Any) -> Tensor:
    adapter = om.ELBO(module, observation=Gaussian(variance), seed=seed, **options)
    return torch.stack([*bound(adapter, x).values()]).sum(0)


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 1, 2, 3, dtype=torch.float64)


def posterior(module: VAE, x: Tensor) -> Normal:
    mean, log_variance = VAE.encode(module, x)
    return Normal(mean.detach(), (0.5 * log_variance).exp().detach())


@pytest.mark.parametrize("make", [VAE, Diffusers])
@pytest.mark.parametrize("variance", [1.0, 0.04])
def test_terms_are_those_of_torch_distributions(make: type[VAE], variance: float) -> None:
    module, x = make(), images()
    q = posterior(module, x)
    eps = torch.randn(2, generator=torch.Generator().manual_seed(3)).double()
    decoded = VAE.decode(module, q.mean + q.stddev * eps).detach()
    found = bound(om.ELBO(module, observation=Gaussian(variance), seed=3), x)
    assert list(found) == ["reconstruction", "kl"]
    log_density = Normal(decoded, math.sqrt(variance)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(found["reconstruction"], log_density)
    torch.testing.assert_close(found["kl"], -kl_divergence(q, Normal(0.0, 1.0)).sum(1))


def test_the_bound_is_below_the_log_likelihood() -> None:
    module, x, variance = VAE(), images(), 0.5
    draws = torch.stack([elbo(module, x, variance, seed) for seed in range(300)])
    assert (draws.mean(0) < marginal(module, x, variance)).all()


def test_the_bound_is_tight_at_the_true_posterior() -> None:
    module, x, variance = VAE(), images(), 0.5
    weight, mean = module.decoder.weight.detach(), module.decoder.bias.detach()
    with torch.no_grad():
        module.decoder.weight.copy_(weight / weight.norm(dim=0) * torch.eye(6)[:, :2])
        weight = module.decoder.weight.clone()
        precision = 1 + weight.square().sum(0) / variance  # of orthogonal latents
        gain = weight.T / variance / precision[:, None]
        module.encoder.weight.copy_(torch.cat([gain, torch.zeros(2, 6)]))
        module.encoder.bias.copy_(torch.cat([-gain @ mean, -precision.log()]))
    draws = torch.stack([elbo(module, x, variance, seed) for seed in range(500)])
    deviation = (draws.mean(0) - marginal(module, x, variance)) / (draws.std(0) / math.sqrt(500))
    assert (deviation.abs() < 4).all()


def test_sample_has_the_same_bound_alone_and_in_any_batch() -> None:
    x, adapter = images(), om.ELBO(VAE())
    together = bound(adapter, x)
    torch.rand(9)
    for order in ([0], [3], [4, 2, 0]):
        torch.testing.assert_close(
            bound(adapter, x[order]), {term: value[order] for term, value in together.items()}
        )


# Several draws


def marginal(module: VAE, x: Tensor, variance: float) -> Tensor:
    """log p(x) of a linear decoder: W z + b, with z standard, plus noise, is Normal."""
    weight, mean = module.decoder.weight.detach(), module.decoder.bias.detach()
    covariance = weight @ weight.T + variance * torch.eye(6)
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    return normal.log_prob(x.flatten(1))  # type: ignore[no-any-return, no-untyped-call]


def draws_of(k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(2, generator=generator) for _ in range(k)]).double()


def test_terms_are_means_over_the_draws() -> None:
    module, x = VAE(), images()
    q = posterior(module, x)
    decoded = torch.stack([VAE.decode(module, q.mean + q.stddev * eps) for eps in draws_of(3)])
    expected = Normal(decoded.detach(), 1.0).log_prob(x).flatten(2).sum(2).mean(0)
    found = bound(om.ELBO(module, draws=3), x)
    torch.testing.assert_close(found["reconstruction"], expected)
    torch.testing.assert_close(found["kl"], bound(om.ELBO(module), x)["kl"])


def test_terms_add_up_to_the_importance_weighted_bound() -> None:
    module, x, k = VAE(), images(), 7
    q, weights = posterior(module, x), []
    for eps in draws_of(k):
        z = q.mean + q.stddev * eps
        log_p = Normal(VAE.decode(module, z).detach(), 1.0).log_prob(x).flatten(1).sum(1)
        weights.append(log_p + Normal(0.0, 1.0).log_prob(z).sum(1) - q.log_prob(z).sum(1))
    expected = torch.stack(weights).logsumexp(0) - math.log(k)
    found = bound(om.ELBO(module, draws=k, importance_weighted=True), x)
    assert list(found) == ["reconstruction", "kl", "importance"]
    torch.testing.assert_close(sum(found.values()), expected)


def test_importance_weights_tighten_the_bound_up_to_the_log_likelihood() -> None:
    module, x = VAE(), images()
    known, plain = marginal(module, x, 0.5), elbo(module, x, 0.5, 0, draws=4000)
    weighted = elbo(module, x, 0.5, 0, draws=4000, importance_weighted=True)
    assert (plain < known - 0.1).all()
    torch.testing.assert_close(weighted, known, rtol=0, atol=0.2)


@pytest.mark.parametrize(("draws", "weighted"), [(0, False), (1, True)])
def test_too_few_draws_are_refused(draws: int, weighted: bool) -> None:
    with pytest.raises(ValueError, match=rf"draws of at least {1 + weighted}, got {draws}"):
        om.ELBO(VAE(), draws=draws, importance_weighted=weighted)


@pytest.mark.parametrize(("seed", "same"), [(0, True), (7, False)])
def test_seed_decides_the_noise(seed: int, same: bool) -> None:
    module, x = VAE(), images()
    first, second = bound(om.ELBO(module), x), bound(om.ELBO(module, seed=seed), x)
    assert torch.equal(first["reconstruction"], second["reconstruction"]) == same
    assert torch.equal(first["kl"], second["kl"])


def autoencoder() -> nn.Module:
    return (
        diffusers.AutoencoderKL(
            block_out_channels=(4,), latent_channels=2, norm_num_groups=2, sample_size=8
        )
        .double()
        .eval()
    )


def test_diffusers_autoencoder_has_both_terms() -> None:
    module, x = autoencoder(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    found = bound(om.ELBO(module, observation=Gaussian(0.1)), x)
    q = module.encode(x).latent_dist  # type: ignore[operator]
    eps = torch.randn(q.mean.shape[1:], generator=torch.Generator().manual_seed(0)).double()
    decoded = module.decode(q.mean + q.std * eps).sample.detach()  # type: ignore[operator]
    log_density = Normal(decoded, math.sqrt(0.1)).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(found["kl"], -q.kl().detach())
    torch.testing.assert_close(found["reconstruction"], log_density)


# Refusals


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_module_without_a_method_is_refused(method: str) -> None:
    module = nn.Linear(2, 2)
    setattr(module, method, module.forward)
    missing = ({"encode", "decode"} - {method}).pop()
    with pytest.raises(ValueError, match=rf"Expected Linear to have \['{missing}'\]"):
        om.ELBO(module)


def test_integer_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating-point samples.*uint8"):
        bound(om.ELBO(VAE()), torch.ones(2, 1, 2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 1), (6,)], ids=str)
def test_a_reconstruction_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    module = VAE()
    module.decode = lambda z: torch.zeros(len(z), *shape).double()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="shape"):
        bound(om.ELBO(module), images())


def test_an_encoding_that_is_no_pair_is_refused() -> None:
    module = VAE()
    module.encode = lambda x: x.flatten(1)[:, :2]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="log_variance"):
        bound(om.ELBO(module), images())
