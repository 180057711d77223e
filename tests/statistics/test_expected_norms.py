"""Sums of squares of layers' inputs, against a float64 loop over samples with plain hooks."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import MODELS, through_experts
from support.model_case import Case, Function, Gaussian
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import ood_monitor as om
from benchmarks.detection.pixelcnn import MaskedConv2d
from ood_monitor.adapters.base import batch_size, map_tensors, pieces
from ood_monitor.statistics import expected_layers, forward_statistics, rows

GROUPS = 32


def add(sums: Tensor, axis: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    """The squares of a call's input to its groups' sums."""
    h, *_ = [*args, *kwargs.values()]
    channels = h.detach().double().movedim(axis, -1)
    for c in range(channels.shape[-1]):
        sums[c % GROUPS] += channels[..., c].square().sum()


def reference(adapter: om.Adapter, batch: Any, axes: dict[str, int]) -> dict[str, Tensor]:
    """By layer (B, G), one sample at a time, in float64; channels are in `axes` of the inputs."""
    found: dict[str, list[Tensor]] = {}
    for sample in pieces(batch, 1):
        sums = {name: torch.zeros(GROUPS, dtype=torch.float64) for name in axes}
        handles = []
        for name, axis in axes.items():
            take = partial(add, sums[name], axis)
            part = adapter.module.get_submodule(name)
            handles.append(part.register_forward_pre_hook(take, with_kwargs=True))
        with torch.no_grad():
            list(adapter.log_likelihood(map_tensors(torch.clone, sample)))
        for handle in handles:
            handle.remove()
        for name in axes:
            found.setdefault(name, []).append(sums[name])
    return {name: torch.stack(rows) for name, rows in found.items()}


def assert_exact(adapter: om.Adapter, batch: Any, axes: dict[str, int], rtol: float = 1e-5) -> None:
    expected = reference(adapter, batch, axes)
    layers = expected_layers(adapter, batch)
    assert layers.keys() == axes.keys()
    norms = forward_statistics(adapter, batch, sample=None, layers=layers).expected_norms
    for name, groups in layers.items():
        want = expected[name]
        assert norms[name].shape == (batch_size(batch), groups)
        assert not want[:, groups:].any()
        got = norms[name].double()
        torch.testing.assert_close(got, want[:, :groups], rtol=rtol, atol=1e-12, msg=name)


def net(*layers: nn.Module) -> om.Adapter:
    return Gaussian(nn.Sequential(*layers).eval())


@dataclass(frozen=True)
class Kind:
    """A network, its batch, where each layer's channels are, and if samples are taken alone."""

    name: str
    make: Callable[[], Case]
    axes: dict[str, int]
    alone: bool = False


def of(make: Callable[[], nn.Module], *shape: int, axis: int) -> Kind:
    """A layer after a pointwise one, so that its input is no sample itself."""
    label = f"{type(make()).__name__}-{len(shape)}d"
    return Kind(label, lambda: (net(nn.Tanh(), make()), torch.randn(5, *shape)), {"1": axis})


class Made(nn.Linear):
    """A linear layer whose weight is masked."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * torch.ones_like(self.weight).tril(), self.bias)


def lstm_like(m: Any, x: Tensor) -> Tensor:
    """Time first, as recurrent networks have it."""
    return m.out(m.f(x.transpose(0, 1)).tanh()).transpose(0, 1)


def regrouped(m: Any, x: Tensor) -> Tensor:
    """A batch in the order of its samples' sizes, and back again."""
    order = x.flatten(1).norm(dim=1).argsort()
    return m.f(x[order])[order.argsort()]


def doubled(m: Any, x: Tensor) -> Tensor:
    """Two halves of a batch, as classifier-free guidance has them: a sample's rows lie apart."""
    return sum(m.f(torch.cat([x, -2 * x[:, :1] * x])).chunk(2))  # type: ignore[return-value]


def with_positions(m: Any, x: Tensor) -> Tensor:
    """An embedding of positions that all samples share."""
    places = torch.linspace(0, 1, 3 * x.shape[1]).view(1, x.shape[1], 3)
    return m.f(x) + m.shift(places)


def by(forward: Callable[..., Tensor], *shape: int, **parts: Any) -> Callable[[], Case]:
    return lambda: (Gaussian(Function(forward, **parts).eval()), torch.randn(*shape))


def flat(m: Any, x: Tensor) -> Tensor:
    return m.f(x.flatten(0, 1)).view_as(x)  # type: ignore[no-any-return]


