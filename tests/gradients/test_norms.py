"""Squared gradient norms against plain gradients, one sample at a time, over all models."""

import functools
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.cases import HEAVY, MODELS, Function, Gaussian, Model, model, slow_if_heavy
from support.reference import gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ood_monitor as om
from ood_monitor.adapters.base import Batch, checked_terms, map_tensors
from ood_monitor.gradients import gradient_norms, terms_and_norms
from ood_monitor.gradients.check import _known
from ood_monitor.gradients.rules import RULES, Materialised, Rule

Norms = dict[str, Tensor]

#: Relative error allowed, and the norm, relative to the largest of its term, below which it is
#: rounding noise: the largest gradients leave an error of their size times the unit roundoff in all
#: others, and norms square it. (In single precision 1e-9 is a gradient 3e-5 times the largest.)
TOLERANCES = {torch.float64: (1e-8, 1e-20), torch.float32: (1e-4, 1e-9)}

#: Four samples.
X = torch.linspace(-1, 1, 12).double().reshape(4, 3)

DISAGREES = "The fast path disagrees with the loop"


def marks(case: Model) -> list[pytest.MarkDecorator]:
    return [pytest.mark.filterwarnings(f"ignore:{DISAGREES}")] * case.warns


def slow(case: Model) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (case.name in HEAVY)


# By module, so that the tests of a model follow each other, in one process: what they share is
# computed once.
models = pytest.mark.parametrize(
    "case", [pytest.param(m, id=m.name, marks=marks(m)) for m in MODELS], scope="module"
)
#: Of which the heavy ones are slow.
quick_models = pytest.mark.parametrize(
    "case", [slow_if_heavy(m, *marks(m)) for m in MODELS], scope="module"
)


def rows(gradients: Norms) -> Norms:
    return {
        k: (g.flatten(2) if g.ndim > 2 else g.reshape(len(g), -1, 1)).square().sum(2)
        for k, g in gradients.items()
    }


def columns(gradients: Norms) -> Norms:
    found = {}
    for key, g in gradients.items():
        others = [d for d in range(1, g.ndim) if d != 2]
        found[key] = g.square().sum(others) if g.ndim > 2 else rows({key: g})[key].sum(1)[:, None]
    return found


def tensors(gradients: Norms) -> Norms:
    return {k: norms.sum(1) for k, norms in rows(gradients).items()}


def assert_norms(actual: Norms, expected: Norms, dtype: torch.dtype = torch.float64) -> None:
    assert list(actual) == list(expected)
    largest: dict[str, float] = {}
    for key, norms in expected.items():
        term = key.split("/")[0]
        largest[term] = max(largest.get(term, 0.0), float(norms.max()))
    rtol, noise = TOLERANCES[dtype]
    for key, norms in expected.items():
        floor = noise * largest[key.split("/")[0]]
        alive = norms > floor
        assert actual[key].shape == norms.shape, key
        assert torch.allclose(actual[key][alive].double(), norms[alive], rtol=rtol, atol=0), key
        assert (actual[key][~alive] <= 2 * floor).all(), key


@functools.cache
def exact_of(case: Model) -> Norms:
    return gradients(*case())


@pytest.fixture
def exact(case: Model) -> Norms:
    return exact_of(case)


class First(NamedTuple):
    """The first use of a model, in which the fast path is compared with the loop."""

    adapter: om.Adapter
    batch: Batch
    norms: Norms
    told: list[str]


@functools.cache
def first_use(case: Model) -> First:
    adapter, batch = case()
    with warnings.catch_warnings(record=True, action="always") as caught:
        norms = gradient_norms(adapter, batch)
    return First(adapter, batch, norms, [str(warning.message) for warning in caught])


@pytest.fixture
def first(case: Model) -> First:
    return first_use(case)


# Over all models


@models
def test_equal_to_gradients_of_single_samples(case: Model, exact: Norms, first: First) -> None:
    adapter, batch, norms, told = first
    assert_norms(norms, tensors(exact))
    # Only what is expected is left to the loop.
    names = [name for name, _ in adapter.module.named_parameters()]
    expected = {n for n in names if any(fnmatchcase(n, pattern) for pattern in case.looped)}
    assert _known[adapter].looped == expected
    assert any(DISAGREES in message for message in told) == case.warns
    assert_norms(gradient_norms(adapter, batch, granularity="row"), rows(exact))
    assert_norms(gradient_norms(adapter, batch, granularity="column"), columns(exact))


