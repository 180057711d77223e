"""Diagnoses of models that are fit to be watched, and of each way in which one is not."""

from typing import Any

import numpy as np
import pytest
import torch
import zuko
from support.small_cases import randn
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.calibration import diagnose


class Normal(nn.Module):
    """Independent Normals, whose best parameters are known."""

    def __init__(self, mean: float = 0.0, log_sd: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((3,), mean, dtype=torch.float64))
        self.log_sd = nn.Parameter(torch.full((3,), log_sd, dtype=torch.float64))

    def log_prob_terms(self, x: Tensor) -> dict[str, Tensor]:
        z = (x - self.mean) * torch.exp(-self.log_sd)
        return {"latent": -0.5 * z.square().sum(1), "log_det": -self.log_sd.sum().expand(len(x))}


class Noisy(Normal):
    """The same of data with noise, under an adapter with a seed."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise


class Dequantised(om.LogLikelihood):
    """Noise of a chosen size instead of a bin's."""

    def log_likelihood(self, batch: Any) -> Any:
        noise = randn(*batch.shape[1:], seed=self.seed)
        return super().log_likelihood(batch + self.module.noise * noise)  # type: ignore[operator]


def data(n: int = 400) -> list[Tensor]:
    return list(randn(n, 3).split(50))


def test_a_model_that_fits_shares_no_gradient() -> None:
    diagnosis = diagnose(om.LogLikelihood(Normal()), data())
    assert diagnosis.shared_gradient.keys() == {"mean", "log_sd"}
    assert all(abs(rho) < 0.02 for rho in diagnosis.shared_gradient.values())
    assert diagnosis.problems == ()
    assert str(diagnosis) == "No problem found."


def test_shared_gradient_is_the_mean_product_of_pairs_over_the_mean_square() -> None:
    model, batches = Normal(0.5, 0.2), data(60)
    diagnosis = diagnose(om.LogLikelihood(model), batches)
    x = torch.cat(batches)
    gradients = [
        torch.autograd.grad(sum(model.log_prob_terms(one[None]).values()), [model.mean])[0]  # type: ignore[arg-type]
        for one in x
    ]
    g = torch.stack(gradients)
    products = g @ g.T
    different = torch.arange(60)[:, None] // 50 != torch.arange(60) // 50
    expected = products[different].mean() / products.diagonal().mean()
    assert diagnosis.shared_gradient["mean"] == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("module", [Normal(mean=1.0), Normal(log_sd=-1.0)], ids=["mean", "scale"])
def test_an_undertrained_model_is_named(module: nn.Module) -> None:
    diagnosis = diagnose(om.LogLikelihood(module), data())
    assert diagnosis.problems[0].startswith("Undertrained or diverged: ")
    assert str(diagnosis).splitlines()[0] == diagnosis.problems[0]


@pytest.mark.slow
def test_training_takes_the_shared_gradient_away() -> None:
    flow = zuko.flows.NSF(features=3, transforms=1, hidden_features=(16,))
    train, held_out = randn(1000, 3, seed=1).float() * 0.3 + 2, (randn(400, 3) * 0.3 + 2).float()
    adapter, batches = om.LogLikelihood(flow), list(held_out.split(50))
    before = diagnose(adapter, batches)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(150):
        loss = -flow().log_prob(train).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = diagnose(adapter, batches)
    upper = [np.quantile([*d.shared_gradient.values()], 0.9) for d in (before, after)]
    assert before.problems[0].startswith("Undertrained")
    assert after.problems == ()
    assert upper[1] < 0.1 < upper[0]


@pytest.mark.slow
def test_noise_that_samples_share_is_no_flaw_of_the_model() -> None:
    """With the same noise for all, samples' gradients agree in what the noise does."""
    module = Noisy(noise=3.0)
    with torch.no_grad():
        module.log_sd.fill_(0.5 * np.log(10))  # the best for data with this noise
    batches = list(randn(600, 3).split(10))
    shared = diagnose(Dequantised(module), batches).shared_gradient
    same = om.LogLikelihood(module, lambda m, x: m.log_prob_terms(x + 3 * randn(3)))  # type: ignore[operator]
    assert abs(shared["mean"]) < 0.1
    assert diagnose(same, batches).shared_gradient["mean"] > 0.2


class Projected(om.Adapter):
    """Sees three directions of many, which the noise chooses."""

    def __init__(self, seed: int = 0) -> None:
        self.module, self.seed = Normal(), seed

    def log_likelihood(self, batch: Any) -> Any:
        directions = torch.linalg.qr(randn(50, 3, seed=self.seed)).Q
        yield from self.module.log_prob_terms(batch @ directions).items()