F33 = partial(nn.Linear, 3, 3)
EXPERTS, SHIFTED = {"one": -1, "two": -1}, {"f": -1, "shift": -1}
KINDS = [
    of(lambda: nn.Conv1d(4, 6, 3, padding=1), 4, 9, axis=1),
    of(lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), 4, 9, 8, axis=1),
    of(lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), 4, 6, 6, axis=1),
    of(lambda: nn.Conv2d(4, 4, 3, groups=4), 4, 6, 6, axis=1),
    of(lambda: nn.Conv2d(70, 4, 1), 70, 3, 3, axis=1),
    of(lambda: nn.Conv3d(4, 2, 2), 4, 3, 3, 3, axis=1),
    of(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), 4, 9, axis=1),
    of(lambda: nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2), 4, 5, 5, axis=1),
    of(lambda: nn.ConvTranspose3d(4, 2, 2), 4, 3, 3, 3, axis=1),
    of(lambda: nn.Linear(7, 3), 7, axis=-1),
    of(lambda: nn.Linear(7, 3), 4, 7, axis=-1),
    of(lambda: nn.Linear(40, 3), 2, 3, 40, axis=-1),
    of(lambda: Conv1D(3, 7), 4, 7, axis=-1),
    of(lambda: Made(7, 7), 7, axis=-1),
    of(lambda: MaskedConv2d(4, 4, 3, sees_itself=True), 4, 5, 5, axis=1),
    of(lambda: parametrizations.weight_norm(nn.Linear(7, 3)), 7, axis=-1),
    of(lambda: parametrizations.orthogonal(nn.Linear(4, 4)), 4, axis=-1),
    Kind("twice", by(lambda m, x: m.f(m.f(x).tanh()), 5, 3, f=F33()), {"f": -1}),
    Kind("by-keyword", by(lambda m, x: m.f(input=x), 5, 3, f=F33()), {"f": -1}),
    Kind("rows-together", by(flat, 5, 4, 3, f=F33()), {"f": -1}),
    Kind("time-first", by(lstm_like, 4, 6, 3, f=F33(), out=F33()), {"f": -1, "out": -1}, True),
    Kind("time-is-B", by(lstm_like, 5, 5, 3, f=F33(), out=F33()), {"f": -1, "out": -1}, True),
    Kind("regrouped", by(regrouped, 5, 4, 3, f=F33()), {"f": -1}, True),
    Kind("halves", by(doubled, 5, 3, f=F33()), {"f": -1}, True),
    Kind("experts", by(through_experts, 5, 4, 3, one=F33(), two=F33()), EXPERTS, True),
    Kind("shared", by(with_positions, 5, 4, 3, f=F33(), shift=F33()), SHIFTED),
    Kind("shared-as-many", by(with_positions, 5, 5, 3, f=F33(), shift=F33()), SHIFTED),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("samples", [5, 1])
