"""Models that regroup rows, or make them, and whose norms are had by passes of the whole batch.

Each is compared with plain autograd, one sample at a time, and none is left to the loop.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.model_case import Function
from support.reference import counted, gradients
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import ood_monitor as om
from ood_monitor.adapters.base import Batch, batch_size, map_tensors
from ood_monitor.gradients import gradient_norms
from ood_monitor.gradients.fast import Recorded, recorded_norms
from ood_monitor.modules import scored

B, T, D = 5, 7, 4


def fast(adapter: om.Adapter, batch: Batch, n: int | None = None) -> Recorded:
    """What the fast path gives, of n groups or of each sample."""
    count = n or batch_size(batch)
    return scored(
        lambda passes: recorded_norms(
            passes, batch, count, lambda name: True, lambda name: "tensor"
        ),
        adapter,
        adapter.module,
    )


def assert_exact(
    adapter: om.Adapter, batch: Batch, found: dict[str, Tensor], n: int, rtol: float = 1e-8
) -> None:
    largest = max(float(norms.detach().max()) for norms in found.values())
    for key, each in gradients(adapter, batch, batch_size(batch) // n).items():
        exact = each.square().reshape(n, -1).sum(1)
        torch.testing.assert_close(
            found[key],
            exact,
            rtol=rtol,
            atol=1e-20 * largest,
            msg=lambda m: f"{key}: {m}",  # noqa: B023
        )


def assert_fast_and_exact(adapter: om.Adapter, batch: Batch) -> Recorded:
    count = batch_size(batch)
    recorded = fast(adapter, batch)
    assert not recorded.left_over
    assert_exact(adapter, batch, recorded.norms, count)
    assert_exact(adapter, batch, gradient_norms(adapter, batch), count)
    first = map_tensors(lambda t: t[:4], batch)
    assert_exact(adapter, first, gradient_norms(adapter, first, group=2), 2)
    return recorded


def of(forward: Callable[..., Tensor], **parts: Any) -> om.Adapter:
    torch.manual_seed(0)
    net = Function(forward, **parts).double()
    return om.LogLikelihood(net, lambda m, x: -0.5 * (m(x) - 1).square().flatten(1).sum(1))


def linear(a: int = D, b: int = D) -> nn.Linear:
    return nn.Linear(a, b)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Rows that are regrouped


def by_a_mask(m: Any, x: Tensor) -> Tensor:
    """As a spline's: what is inside its interval goes through it."""
    h = m.f(x).tanh()
    inside, out = x.abs() < 1, x.clone()
    out[inside] = (m.inner(h[inside][:, None]).tanh() * m.gain)[:, 0]
    return m.out(out)


def through_experts(m: Any, x: Tensor) -> Tensor:
    """Each token goes to the two experts that its router names, weighted by it."""
    tokens = m.f(x).flatten(0, 1)
    weights, chosen = m.router(tokens).softmax(-1).topk(2)
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(m.experts):
        place, rank = torch.where(chosen == number)
        values = expert(tokens[place]).tanh() * weights[place, rank, None]
        out = out.index_add(0, place, values)
    return m.out(out.view_as(x))


def without_tokens(m: Any, x: Tensor) -> Tensor:
    """Parameters are used in five ways on rows of which there may be none."""
    rows, out = x[..., 0] > 1.5, torch.zeros_like(x)
    h = m.norm(m.inner(x[rows]).tanh() * m.gain + m.gain.expand(int(rows.sum()), D).sin())
    out[rows] = h + m.table((h[:, 0] > 0).long())
    return m.out(m.f(x).tanh() + out)


def time_first(m: Any, x: Tensor) -> Tensor:
    """A transformer's layer on (T, B, D)."""
    h = m.norm(m.f(x.transpose(0, 1))) + m.position
    h = h + m.attention(h, h, h)[0]
    return (m.out(h.tanh()) * m.gain).transpose(0, 1)


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = (x[:, 0].abs() * 3).long().amax(1).clamp(max=T - 1) + 1
    rows = pack_padded_sequence(m.f(x), lengths, batch_first=True, enforce_sorted=False)
    values = m.norm(m.inner(rows.data[:, :1]).tanh() * rows.data)
    padded, _ = pad_packed_sequence(rows._replace(data=values), batch_first=True, total_length=T)
    return m.out(padded)


