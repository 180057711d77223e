"""Which layers are features: the live ones, told from the constant, the dead and the broken."""

import numpy as np
import pytest
import torch
from support.diffusers_cases import unet
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.densities import Array
from ood_monitor.densities.features import LogNorms, TermValues, layer_of, table

EPS = {"float32": float(np.finfo(np.float32).eps), "float64": float(np.finfo(np.float64).eps)}
every_precision = pytest.mark.parametrize("eps", EPS.values(), ids=EPS)


def norms(*columns: float, n: int = 40, seed: int = 0) -> Array:
    """Log-normal squared norms (N, F) around the given sizes."""
    return np.array(columns) * np.exp(np.random.default_rng(seed).normal(size=(n, len(columns))))


def fitted(values: Array, eps: float = EPS["float32"], names: str = "abcdefgh") -> LogNorms:
    return LogNorms.fit(tuple(f"term/{name}" for name in names[: values.shape[1]]), values, eps)


class Attention(nn.Module):
    """Self-attention over three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)

    def log_prob(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return -0.5 * (y - 1).square().flatten(1).sum(1)


# Live, dead, constant, not finite


@every_precision
def test_live_features_are_logs_of_the_norms(eps: float) -> None:
    values = norms(1.0, 1e-3, 1e4)
    log_norms = fitted(values, eps)
    assert log_norms.dropped == {}
    assert log_norms.live_names == ("term/a", "term/b", "term/c")
    np.testing.assert_allclose(log_norms(values), np.log(values), rtol=1e-12)


@every_precision
def test_rounding_noise_is_dead_and_small_norms_are_live(eps: float) -> None:
    noise, small = eps**2, 1e4 * eps**2
    assert fitted(norms(1.0, noise, small), eps).dropped == {"term/b": "dead"}


def test_dead_is_judged_within_a_term() -> None:
    values = norms(1e20, 1e5, 1.0, 1e-15)
    names = ("large/a", "large/b", "small/a", "small/b")
    assert LogNorms.fit(names, values, EPS["float32"]).dropped == {
        "large/b": "dead",
        "small/b": "dead",
    }


@pytest.mark.parametrize("value", [0.1, 1.0, 1e6 / 3])
def test_constant_norms_are_dropped(value: float) -> None:
    values = norms(1.0, 1.0)
    values[:, 1] = value * (1 + 2 * EPS["float32"] * np.arange(40) / 40)
    assert fitted(values).dropped == {"term/b": "constant"}


def test_zero_norms_are_dropped() -> None:
    assert set(fitted(norms(1.0, 0.0)).dropped) == {"term/b"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("samples", [1, 30, 40], ids="{} samples".format)
def test_norms_that_are_not_finite_are_dropped(bad: float, samples: int) -> None:
    values = norms(1.0, 1.0)
    values[:samples, 1] = bad
    log_norms = fitted(values)
    assert log_norms.dropped == {"term/b": "not finite"}
    assert log_norms(values).shape == (40, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_layer_hides_no_dead_one_of_its_term(bad: float) -> None:
    values = norms(1.0, 1e-16, 1.0)
    values[:, 2] = bad
    assert fitted(values).dropped == {"term/b": "dead", "term/c": "not finite"}


def test_without_a_live_feature_fitting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient norms vary, got none.*'constant'"):
        fitted(np.ones((40, 2)))


@every_precision
@pytest.mark.parametrize("zero", [0.0, 1e-320])
def test_zero_norm_of_a_live_layer_stays_finite(eps: float, zero: float) -> None:
    values = norms(1.0, 1.0)
    log_norms = fitted(values, eps)
    features = log_norms(np.full((1, 2), zero))
    assert np.isfinite(features).all()
    assert (features < np.log(values).min(0) - 20).all()


def test_zeros_among_the_fit_samples_stay_finite() -> None:
    values = norms(1.0, 1.0)
    values[::3, 1] = 0.0
    log_norms = fitted(values)
    assert log_norms.dropped == {}
    assert np.isfinite(log_norms(values)).all()


def test_what_is_live_is_frozen() -> None:
    values = norms(1.0, 1e-16)
    log_norms = fitted(values)
    assert log_norms(norms(1e-16, 1.0, n=3)).shape == (3, 1)


# Of real models


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_key_bias_of_an_attention_is_dead(dtype: torch.dtype) -> None:
    adapter = om.LogLikelihood(Attention().to(dtype))
    found = om.gradient_norms(adapter, torch.randn(40, 3, 4, dtype=dtype), granularity="row")
    names, values = table(found)
    dropped = LogNorms.fit(names, values, torch.finfo(dtype).eps).dropped
    key_rows = {f"log_likelihood/attention.in_proj_bias[{i}]": "dead" for i in range(4, 8)}
    assert dropped == key_rows


def test_key_bias_of_a_unet_is_dead() -> None:
    sizes = {"sample_size": 4, "block_out_channels": (4, 4), "attention_head_dim": 2}
    network = unet(in_channels=1, out_channels=1, **sizes)
    adapter = om.DenoisingBound(network, torch.linspace(0.99, 0.01, 1000), levels=[500])
    names, values = table(om.gradient_norms(adapter, torch.randn(20, 1, 4, 4)))
    dropped = LogNorms.fit(names, values, EPS["float32"]).dropped
    assert dropped == {name: "dead" for name in names if name.endswith("to_k.bias")}
    assert len(dropped) == 4


# Names


def test_table_has_a_column_for_each_tensor_or_row() -> None:
    found = {"t/weight": torch.arange(6.0).reshape(3, 2), "t/bias": torch.tensor([7.0, 8.0, 9.0])}
    names, values = table(found)
    assert names == ("t/weight[0]", "t/weight[1]", "t/bias")
    assert values.tolist() == [[0.0, 1.0, 7.0], [2.0, 3.0, 8.0], [4.0, 5.0, 9.0]]
    assert values.dtype == np.float64


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_belong_to_their_layer(rows: int) -> None:
    names, _ = table({"t=50/up.0.weight": torch.ones(2, rows), "t=50/up.0.bias": torch.ones(2)})
    assert [layer_of(name) for name in names] == ["t=50/up.0.weight"] * rows + ["t=50/up.0.bias"]


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_names_are_those_of_the_gradient_norms(granularity: str) -> None:
    adapter = om.LogLikelihood(Attention())
    found = om.gradient_norms(adapter, torch.randn(3, 3, 4), granularity=granularity)
    names, values = table(found)
    assert list(dict.fromkeys(map(layer_of, names))) == list(found)
    assert values.shape == (3, len(names))


@every_precision
def test_terms_that_vary_are_features(eps: float) -> None:
    rng = np.random.default_rng(0)
    constant = 1e4 * (1 + eps * rng.uniform(-1, 1, 40))
    infinite = np.where(np.arange(40) == 3, -np.inf, 1.0)
    values = np.stack([rng.normal(size=40), constant, rng.normal(size=40) - 1e4, infinite], 1)
    terms = TermValues.fit(("a", "b", "c", "d"), values, eps)
    assert terms.live_names == ("a", "c")
    assert np.array_equal(terms(values), values[:, [0, 2]])
    assert np.isfinite(terms(np.array([[-np.inf, 0.0, np.inf, 0.0]]))).all()


def test_one_term_is_the_likelihood_and_no_feature() -> None:
    values = np.random.default_rng(0).normal(size=(40, 2))
    assert TermValues.fit(("a",), values[:, :1], 1e-7).live_names == ()
    assert TermValues.fit(("a", "b"), values * [1, 0], 1e-7).live_names == ()