def test_scores_that_depend_on_the_noise_are_named() -> None:
    diagnosis = diagnose(Projected(), randn(400, 50).split(50))
    assert diagnosis.noise_correlation == pytest.approx(0, abs=0.2)
    assert any(p.startswith("Scores depend on the noise: ") for p in diagnosis.problems)


def test_noise_that_changes_no_score_is_no_problem() -> None:
    diagnosis = diagnose(Dequantised(Noisy(0.0)), data())
    assert diagnosis.noise_correlation == pytest.approx(1)
    assert diagnosis.problems == ()


def test_an_adapter_without_noise_has_no_noise_correlation() -> None:
    class Plain(om.Adapter):
        def __init__(self) -> None:
            self.module = Normal()

        def log_likelihood(self, batch: Any) -> Any:
            yield from self.module.log_prob_terms(batch).items()

    assert diagnose(Plain(), data()).noise_correlation is None


def test_dead_features_are_named() -> None:
    class Flat(Normal):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def log_prob_terms(self, x: Tensor) -> dict[str, Tensor]:
            terms = super().log_prob_terms(x)
            return terms | {"latent": terms["latent"] + 1e-15 * (x * self.flat).sum(1)}

    few = diagnose(om.LogLikelihood(Flat()), data())
    assert few.dropped["latent/flat"] == "dead"
    assert few.features == 6
    assert few.problems == ()
    [problem] = diagnose(om.LogLikelihood(Flat()), data(), layers=["mean", "flat"]).problems
    assert problem.startswith("3 of 4 features are dead: check the model")


def test_halves_that_differ_are_named() -> None:
    x = randn(400, 3)
    x[200:] *= 3
    diagnosis = diagnose(om.LogLikelihood(Normal()), x.split(50))
    assert min(diagnosis.ks.values()) > 0.2
    assert any("Kolmogorov-Smirnov above 0.2" in problem for problem in diagnosis.problems)


def test_only_chosen_layers_are_looked_at() -> None:
    diagnosis = diagnose(om.LogLikelihood(Normal()), data(), layers=["mean"])
    assert diagnosis.shared_gradient.keys() == {"mean"}
    assert diagnosis.ks.keys() == {"latent/mean"}


def test_model_and_adapter_stay_as_they_are() -> None:
    adapter = Dequantised(Noisy(1.0))
    adapter.module.train()
    before = {name: value.clone() for name, value in adapter.module.state_dict().items()}
    diagnose(adapter, data())
    assert adapter.seed == 0
    assert adapter.module.training
    assert all(p.grad is None for p in adapter.module.parameters())
    assert all(torch.equal(v, before[name]) for name, v in adapter.module.state_dict().items())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_batches_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least two held-out batches, got {count}"):
        diagnose(om.LogLikelihood(Normal()), data()[:count])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_two_populations_are_named(share: float) -> None:
    x = randn(600, 3)
    odd = torch.from_numpy(np.random.default_rng(0).permutation(600)[: int(600 * share)])
    x[odd] *= 1e4
    diagnosis = diagnose(om.LogLikelihood(Normal()), x.split(50), density=om.DiagonalGaussian())
    assert diagnosis.mixed == pytest.approx(share, abs=0.15)
    assert any(p.startswith("Two populations: ") for p in diagnosis.problems)


def test_one_population_is_one() -> None:
    assert diagnose(om.LogLikelihood(Normal()), data()).mixed == 0.0


@pytest.mark.slow
def test_mean_correlation_is_that_of_the_features() -> None:
    adapter, batches = om.LogLikelihood(Normal()), data()
    norms = om.gradient_norms(adapter, torch.cat(batches))
    live = [norms[name].log().numpy() for name in diagnose(adapter, batches).ks]
    expected = abs(np.corrcoef(live)[0, 1])
    assert diagnose(adapter, batches).mean_correlation == pytest.approx(expected)
    assert diagnose(adapter, batches, layers=["mean"]).mean_correlation == 0.0


@pytest.mark.slow
def test_effective_degrees_of_freedom_are_those_of_the_gradients() -> None:
    """A Normal's gradient by its mean is Normal itself, of three independent elements."""
    diagnosis = diagnose(om.LogLikelihood(Normal()), randn(2000, 3).split(500))
    assert diagnosis.effective_dof["latent/mean"] == pytest.approx(3, rel=0.1)