def test_sums_are_those_of_each_sample_alone(kind: Kind, samples: int) -> None:
    torch.manual_seed(0)
    adapter, batch = kind.make()
    batch = batch[:samples]
    assert_exact(adapter, batch, kind.axes)
    layouts = rows._known[adapter].settled.values() if samples > 1 else ()
    assert any(layout.alone for layout in layouts) == (kind.alone and samples > 1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_layout_holds_for_other_batches(kind: Kind) -> None:
    torch.manual_seed(0)
    adapter, batch = kind.make()
    assert_exact(adapter, batch, kind.axes)
    assert_exact(adapter, batch[1:4] + 1, kind.axes)
    assert_exact(adapter, batch.flip(0) - 1, kind.axes)


WITHOUT_LAYERS = {"tied", "matmul-weight-first", "vmap", "score-of-an-energy"}
FOREIGN = [model for model in MODELS if model.name not in WITHOUT_LAYERS]


@pytest.mark.parametrize("model", FOREIGN, ids=lambda model: model.name)
def test_every_model_has_in_a_batch_what_it_has_alone(model: Any) -> None:
    adapter, batch = model()
    layers = expected_layers(adapter, batch)
    together = forward_statistics(adapter, batch, sample=None, layers=layers)
    apart = [forward_statistics(adapter, b, sample=None, layers=layers) for b in pieces(batch, 1)]
    for name, groups in layers.items():
        assert together.expected_norms[name].shape == (batch_size(batch), groups)
        alone = torch.cat([one.expected_norms[name] for one in apart])
        torch.testing.assert_close(together.expected_norms[name], alone, msg=name)
    for term, values in together.log_likelihood.items():
        torch.testing.assert_close(values, torch.cat([a.log_likelihood[term] for a in apart]))


@pytest.mark.parametrize("first", [True, False])
def test_a_recurrent_layer_is_one_whether_time_comes_first_or_not(first: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.lstm(x if first else x.transpose(0, 1))
        return m.out(h if first else h.transpose(0, 1))

    torch.manual_seed(0)
    parts = {"lstm": nn.LSTM(3, 4, batch_first=first), "out": nn.Linear(4, 2)}
    adapter = Gaussian(Function(forward, **parts).eval())
    assert_exact(adapter, torch.randn(5, 6, 3), {"lstm": -1, "out": -1})


class Padded(om.Adapter):
    """Says which positions of a sequence count."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def log_likelihood(self, batch: Any) -> Any:
        x, counted = batch
        yield "log_likelihood", (self.module(x).square().sum(-1) * counted).sum(1)

    def positions(self, batch: Any) -> Tensor:
        counted: Tensor = batch[1]
        return counted


def padded(time: int) -> tuple[Tensor, Tensor]:
    counted = torch.arange(time) < torch.tensor([[time], [1], [time - 2], [3], [4]])
    x = torch.randn(5, time, 3)
    return torch.where(counted.unsqueeze(-1), x, torch.nan if time == 7 else 5.0), counted


@pytest.mark.parametrize("time", [5, 7, 30])
@pytest.mark.parametrize("is_flat", [False, True])
def test_positions_of_padding_are_left_out(time: int, is_flat: bool) -> None:
    torch.manual_seed(0)
    module = Function(flat if is_flat else lambda m, x: m.f(x), f=F33()).eval()
    x, counted = padded(time)
    clean = torch.where(counted.unsqueeze(-1), x, 0)
    found = forward_statistics(Padded(module), (x, counted), sample="sequence").expected_norms
    torch.testing.assert_close(found["f"], clean.square().sum(1))


def test_a_sequence_whose_time_comes_first_and_is_b_is_taken_alone() -> None:
    torch.manual_seed(0)
    x, counted = padded(5)
    clean = torch.where(counted.unsqueeze(-1), x, 0)
    adapter = Padded(Function(lstm_like, f=F33(), out=F33()).eval())
    found = forward_statistics(adapter, (x, counted), sample="sequence").expected_norms
    torch.testing.assert_close(found["f"], clean.square().sum(1))
    (layout,) = rows._known[adapter].settled.values()
    assert layout.alone


def test_layers_without_positions_are_left_out_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.f(x) + m.pooled(x.mean(1)).unsqueeze(1) + m.conv(x.mT).mT

    adapter = Padded(Function(forward, f=F33(), pooled=F33(), conv=nn.Conv1d(3, 3, 1)).eval())
    x, counted = padded(30)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert expected_layers(adapter, (x, counted)) == {"f": 3}
    (record,) = caplog.records
    assert "['conv', 'pooled']" in record.getMessage()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("compiled", ["module", "wrapper", "part"])
def test_compiled_modules_are_taken_like_others(compiled: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    x, other = torch.randn(5, 3, 7, 7), copy.deepcopy(plain)
    if compiled == "wrapper":
        other = torch.compile(other, backend="eager")  # type: ignore[assignment]
    else:
        part = other if compiled == "module" else other[2]
        part.compile(backend="eager")
    other(x)
    expected = forward_statistics(Gaussian(plain), x, sample=None).expected_norms
    found = forward_statistics(Gaussian(other), x, sample=None).expected_norms
    assert len(found) == 2
    for a, b in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(a, b)


INT8 = [kind for kind in torch.backends.quantized.supported_engines if kind != "none"]


@pytest.mark.skipif(not INT8, reason="PyTorch is built without int8")
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_an_int8_model_is_measured_sample_by_sample() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 40), nn.SiLU(), nn.Linear(40, 3)).eval()
    adapter = Gaussian(torch.ao.quantization.quantize_dynamic(mlp, {nn.Linear}, torch.qint8))
    x = torch.randn(5, 6) * torch.logspace(0, 2, 5)[:, None]  # scales are those of a whole batch
    assert expected_layers(adapter, x) == {"0": 6, "2": 32}
    assert_exact(adapter, x, {"0": -1, "2": -1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    adapter = net(nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Conv2d(40, 1, 3)).module.to(dtype)
    x = (300 * torch.rand(4, 2, 9, 9)).to(dtype)  # the squares of float16 overflow
    found = forward_statistics(Gaussian(adapter), x, sample=None).expected_norms
    assert all(values.dtype == torch.float32 for values in found.values())
    torch.testing.assert_close(found["0"], x.float().square().sum((2, 3)))


def test_double_precision_is_kept() -> None:
    adapter = net(nn.Linear(3, 3), nn.Linear(3, 3))
    adapter.module.double()
    assert_exact(adapter, torch.randn(5, 3).double(), {"0": -1, "1": -1}, rtol=1e-13)


def one_or_two(m: Any, x: Tensor) -> Tensor:
    return m.one(x) if x[0, 0] > 0 else m.two(x)  # type: ignore[no-any-return]


def switched() -> om.Adapter:
    return Gaussian(Function(one_or_two, one=F33(), two=F33()).eval())


def test_a_layer_that_is_not_called_has_zeros() -> None:
    x, adapter = 1 + torch.rand(5, 3), switched()
    layers = expected_layers(adapter, x) | expected_layers(adapter, -x)
    assert layers == {"one": 3, "two": 3}
    found = forward_statistics(adapter, x, sample=None, layers=list(layers)).expected_norms
    torch.testing.assert_close(found["one"], x.square())
    assert torch.equal(found["two"], torch.zeros(5, 3))


def test_a_layer_that_no_pass_has_called_needs_its_width_told() -> None:
    x, adapter, layers = 1 + torch.rand(5, 3), switched(), {"one": 3, "two": 3}
    with pytest.raises(ValueError, match="Expected a call of layer 'two'"):
        forward_statistics(adapter, x, sample=None, layers=list(layers))
    told = forward_statistics(adapter, x, sample=None, layers=layers).expected_norms
    assert torch.equal(told["two"], torch.zeros(5, 3))


def test_a_layer_is_found_when_it_is_called_at_last() -> None:
    x, adapter, layers = 1 + torch.rand(5, 3), switched(), {"one": 3, "two": 3}
    both = torch.cat([x, -x])  # in one score, of which the first piece alone is looked at
    found = forward_statistics(adapter, both, sample=None, layers=layers, chunk_size=5)
    zeros = torch.zeros(5, 3)
    torch.testing.assert_close(found.expected_norms["one"], torch.cat([x.square(), zeros]))
    torch.testing.assert_close(found.expected_norms["two"], torch.cat([zeros, x.square()]))


def test_a_model_whose_layers_are_not_called_is_refused_by_name() -> None:
    net = Function(lambda m, x: F.linear(x, m.f.weight), f=F33())
    with pytest.raises(ValueError, match=r"Gaussian to call modules of Function that .* none of"):
        expected_layers(Gaussian(net), torch.randn(4, 3))
    apart = Gaussian(net, lambda m, x: F.linear(x, m.f.weight))
    with pytest.raises(ValueError, match=r"no call of any\. Call layers as modules"):
        forward_statistics(apart, torch.randn(4, 3), sample=None)


@pytest.mark.parametrize("names", [["0", "5"], {"nowhere": 3}])
def test_layers_that_are_no_modules_are_refused(names: Any) -> None:
    adapter = net(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Expected `layers` to be names of modules of Sequential"):
        forward_statistics(adapter, torch.randn(4, 3), sample=None, layers=names)


def test_samples_that_say_nothing_are_no_verdict() -> None:
    torch.manual_seed(0)
    adapter = Gaussian(Function(lstm_like, f=F33(), out=F33()).eval())
    forward_statistics(adapter, torch.zeros(5, 5, 3), sample=None)
    assert not rows._known[adapter].settled
    assert_exact(adapter, torch.randn(5, 5, 3), {"f": -1, "out": -1})


def test_a_layout_that_stays_open_is_compared_ever_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[int] = []
    original = rows._compared

    def counted(*args: Any) -> Any:
        compared.append(len(uses))
        return original(*args)

    monkeypatch.setattr(rows, "_compared", counted)
    adapter, uses = net(nn.Linear(3, 3)), list[int]()
    for i in range(1, 20):
        uses.append(i)
        forward_statistics(adapter, torch.zeros(4, 3), sample=None)
    assert compared == [1, 2, 4, 8, 16]