def on_a_graph(m: Any, x: Tensor) -> Tensor:
    """Messages along edges, of which samples have different numbers."""
    nodes = m.f(x).flatten(0, 1)
    near = (x[:, :, None] - x[:, None]).square().sum(3) < 4
    sample, source, target = near.nonzero(as_tuple=True)
    pairs = torch.cat([nodes[sample * T + source], nodes[sample * T + target]], 1)
    messages = m.message(pairs).tanh()
    return m.out(torch.zeros_like(nodes).index_add(0, sample * T + target, messages)).view_as(x)


def images_of_frames(m: Any, x: Tensor) -> Tensor:
    """Frames of videos sorted by their content, and put back."""
    frames = x.reshape(-1, 1, 2, 2)
    order = frames.flatten(1)[:, 0].argsort()
    h = m.norm(m.conv(frames[order]))[order.argsort()]
    return m.out(h.flatten(1)).view(*x.shape[:2], -1)


def sorted_samples(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    tokens = m.table((x[order][..., 0] > 0).long())
    return m.out(m.norm(tokens + m.f(x[order])))[order.argsort()]


def derived_weights(m: Any, x: Tensor) -> Tensor:
    rows = x[x[..., 0] > 0]
    h = F.linear(rows, m.a @ m.b, m.shift.exp()).tanh() @ m.a.sin()
    out = torch.zeros_like(x)
    out[x[..., 0] > 0] = h.matmul(m.b)
    return m.out(out)


def used_in_and_out_of_order(m: Any, x: Tensor) -> Tensor:
    rows = x[..., 0] > 0
    h = m.f(x).tanh()
    out = h.clone()
    out[rows] = m.f(h[rows]).tanh()
    return m.f(out)


def features_last(m: Any, x: Tensor) -> Tensor:
    h = m.f(x.transpose(0, 1)).tanh()
    scaled = m.norm(h) * m.scale + m.shift
    return m.out(scaled).transpose(0, 1)


def checkpointed(m: Any, x: Tensor) -> Tensor:
    rows = x[..., 0] > 0
    out = torch.zeros_like(x)
    out[rows] = checkpoint(lambda r: m.f(r).tanh().sin(), x[rows], use_reentrant=False)
    return m.out(out)


REGROUPED: dict[str, Callable[[], om.Adapter]] = {
    "a spline's mask": lambda: of(
        by_a_mask, f=linear(), inner=linear(1, 3), gain=torch.randn(3), out=linear()
    ),
    "experts": lambda: of(
        through_experts,
        f=linear(),
        router=linear(D, 3),
        experts=nn.ModuleList(linear() for _ in range(3)),
        out=linear(),
    ),
    "an expert without a token": lambda: of(
        without_tokens,
        **{"f": linear(), "inner": linear(), "norm": nn.LayerNorm(D), "gain": torch.randn(D)},
        table=nn.Embedding(2, D),
        out=linear(),
    ),
    "packed": lambda: of(
        packed, f=linear(), inner=linear(1, D), norm=nn.LayerNorm(D), out=linear()
    ),
    "a graph": lambda: of(on_a_graph, f=linear(), message=linear(2 * D), out=linear()),
    "sorted frames": lambda: of(
        images_of_frames,
        conv=nn.Conv2d(1, 4, 2, padding=1),
        norm=nn.GroupNorm(2, 4),
        out=linear(36, 3),
    ),
    "sorted samples": lambda: of(
        sorted_samples, f=linear(), table=nn.Embedding(2, D), norm=nn.RMSNorm(D), out=linear()
    ),
    "derived weights": lambda: of(
        derived_weights,
        **{"a": torch.randn(3, 2), "b": torch.randn(2, D), "shift": torch.randn(3)},
        out=linear(),
    ),
    "in and out of order": lambda: of(used_in_and_out_of_order, f=linear()),
}

#: Whose order is known, along another dimension than the first.
TIME_FIRST: dict[str, Callable[[], om.Adapter]] = {
    "a transformer": lambda: of(
        time_first,
        f=linear(),
        norm=nn.LayerNorm(D),
        attention=nn.MultiheadAttention(D, 2),
        position=torch.randn(T, 1, D),
        gain=torch.randn(D),
        out=linear(),
    ),
    "scales": lambda: of(
        features_last,
        f=linear(),
        norm=nn.RMSNorm(D),
        scale=torch.randn(T, 1, 1),
        shift=torch.randn(1, 1, D),
        out=linear(),
    ),
}


@pytest.mark.parametrize("make", REGROUPED.values(), ids=REGROUPED)
def test_regrouped_rows_need_no_loop(make: Callable[[], om.Adapter]) -> None:
    adapter = make()
    for x in (draw(B, T, D), draw(B, T, D).flip(0)):
        assert assert_fast_and_exact(adapter, x).found_owners


def test_rows_of_which_there_are_none_have_no_gradient() -> None:
    adapter = REGROUPED["an expert without a token"]()
    for x in (draw(B, T, D), draw(B, T, D).clamp(max=1)):
        found = gradient_norms(adapter, x)
        assert_exact(adapter, x, found, B)
    assert not found["log_likelihood/inner.weight"].any()
    assert not found["log_likelihood/table.weight"].any()


@pytest.mark.parametrize("make", TIME_FIRST.values(), ids=TIME_FIRST)
def test_rows_in_order_along_another_dimension_need_one_pass(
    make: Callable[[], om.Adapter],
) -> None:
    assert not assert_fast_and_exact(make(), draw(B, T, D)).found_owners


@pytest.mark.parametrize("says_its_hooks", [True, False])
def test_what_is_regrouped_under_gradient_checkpointing_is_exact(
    says_its_hooks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.6 does not say which hooks are set."""
    if not says_its_hooks:
        name = "_top_saved_tensors_default_hooks"
        monkeypatch.delattr(torch._C._autograd, name, raising=False)
    adapter = of(checkpointed, f=linear(), out=linear())
    x = draw(B, T, D)
    assert_exact(adapter, x, gradient_norms(adapter, x), B)


@pytest.mark.parametrize("make", REGROUPED.values(), ids=REGROUPED)
def test_regrouped_rows_in_single_precision(make: Callable[[], om.Adapter]) -> None:
    exact, adapter = make(), make()
    adapter.module.float()
    x = draw(B, T, D).float()
    found = {key: norms.double() for key, norms in gradient_norms(adapter, x).items()}
    exact.module.load_state_dict(adapter.module.state_dict())
    assert_exact(exact, x.double(), found, B, rtol=1e-3)


class Terms(om.Adapter):
    """Two terms of one forward pass, and one of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        parts = {"f": linear(), "inner": linear(1, 3), "gain": torch.randn(3), "out": linear()}
        self.module = Function(by_a_mask, **parts).double()

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        output = self.module(batch)
        yield "first", -output.square().flatten(1).sum(1)
        yield "second", output.tanh().flatten(1).sum(1)
        del output
        yield "own", self.module(2 * batch).flatten(1).logsumexp(1)


def test_terms_that_share_a_graph() -> None:
    for _ in range(2):
        assert assert_fast_and_exact(Terms(), draw(B, T, D)).found_owners


def test_further_backward_passes_take_no_further_forward_pass() -> None:
    """So that whatever a model draws is the same in all of them."""
    adapter, x = REGROUPED["a spline's mask"](), draw(B, T, D)
    gradient_norms(adapter, x)
    with counted(adapter.module) as seen:
        found = gradient_norms(adapter, x, report=True)
    assert {way.name for way in found.ways.values()} >= {"rows"}
    assert len(seen) == 1


class Counted(torch.autograd.Function):
    """The identity; counts the numbers of its backward passes."""

    numbers = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Counted.numbers += g.numel()
        return g


def test_owners_are_found_twice_on_the_first_use_of_a_shape() -> None:
    adapter = REGROUPED["a spline's mask"]()
    counting = om.LogLikelihood(
        adapter.module, lambda m, x: -Counted.apply(m(x)).square().flatten(1).sum(1)
    )
    for size, passes in ((B, 3), (B, 2), (B - 1, 3), (B - 1, 2)):
        Counted.numbers = 0
        assert fast(counting, draw(size, T, D)).found_owners
        assert Counted.numbers == passes * size * T * D


# Parameters that are written


def composed_in_place(m: Any, x: Tensor) -> Tensor:
    """As a flow's LU-composed map."""
    lower = x.new_zeros(D, D)
    lower[torch.tril_indices(D, D, -1).unbind()] = m.entries
    lower[range(D), range(D)] = 1.0
    return m.out(F.linear(m.f(x).tanh(), lower))


def changed_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.f(x).tanh() * 1
    h += m.entries[:D]
    h *= m.entries[1 : D + 1].exp()
    h.sub_(m.gain).div_(m.gain)
    return m.out(h.sin())


def first_changed_in_place(m: Any, x: Tensor) -> Tensor:
    """Before anything else has met a parameter."""
    h = x.clone()
    h.mul_(m.gain)
    h.add_(m.entries[:D], alpha=2)
    return m.out(m.f(h).tanh())


def set_in_place(m: Any, x: Tensor) -> Tensor:
    h, later = m.f(x).tanh() * 1, x[..., 0] > 0
    h[:, 0] = m.gain
    h[later] = h[later] * 2
    h[..., 1] = m.entries[0]
    h[later, 2] = m.entries[1]
    return m.out(h.sin())


def chosen(m: Any, x: Tensor) -> Tensor:
    h = m.f(x).tanh()
    h = torch.where(h > m.gain, h, m.entries[:D])
    return m.out(torch.maximum(h, m.gain) ** m.entries[0].exp().clamp(1, 2).round())


WRITTEN: dict[str, Callable[..., Tensor]] = {
    "a weight": composed_in_place,
    "data": changed_in_place,
    "data of the batch": first_changed_in_place,
    "rows": set_in_place,
    "by a comparison": chosen,
}


@pytest.mark.parametrize("forward", WRITTEN.values(), ids=WRITTEN)
def test_parameters_that_are_written_need_no_loop(forward: Callable[..., Tensor]) -> None:
    adapter = of(forward, f=linear(), gain=torch.rand(D) - 0.5, entries=draw(6), out=linear())
    assert_fast_and_exact(adapter, draw(B, T, D))


def test_a_weight_written_over_after_its_use_goes_to_the_loop() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.gain.diag()
        h = F.linear(x, weight).tanh()
        weight *= m.entries[:D]
        return m.out(F.linear(h, weight))

    adapter = of(forward, gain=draw(D), entries=draw(6), out=linear())
    assert_exact(adapter, draw(B, T, D), gradient_norms(adapter, draw(B, T, D)), B)
    assert "gain" in fast(adapter, draw(B, T, D)).left_over


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_recurrent_layer_with_projections_goes_to_the_loop() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.layer(x)[0])

    layer = nn.LSTM(D, 6, 2, batch_first=True, bidirectional=True, proj_size=2)
    adapter, x = of(forward, layer=layer, out=linear()), draw(B, T, D)
    assert all(name.startswith("layer.") for name in fast(adapter, x).left_over)
    assert_exact(adapter, x, gradient_norms(adapter, x), B)


# Rows of several samples


def shared_row(m: Any, x: Tensor) -> Tensor:
    """A row that every sample needs, which is of no sample's values."""
    first = m.f(0 * x[:1, 0]).tanh()
    return m.out(x + first)


def test_a_row_of_all_samples_goes_to_the_loop() -> None:
    adapter, x = of(shared_row, f=linear(), out=linear()), draw(B, T, D)
    assert fast(adapter, x).left_over.keys() == {"f.weight", "f.bias"}
    assert_exact(adapter, x, gradient_norms(adapter, x), B)


def test_a_row_that_only_larger_batches_share_goes_to_the_loop() -> None:
    """The comparison on first use, of two samples, shows nothing of it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        zero = 0 * (x[:1, 0] if len(x) > 3 else x[:, 0])
        return m.out(x + m.f(zero).tanh()[:, None])

    adapter, x = of(forward, f=linear(), out=linear()), draw(B, T, D)
    gradient_norms(adapter, x[:2])
    for batch in (x, x[:2], x):
        assert_exact(adapter, batch, gradient_norms(adapter, batch), len(batch))
    assert fast(adapter, x).left_over.keys() == {"f.weight", "f.bias"}


def test_a_sample_without_a_finite_gradient_leaves_others_exact() -> None:
    adapter, x = REGROUPED["a spline's mask"](), draw(B, T, D)
    gradient_norms(adapter, x)
    bad = x.clone()
    bad[2] = 1e200
    found = gradient_norms(adapter, bad)
    others = torch.tensor([0, 1, 3, 4])
    kept = {key: norms[others] for key, norms in found.items()}
    assert_exact(adapter, bad[others], kept, 4)


# Rows that are made


def start_state(m: Any, x: Tensor) -> Tensor:
    h = m.start.expand(len(x), -1, -1)
    return m.out(m.f(h).tanh() + x)


def repeated_start(m: Any, x: Tensor) -> Tensor:
    return m.out(m.f(m.start.repeat(len(x), 1, 1)).tanh() + x)


def first_token(m: Any, x: Tensor) -> Tensor:
    token = m.start[:, :1].expand(len(x), 1, -1)
    return m.out(m.f(torch.cat([token, x], 1)).tanh()[:, :-1] + x)


def hidden_state(m: Any, x: Tensor) -> Tensor:
    """(layers, B, D), as recurrent networks have them."""
    h = m.start[0, :2, None].expand(-1, len(x), -1)
    h = m.f(h).tanh()
    return m.out(x + h[0][:, None] * h[1][:, None])


def derived_start(m: Any, x: Tensor) -> Tensor:
    h = (m.f(m.start).tanh()).broadcast_to(x.shape)
    return m.out(h.sin() + x)


def times(m: Any, x: Tensor) -> Tensor:
    t = torch.full((len(x), 1), 0.3, dtype=x.dtype)
    return m.out(x + m.f(t * torch.ones(D, dtype=x.dtype)).tanh()[:, None])


def labels(m: Any, x: Tensor) -> Tensor:
    classes = torch.ones(len(x), dtype=torch.int64)
    return m.out(x + m.f(m.table(classes)).tanh()[:, None])


def drawn(m: Any, x: Tensor) -> Tensor:
    noise = torch.linspace(-1, 1, D).to(x).expand(len(x), D).contiguous()
    return m.out(x + (noise * m.gain + m.start[0, 0]).tanh()[:, None])


def made(forward: Callable[..., Tensor], **parts: Any) -> Callable[[], om.Adapter]:
    def make() -> om.Adapter:
        return of(forward, f=linear(), start=draw(1, T, D), out=linear(), **parts)

    return make


def a_spline_that_is_shared(m: Any, x: Tensor) -> Tensor:
    """Knots of parameters for each sample, of which a mask takes some."""
    knots = m.start[None].expand(len(x), 1, T, D).squeeze(1)
    inside, out = x > 0, x.clone()
    out[inside] = (knots[inside] * x[inside]).tanh() * m.gain[0]
    return m.out(m.f(out))


MADE: dict[str, Callable[[], om.Adapter]] = {
    "a start state": made(start_state),
    "a start state, repeated": made(repeated_start),
    "a first token": made(first_token),
    "a hidden state": made(hidden_state),
    "a start state of a layer": made(derived_start),
    "times": made(times),
    "labels": made(labels, table=nn.Embedding(3, D)),
    "a shared spline": made(a_spline_that_is_shared, gain=torch.randn(1)),
    "scaled constants": made(drawn, gain=torch.randn(D)),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("size", [B, T, D], ids="{} samples".format)  # some by chance of a size
def test_rows_that_are_made_are_the_samples(make: Callable[[], om.Adapter], size: int) -> None:
    assert_fast_and_exact(make(), draw(size, T, D))


def test_the_price_of_a_start_state_is_linear_in_the_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(Counted.apply(m.f(m.start.expand(len(x), -1, -1)).tanh()) + x)

    adapter = of(forward, f=linear(), start=draw(1, T, D), out=linear())
    gradient_norms(adapter, draw(B, T, D))
    for size in (8, 32):
        Counted.numbers = 0
        gradient_norms(adapter, draw(size, T, D))
        assert Counted.numbers == size * T * D


def of_a_size_by_chance(m: Any, x: Tensor) -> Tensor:
    """Rows of positions and of features, that may be as many as the samples."""
    where = torch.linspace(-1, 1, T, dtype=x.dtype)[:, None].expand(T, D)
    scale = m.gain[:, None].expand(D, D).sum(1)
    return m.out((x + m.f(where).tanh()) * scale + m.f(m.start[:, :1].expand(-1, T, -1)).sin())


@pytest.mark.parametrize("size", [2, 3, D, B, T])
def test_rows_that_are_as_many_by_chance_keep_their_gradients(size: int) -> None:
    adapter = made(of_a_size_by_chance, gain=torch.randn(D))()
    for x in (draw(size, T, D), draw(B, T, D), draw(size, T, D)):
        assert_exact(adapter, x, gradient_norms(adapter, x), len(x))
        assert not fast(adapter, x).left_over