def test_each_parameter_may_have_a_granularity_of_its_own() -> None:
    adapter, batch = model("linear-2d")()
    exact = gradients(adapter, batch)
    found = gradient_norms(adapter, batch, granularity={"0.weight": "column", "2.weight": "row"})
    expected = tensors(exact)
    expected["log_likelihood/0.weight"] = columns(exact)["log_likelihood/0.weight"]
    expected["log_likelihood/2.weight"] = rows(exact)["log_likelihood/2.weight"]
    assert_norms(found, expected)


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("channel", "granularity of .*'column'.*, got 'channel'"),
        ({"0.weight": "rows"}, "granularity of .*, got 'rows'"),
        ({"0.weights": "row"}, "granularity of parameters, got one of '0.weights'"),
    ],
)
def test_a_granularity_that_is_none_is_refused(granularity: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_norms(*model("linear-2d")(), granularity=granularity)


@quick_models
def test_single_precision(case: Model, exact: Norms) -> None:
    assert_norms(gradient_norms(*case(torch.float32)), tensors(exact), torch.float32)


@quick_models
def test_a_group_has_the_gradient_of_its_sum(case: Model) -> None:
    adapter, batch = case()
    expected = gradients(adapter, batch, group=2)
    assert_norms(gradient_norms(adapter, batch, group=2), tensors(expected))
    assert_norms(gradient_norms(adapter, batch, group=2, granularity="row"), rows(expected))


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_groups_may_be_many(chunk_size: int | None) -> None:
    adapter, _ = model("conv2d")()
    batch = torch.randn(12, 3, 6, 6).double()
    expected = tensors(gradients(adapter, batch, group=2))
    assert_norms(gradient_norms(adapter, batch, group=2, chunk_size=chunk_size), expected)


@quick_models
def test_chunks_change_nothing(exact: Norms, first: First) -> None:
    for chunk_size in (3, 1):
        found = gradient_norms(first.adapter, first.batch, chunk_size=chunk_size)
        assert_norms(found, tensors(exact))


def test_keys_are_terms_then_parameters_in_module_order() -> None:
    adapter, batch = model("glow")()
    result = terms_and_norms(adapter, batch)
    names = [name for name, _ in adapter.module.named_parameters()]
    terms = dict(checked_terms(adapter, batch))
    assert list(result.norms) == [f"{term}/{name}" for term in terms for name in names]
    assert list(result.log_likelihood) == list(terms)
    for term, values in terms.items():
        torch.testing.assert_close(result.log_likelihood[term], values.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("conv2d", "attention", "gpt2", "tied", "weight-norm"),
        pytest.param("ddpm", marks=pytest.mark.slow),
    ],
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    adapter, batch = model(name)(dtype)
    weights = {k: v.double() for k, v in adapter.module.state_dict().items()}
    actual = gradient_norms(adapter, batch)
    assert {norms.dtype for norms in actual.values()} == {torch.float32}
    exact, doubled = model(name)()
    exact.module.load_state_dict(weights)
    expected = gradient_norms(exact, doubled)
    largest = max(norms.max() for norms in expected.values())
    for key, norms in expected.items():
        if (norms > largest / 100).all():
            torch.testing.assert_close(actual[key].double(), norms, rtol=0.1, atol=0, msg=key)


def test_norms_beyond_half_precision_are_finite() -> None:
    adapter = Gaussian(nn.Linear(3, 2).half())
    norms = gradient_norms(adapter, torch.full((4, 3), 300.0).half())
    assert all(values.isfinite().all() for values in norms.values())
    assert norms["log_likelihood/weight"].max() > torch.finfo(torch.float16).max


# Whatever the caller's state


def no_grad(adapter: om.Adapter, batch: Batch) -> Norms:
    with torch.no_grad():
        return gradient_norms(adapter, batch)


def inference_mode(adapter: om.Adapter, batch: Batch) -> Norms:
    with torch.inference_mode():
        return gradient_norms(adapter, map_tensors(torch.clone, batch))


def autocast(adapter: om.Adapter, batch: Batch) -> Norms:
    with torch.autocast("cpu", torch.bfloat16):
        return gradient_norms(adapter, batch)


def frozen(adapter: om.Adapter, batch: Batch) -> Norms:
    adapter.module.requires_grad_(False)
    return gradient_norms(adapter, batch)


def training(adapter: om.Adapter, batch: Batch) -> Norms:
    adapter.module.train()
    return gradient_norms(adapter, batch)


STATES = (no_grad, inference_mode, autocast, frozen, training)

#: Each model in one of them, the heavy ones in `make test-slow`, and models of every kind in all.
EVERY_STATE = frozenset({"conv2d", "experts", "gpt2", "glow", "lstm", "vae-bernoulli"})


@pytest.mark.parametrize(
    ("case", "under"),
    [
        pytest.param(m, state, id=f"{m.name}-{state.__name__}", marks=marks(m) + slow(m))
        for i, m in enumerate(MODELS)
        for j, state in enumerate(STATES)
        if m.name in EVERY_STATE or i % len(STATES) == j
    ],
    scope="module",
)
def test_the_callers_state_changes_nothing(
    case: Model, exact: Norms, under: Callable[[om.Adapter, Batch], Norms]
) -> None:
    adapter, batch = case(torch.float32)
    actual = under(adapter, map_tensors(lambda t: t[:2], batch))
    assert_norms(actual, {k: v[:2] for k, v in tensors(exact).items()}, torch.float32)


@quick_models
def test_a_model_made_in_inference_mode(case: Model, exact: Norms) -> None:
    with torch.inference_mode():
        adapter, batch = case(torch.float32)
    assert_norms(gradient_norms(adapter, batch), tensors(exact), torch.float32)


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.out(checkpoint(lambda y: m.f(y).tanh(), m.before(x), use_reentrant=False))


# The parameters may be left to the loop, but must be right.
@pytest.mark.filterwarnings(f"ignore:{DISAGREES}")
def test_checkpointing_of_a_function_changes_nothing() -> None:
    parts = {"before": nn.Linear(3, 5), "f": nn.Linear(5, 4), "out": nn.Linear(4, 2)}
    adapter = Gaussian(Function(checkpointed, **parts).double())
    assert_norms(gradient_norms(adapter, X), tensors(gradients(adapter, X)))


@pytest.mark.parametrize("scored_before", [False, True])
@pytest.mark.filterwarnings(f"ignore:{DISAGREES}")
def test_gradient_checkpointing_changes_nothing(scored_before: bool) -> None:
    adapter, batch = model("ddpm")()
    expected = tensors(exact_of(model("ddpm")))
    if scored_before:
        gradient_norms(adapter, batch)
    adapter.module.enable_gradient_checkpointing()
    assert_norms(gradient_norms(adapter, batch), expected)
    assert adapter.module.is_gradient_checkpointing


def test_threads_that_score_one_model_at_once_agree() -> None:
    def slowly(m: Any, x: Tensor) -> Tensor:
        h = m.dropout(m.f(x))
        time.sleep(0.002)  # the other thread's turn, if it may have one
        return m.g(m.dropout(h))

    parts = {"f": nn.Linear(3, 3), "g": nn.Linear(3, 2), "dropout": nn.Dropout(0.5)}
    adapter = Gaussian(Function(slowly, **parts).double().train())
    expected = gradient_norms(adapter, X)
    with ThreadPoolExecutor(2) as threads:
        for actual in threads.map(lambda _: gradient_norms(adapter, X), range(8)):
            assert_norms(actual, expected)
    assert all(submodule.training for submodule in adapter.module.modules())


# What the engine takes for granted, it checks


class Terms(om.Adapter):
    """The terms that a function of the module and the batch gives."""

    def __init__(
        self,
        terms: Callable[[Any, Any], Iterable[tuple[str, Any]]],
        module: nn.Module | None = None,
    ) -> None:
        self.module = nn.Linear(3, 2).double() if module is None else module
        self._terms = terms

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        return self._terms(self.module, batch)


def lying(rule: Rule) -> Rule:
    def zeros(n: int, g: Tensor, arguments: Any) -> dict[str, Materialised]:
        factors = rule.factors(n, g, arguments)
        return {k: Materialised(0 * factor.gradients(0, n)) for k, factor in factors.items()}

    return Rule(rule.arguments, zeros)


LIES = {
    F.linear: "linear-3d",
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    torch.conv_transpose1d: "transposed-1d",
    torch.conv_transpose2d: "transposed-2d",
    torch.conv_transpose3d: "transposed-3d",
    F.embedding: "embedding",
    F.group_norm: "group-norm",
    F.layer_norm: "layer-norm",
    F.rms_norm: "rms-norm",
    F.batch_norm: "batch-norm-2d",
}


def test_every_rule_is_made_to_lie_below() -> None:
    assert LIES.keys() == RULES.keys()


@pytest.mark.parametrize("operation", LIES, ids=lambda f: f.__name__)
def test_a_rule_that_lies_is_caught(
    operation: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, batch = model(LIES[operation])()
    expected = tensors(gradients(adapter, batch))
    monkeypatch.setitem(RULES, operation, lying(RULES[operation]))
    with pytest.warns(UserWarning, match=rf"{DISAGREES}.*: exact, but slower") as caught:
        assert_norms(gradient_norms(adapter, batch), expected)
    (warning,), wrong = caught, _known[adapter].looped
    assert wrong
    assert all(repr(name) in str(warning.message) for name in wrong)
    assert_norms(gradient_norms(adapter, batch), expected)  # and it does not warn again


def test_one_sample_does_not_settle_what_is_looped() -> None:
    adapter, batch = model("linear-2d")()
    gradient_norms(adapter, batch[:1])
    assert adapter not in _known


#: Sizes of passes, and what is alive of them. Of a list that a model holds, its view has its own.
passes: list[int] = []
marks: list["weakref.ref[Mark]"] = []


def counted(m: Any, x: Tensor) -> Tensor:
    passes.append(len(x))
    return m.f(x)


def test_single_samples_are_compared_with_the_loop_once() -> None:
    passes.clear()
    adapter = Gaussian(Function(counted, f=nn.Linear(3, 2)).double())
    for i in range(3):
        gradient_norms(adapter, X[i : i + 1])
    assert passes == [1] * (3 + 2)
    gradient_norms(adapter, X)
    gradient_norms(adapter, X[:1])
    assert passes[5:] == [2, 1, 1, 4, 1, 1]  # the last of four, once


def by_index(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return m.f(x[order]).tanh()[order.argsort()]


def by_keyword(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    h = m.f(x.index_select(dim=0, index=order)).tanh()
    return h.index_select(dim=0, index=order.argsort())


def by_list(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort().tolist()
    return m.f(torch.stack([x[i] for i in order])).tanh()[[order.index(i) for i in range(len(x))]]


def by_writing(m: Any, x: Tensor) -> Tensor:
    rank, ordered = x[:, 0].argsort().argsort(), torch.zeros_like(x)
    ordered[rank] = x
    return m.f(ordered).tanh()[rank]


@pytest.mark.parametrize("sort", [by_index, by_keyword, by_list, by_writing])
@pytest.mark.filterwarnings(f"ignore:{DISAGREES}")
def test_samples_that_are_sorted_inside_the_model_keep_their_gradients(
    sort: Callable[[Any, Tensor], Tensor],
) -> None:
    adapter = Gaussian(Function(sort, f=nn.Linear(3, 2)).double())
    gradient_norms(adapter, X)  # in order already, so that the first comparison sees no sorting
    shuffled = X[[2, 0, 3, 1]]
    assert_norms(gradient_norms(adapter, shuffled), tensors(gradients(adapter, shuffled)))


def test_batch_statistics_are_refused() -> None:
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    adapter = Gaussian(nn.Sequential(nn.Conv1d(3, 3, 1), norm))
    with pytest.raises(ValueError, match=r"same alone and in a batch.*the model mixes samples"):
        gradient_norms(adapter, torch.randn(4, 3, 5))


class Cancelling(om.Adapter):
    """A large term, and a small one whose parts cancel: rounded otherwise in a batch."""

    def __init__(self, error: float) -> None:
        self.module, self._error = nn.Linear(3, 1), error

    def log_likelihood(self, batch: Any) -> Iterable[tuple[str, Tensor]]:
        output = self.module(batch).square().sum(1)
        yield "log_prob", -1000 - output
        yield "log_det", 0.2 + 0 * output + self._error * (len(batch) > 1)


def test_rounding_of_a_term_whose_parts_cancel_is_no_mixing() -> None:
    x = torch.rand(3, 3)
    gradient_norms(Cancelling(2e-4), x)
    for error, dtype in ((5e-3, torch.float32), (2e-4, torch.float64)):
        adapter = Cancelling(error)
        adapter.module.to(dtype)
        with pytest.raises(ValueError, match=r"'log_det' of a sample to be the same alone"):
            gradient_norms(adapter, x.to(dtype))


def nothing(m: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    return []


def likelihood(m: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    return [("log_likelihood", m(x).square().sum(1))]


def constant(m: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    return [("log_likelihood", x.square().sum(1))]


def noisy(m: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    return [("log_likelihood", m(x).sum(1) + torch.randn(len(x)))]


REFUSED: dict[str, tuple[om.Adapter, Any, dict[str, Any], str]] = {
    "a column": (
        Terms(lambda m, x: [("t", m(x))]),
        *(X, {}, r"term 't' of Terms to be of shape \(\d,\), one value a sample, got .*\(\d, 2\)"),
    ),
    "a sum": (
        Terms(lambda m, x: [("t", m(x).sum())]),
        X,
        {},
        r"to be of shape \(\d,\).*shape \(\)",
    ),
    "a number": (Terms(lambda m, x: [("t", 1.0)]), X, {}, r"to be of shape \(\d,\).*got float"),
    "no term": (Terms(nothing), X, {}, "Expected Terms to yield a term, got none"),
    "a term twice": (
        Terms(lambda m, x: [*likelihood(m, x), *likelihood(m, x)]),
        *(X, {}, "'log_likelihood'.*once"),
    ),
    "a term with a slash": (
        Terms(lambda m, x: [("t/1", m(x).sum(1))]),
        *(X, {}, "Expected.*name.*'t/1'"),
    ),
    "no samples": (Terms(likelihood), X[:0], {}, "a multiple of group=1 samples, got 0"),
    "no tensors": (Terms(likelihood), [], {}, r"Expected a batch of tensors.*\(B, \.\.\.\)"),
    "a scalar": (Terms(likelihood), X[0, 0], {}, r"Expected a batch of tensors of shape \(B"),
    "two batch sizes": (Terms(likelihood), (X, X[:2]), {}, "one batch size.*, got shapes"),
    "NaN": (
        Terms(likelihood),
        X.index_fill(0, torch.tensor(2), torch.nan),
        *(
            {},
            "Expected finite values, got NaN or infinity in 1 of 4 samples, the first at index 2",
        ),
    ),
    "infinity": (Terms(likelihood), (X, 1 / (X - X[0, 0])), {}, "infinity in 1 of 4 samples"),
    "half a group": (Terms(likelihood), X, {"group": 3}, "a multiple of group=3 samples, got 4"),
    "empty groups": (Terms(likelihood), X, {"group": 0}, "group of at least 1, got 0"),
    "empty chunks": (Terms(likelihood), X, {"chunk_size": 0}, "Expected chunk_size .*, got 0"),
    "chunks that split groups": (
        Terms(likelihood),
        *(X, {"group": 2, "chunk_size": 3}, "chunk_size to be a multiple of group=2, got 3"),
    ),
    "no parameters": (
        Terms(likelihood, nn.Identity()),
        *(X, {}, "with floating-point parameters, got Identity with 0 parameters"),
    ),
    "integer parameters": (
        Terms(likelihood, nn.ParameterList([nn.Parameter(torch.ones(2).long(), False)])),
        *(X, {}, "got ParameterList with 1 parameters, none of them floating-point"),
    ),
    "independent of parameters": (Terms(constant), X, {}, "to depend on the parameters of Linear"),
    "random": (Terms(noisy), X, {}, "draws random numbers that Terms does not fix"),
    "layers that are not there": (
        Terms(likelihood),
        *(X, {"layers": "up.*"}, r"layers='up\.\*' to match.*'weight' to 'bias'"),
    ),
}


@pytest.mark.parametrize("nan", [[0], [0, 1], [3], [0, 1, 2, 3]], ids=str)
def test_a_term_that_is_nan_is_of_its_sample_alone(nan: list[int]) -> None:
    def by_value(module: nn.Module, x: Tensor) -> Iterable[tuple[str, Tensor]]:
        values = module(x).sum(1)
        is_odd = torch.isin(x[:, 0], X[nan, 0])
        return [("t", values * torch.where(is_odd, torch.nan, 1.0))]

    found = om.gradient_norms(Terms(by_value), X)
    others = [i for i in range(4) if i not in nan]
    for name, values in om.gradient_norms(Terms(lambda m, x: [("t", m(x).sum(1))]), X).items():
        assert torch.allclose(found[name][others], values[others])
        assert found[name][nan].isnan().all()


@pytest.mark.parametrize(("adapter", "batch", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(adapter: om.Adapter, batch: Batch, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_norms(adapter, batch, **options)


# Batches, terms, adapters


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def summed(m: nn.Module, batch: Batch) -> list[tuple[str, Tensor]]:
    first, second = batch.values() if isinstance(batch, dict) else batch
    return likelihood(m, first + second)


@pytest.mark.parametrize(
    "batch", [(X, X), [X, X], {"x": X, "y": X}, Pair(X, X)], ids=["tuple", "list", "dict", "named"]
)
def test_a_batch_may_be_nested(batch: Batch) -> None:
    adapter = Terms(summed)
    assert_norms(
        gradient_norms(adapter, batch, chunk_size=2),
        gradient_norms(Terms(likelihood, adapter.module), 2 * X),
    )


def test_terms_of_one_forward_pass_equal_those_of_their_own() -> None:
    adapter, batch = model("glow")()
    norms = gradient_norms(adapter, batch)
    for term, _ in checked_terms(adapter, batch):
        alone = Terms(lambda m, x: [item for item in checked_terms(adapter, x) if item[0] == term])  # noqa: B023
        alone.module = adapter.module
        assert_norms(
            gradient_norms(alone, batch),
            {k: v for k, v in norms.items() if k.startswith(f"{term}/")},
        )


def test_an_adapter_may_compare_by_value() -> None:
    @dataclass
    class Mean(om.Adapter):
        module: nn.Module

        def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
            return likelihood(self.module, batch)

    adapter = Mean(nn.Linear(3, 2).double())
    assert_norms(gradient_norms(adapter, X), tensors(gradients(adapter, X)))


def test_a_graph_is_kept_as_long_as_a_term_needs_it() -> None:
    def terms(m: Any, x: Tensor) -> Iterable[tuple[str, Tensor]]:
        h = m.f(x).tanh()
        yield "apart", m.g(x).sum(1)
        yield "shared", m.g(h).sum(1)
        yield "also shared", h.square().sum(1)
        yield "own", m.f(x + 1).square().sum(1)

    net = Function(lambda m, x: x, f=nn.Linear(3, 3), g=nn.Linear(3, 2)).double()
    adapter = Terms(terms, net)
    first = gradient_norms(adapter, X)  # keeps all graphs, and learns which it need not
    assert _known[adapter].last_of_graph == {"also shared", "own"}
    for actual in (first, gradient_norms(adapter, X)):
        assert_norms(actual, tensors(gradients(adapter, X)))


class Mark:
    """Lives as long as the graph that it is hooked to."""

    def __call__(self, g: Tensor) -> None:
        pass


def test_no_graph_outlives_the_scoring_of_a_model_that_writes_in_place() -> None:
    marks: list[weakref.ref[Mark]] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.before(x)
        h += h + m.shift  # the graph of h now holds what took it
        mark = Mark()
        h.register_hook(mark)
        marks.append(weakref.ref(mark))
        return m.g(h)

    parts = {"before": nn.Linear(3, 3), "g": nn.Linear(3, 2), "shift": torch.ones(3)}
    adapter = Gaussian(Function(forward, **parts).double())
    for _ in range(2):
        assert_norms(gradient_norms(adapter, X), tensors(gradients(adapter, X)))
    assert not [mark for mark in marks if mark()]


def test_no_graph_is_alive_when_the_next_forward_pass_begins() -> None:
    marks.clear()

    def forward(m: Any, x: Tensor, t: Tensor) -> Tensor:
        assert not [mark for mark in marks if mark()]
        y, mark = m.net(x), Mark()
        y.register_hook(mark)
        marks.append(weakref.ref(mark))
        return y

    net = Function(forward, net=nn.Conv2d(3, 3, 3, padding=1))
    adapter = om.DenoisingBound(net, torch.linspace(0.9, 0.1, 10), levels=[1, 5, 9])
    gradient_norms(adapter, torch.randn(20, 3, 8, 8))
    # Samples together, one by one and all levels at once to compare them, then to score, and the
    # last sample alone.
    assert len(marks) == 3 + 2 * 3 + 1 + 3 + 3
