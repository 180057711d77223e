"""Models that pick, put and regroup rows as the data say: norms stay those of single samples.

Each is scored first on a batch that shows nothing of it: of equal lengths, in order.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.model_case import Function
from support.reference import looped
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import ood_monitor as om
from ood_monitor.adapters.base import map_tensors
from ood_monitor.gradients import gradient_norms
from ood_monitor.gradients.call import in_order, numbers
from ood_monitor.gradients.fast import recorded_norms
from ood_monitor.gradients.order import sample_dimensions
from ood_monitor.modules import scored

ALL: Callable[[str], bool] = lambda name: True  # noqa: E731
TENSOR: Callable[[str], Any] = lambda name: "tensor"  # noqa: E731

LENGTH = 6
EQUAL = torch.tensor([6, 6, 2, 2])
RAGGED = torch.tensor([6, 2, 5, 3])  # as many rows in all


def positions(lengths: list[int]) -> list[int]:
    return [LENGTH * i + j for i, k in enumerate(lengths) for j in range(k)]


def mask(lengths: Tensor) -> Tensor:
    return torch.arange(LENGTH) < lengths[:, None]


def drop_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """As flash attention's unpadding: by the indices of what a mask keeps."""
    kept = mask(lengths).flatten().nonzero().flatten()
    return x.reshape(-1, *x.shape[2:]).index_select(0, kept)


def moved_to_front(x: Tensor, lengths: Tensor) -> Tensor:
    order = (~mask(lengths)).flatten().to(torch.uint8).argsort(stable=True)
    return x.flatten(0, 1)[order][: int(lengths.sum())]


def rolled(x: Tensor, lengths: Tensor) -> Tensor:
    pieces, flat = [], x.flatten(0, 1)
    for k in lengths.tolist():
        pieces.append(flat[:k])
        flat = flat.roll(-LENGTH, 0)
    return torch.cat(pieces)


def padded(x: Tensor, lengths: Tensor) -> Tensor:
    pieces = [row[:k] for row, k in zip(x, lengths.tolist(), strict=True)]
    after = [sum(lengths.tolist()[i:]) for i in range(1, len(pieces) + 1)]
    before = [sum(lengths.tolist()[:i]) for i in range(len(pieces))]
    padding = zip(pieces, before, after, strict=True)
    return torch.stack([F.pad(p, (0, 0, b, a)) for p, b, a in padding]).sum(0)


def copied(x: Tensor, lengths: Tensor) -> Tensor:
    rows, start = torch.zeros(int(lengths.sum()), x.shape[2]).to(x), 0
    for i, k in enumerate(lengths.tolist()):
        rows[start : start + k].copy_(x[i, :k])
        start += k
    return rows


def written(x: Tensor, lengths: Tensor) -> Tensor:
    rows, start = x.new_zeros(int(lengths.sum()), x.shape[2]), 0
    for i, k in enumerate(lengths.tolist()):
        rows[start : start + k] = x[i, :k]
        start += k
    return rows


def as_many_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """As lengths have in all, in order."""
    return x[:, : int(lengths.sum()) // len(x)].flatten(0, 1).clone()


def regrouped_in_place(x: Tensor, lengths: Tensor) -> Tensor:
    """Through views of a tensor whose rows were in order."""
    rows, start = as_many_rows(x, lengths), 0
    for i, k in enumerate(lengths.tolist()):
        rows.narrow(0, start, k).copy_(x[i, :k])
        start += k
    return rows


def regrouped_under_a_view(x: Tensor, lengths: Tensor) -> Tensor:
    rows, start = as_many_rows(x, lengths), 0
    view = rows.view_as(rows)
    for i, k in enumerate(lengths.tolist()):
        rows[start : start + k] = x[i, :k]
        start += k
    return view


def indexed_copy(x: Tensor, lengths: Tensor) -> Tensor:
    kept = torch.tensor(positions(lengths.tolist()))
    rows = x.new_zeros(len(kept), x.shape[2])
    return rows.index_copy(0, torch.arange(len(kept)), x.flatten(0, 1)[kept])


def nested(x: Tensor, lengths: Tensor) -> Tensor:
    parts = [x[i, :k] for i, k in enumerate(lengths.tolist())]
    return torch.cat(list(torch.nested.as_nested_tensor(parts).unbind()))


#: Ways to put the first k rows of each sample below one another, (B, L, D) to (rows, D).
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask": lambda x, n: x[mask(n)],
    "a mask of numbers": lambda x, n: x[
        torch.tensor([[j < k for j in range(LENGTH)] for k in n.tolist()])
    ],
    "a mask as a list": lambda x, n: x.flatten(0, 1)[
        [j < k for k in n.tolist() for j in range(LENGTH)]
    ],
    "masked_select": lambda x, n: x.masked_select(mask(n)[..., None]).view(-1, x.shape[2]),
    "indices of a mask": lambda x, n: x[mask(n).nonzero(as_tuple=True)],
    "where": lambda x, n: x[torch.where(mask(n))],
    "unpadding": drop_padding,
    "a list": lambda x, n: x.flatten(0, 1)[positions(n.tolist())],
    "a constant index": lambda x, n: x.flatten(0, 1)[torch.tensor(positions(n.tolist()))],
    "gather": lambda x, n: x.flatten(0, 1).gather(
        0, torch.tensor(positions(n.tolist()))[:, None].expand(-1, x.shape[2])
    ),
    "take_along_dim": lambda x, n: x.flatten(0, 1).take_along_dim(
        torch.tensor(positions(n.tolist()))[:, None], 0
    ),
    "embedding of indices": lambda x, n: F.embedding(
        torch.tensor(positions(n.tolist())), x.flatten(0, 1)
    ),
    "narrow": lambda x, n: torch.cat(
        [x.narrow(0, i, 1).narrow(1, 0, k).flatten(0, 1) for i, k in enumerate(n.tolist())]
    ),
    "slices": lambda x, n: torch.cat(
        [x[i : i + 1, :k].flatten(0, 1) for i, k in enumerate(n.tolist())]
    ),
    "items and slices": lambda x, n: torch.cat([x[i, :k] for i, k in enumerate(n.tolist())]),
    "slices of rows": lambda x, n: torch.cat(
        [x.flatten(0, 1)[LENGTH * i :][:k] for i, k in enumerate(n.tolist())]
    ),
    "unbind": lambda x, n: torch.cat(
        [row[:k] for row, k in zip(x.unbind(), n.tolist(), strict=True)]
    ),
    "iteration": lambda x, n: torch.cat([row[:k] for row, k in zip(x, n.tolist(), strict=True)]),
    "select": lambda x, n: torch.cat([x.select(0, i)[:k] for i, k in enumerate(n.tolist())]),
    "split": lambda x, n: torch.cat(
        [r[0, :k] for r, k in zip(x.split(1), n.tolist(), strict=True)]
    ),
    "vstack": lambda x, n: torch.vstack([x[i, :k] for i, k in enumerate(n.tolist())]),
    "time first": lambda x, n: x.transpose(0, 1).swapaxes(0, 1)[mask(n)],
    "as_strided": lambda x, n: torch.cat(
        [
            x.contiguous().as_strided((k, x.shape[2]), (x.shape[2], 1), LENGTH * i * x.shape[2])
            for i, k in enumerate(n.tolist())
        ]
    ),
    "packing": lambda x, n: pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)[0],
    "sort": moved_to_front,
    "roll": rolled,
    "padding": padded,
    "copy_": copied,
    "writing": written,
    "views of rows": regrouped_in_place,
    "rows of a view": regrouped_under_a_view,
    "index_copy": indexed_copy,
    "a nested tensor": nested,
    "a product with a selection": lambda x, n: (
        torch.eye(x.shape[0] * LENGTH).to(x)[positions(n.tolist())] @ x.flatten(0, 1)
    ),
    "einsum with a selection": lambda x, n: torch.einsum(
        "rk,kd->rd", torch.eye(x.shape[0] * LENGTH).to(x)[positions(n.tolist())], x.flatten(0, 1)
    ),
}


class Rows(om.Adapter):
    """The log-likelihood of rows that one of the ways puts together, added up by sample."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor], before: bool) -> None:
        parts: list[nn.Module] = [nn.Linear(3, 3), nn.Tanh()] if before else []
        after = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.module = nn.ModuleDict({"before": nn.Sequential(*parts), "after": after}).double()
        self._way = way

    def log_likelihood(self, batch: Any) -> Iterable[tuple[str, Tensor]]:
        x, lengths = batch
        rows = self.module["after"](self._way(self.module["before"](x), lengths))
        packing = self._way is WAYS["packing"]
        owner = torch.arange(len(x))[:, None, None].expand(-1, LENGTH, 1)
        owners = (self._way if packing else WAYS["a mask"])(owner, lengths).flatten()
        values = -0.5 * (rows - 1).square().sum(1)
        yield "log_likelihood", values.new_zeros(len(x)).index_add(0, owners, values)


def assert_exact(adapter: om.Adapter, batch: Any) -> None:
    found = gradient_norms(adapter, batch)
    for key, rows in looped(adapter, map_tensors(torch.clone, batch))[1].items():
        torch.testing.assert_close(found[key], rows.sum(1), rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("before", [False, True], ids=["of the batch", "of a layer"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore:The fast path disagrees with the loop")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_rows_of_other_lengths_keep_their_gradients(
    way: Callable[[Tensor, Tensor], Tensor], before: bool
) -> None:
    torch.manual_seed(0)
    adapter, x = Rows(way, before), torch.randn(4, LENGTH, 3).double()
    for lengths in (EQUAL, RAGGED, RAGGED.flip(0)):
        assert_exact(adapter, (x, lengths))


# What stays in order


def attention(m: Any, x: Tensor) -> Tensor:
    b, t, d = x.shape
    q, k, v = m.f(x).reshape(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
    weights = torch.bmm(q.reshape(b * 2, t, -1), k.reshape(b * 2, t, -1).mT).softmax(-1)
    joined = torch.bmm(weights, v.reshape(b * 2, t, -1)).view(b, 2, t, d // 2)
    return m.out(joined.transpose(1, 2).flatten(2))


def windows(m: Any, x: Tensor) -> Tensor:
    """As a Swin transformer's: rolled, cut into windows of 2 by 2, and put together."""
    b, h, w, c = x.shape
    parts = x.roll((-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    y = m.f(parts.reshape(-1, 4, c)).view(b, h // 2, w // 2, 2, 2, -1)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)[..., :4]
    return m.out(y.roll((1, 1), (1, 2)))


def time_first(m: Any, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    steps = [m.f(y[t])[..., :4].tanh() for t in range(len(y))]
    return m.out(torch.stack(steps).movedim(0, 1))


def stacked_and_unbound(m: Any, x: Tensor) -> Tensor:
    first, second = torch.stack([m.f(x), x.repeat(1, 1, 3)], 0).unbind(0)
    return m.out((first * second)[..., :4])


def at_levels(m: Any, x: Tensor) -> Tensor:
    """Each sample at three noise levels, one below the other."""
    y = x.repeat_interleave(3, 0) * torch.arange(1, 4).to(x).repeat(len(x))[:, None, None]
    return m.out(m.f(y)[..., :4]).unflatten(0, (len(x), 3))


def last_of_each(m: Any, x: Tensor) -> Tensor:
    last = x[..., 0].argmax(1)
    return m.out(m.f(x)[torch.arange(len(x)), last][:, :4])


def reversed_channels(m: Any, x: Tensor) -> Tensor:
    y = x[:, [3, 0, 1, 2]].flip(1, 2).gather(1, x.argsort(1))
    first, second = m.f(y).chunk(2, dim=-1)
    return m.out(torch.cat([first, second], 1)[..., :4])


def expanded(m: Any, x: Tensor) -> Tensor:
    y = m.f(x.mean(1)).unsqueeze(1).expand(-1, 4, -1)
    return m.out(F.pad(y, (0, 4, 1, 0))[..., :4])


def normalised(m: Any, x: Tensor) -> Tensor:
    """By functions that name an output to write into, of none."""
    y = F.normalize(torch.as_tensor(x), dim=-1) / torch.norm(x, dim=-1, keepdim=True)
    return m.out(m.f(y)[..., :4])


KEPT: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "attention": (attention, (5, 4)),
    "windows": (windows, (4, 4, 4)),
    "time first": (time_first, (4, 4)),
    "stack and unbind": (stacked_and_unbound, (4, 4)),
    "levels": (at_levels, (4, 4)),
    "last of each": (last_of_each, (4, 4)),
    "channels": (reversed_channels, (4, 4)),
    "expand": (expanded, (4, 4)),
    "normalised": (normalised, (4, 4)),
}


@pytest.mark.parametrize(("forward", "shape"), KEPT.values(), ids=KEPT)
def test_rows_that_stay_in_order_need_no_loop(
    forward: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    net = Function(forward, f=nn.Linear(4, 12), out=nn.Linear(4, 3)).double()
    adapter = om.LogLikelihood(net, lambda m, x: -m(x).square().flatten(1).sum(1))
    x = torch.randn(4, *shape).double()
    assert_exact(adapter, x)
    found = scored(
        lambda passes: recorded_norms(passes, x, 4, ALL, TENSOR), adapter, adapter.module
    )
    assert not found.left_over
    assert not found.found_owners


def sorted_with_created_times(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    times = m.embed(torch.ones_like(x[:, :1])).tanh()  # rows in order, but of sorted samples
    return m.out((x[order] + times).sin())[order.argsort()]


def test_rows_created_for_samples_that_are_sorted_keep_their_gradients() -> None:
    torch.manual_seed(0)
    parts = {"embed": nn.Linear(1, 3), "out": nn.Linear(3, 2)}
    net = Function(sorted_with_created_times, **parts).double()
    adapter = om.LogLikelihood(net, lambda m, x: -m(x).square().sum(1))
    x = torch.linspace(-1, 1, 12).double().reshape(4, 3)
    for batch in (x, x[[2, 0, 3, 1]]):
        assert_exact(adapter, batch)


@pytest.mark.parametrize("d", [0, 1, 2])
@pytest.mark.parametrize(
    "index",
    [
        *(0, slice(1, None), None, ..., (), (slice(None), 0), (slice(None), slice(1, 3)), (..., 0)),
        *((0, ...), (None, ..., None), (..., slice(0, 2)), (0, None, slice(None), 0), (0, 0, 0)),
        *((slice(None), None, ..., slice(1, 2)), (slice(None, None, 2),), (slice(0, 6),)),
    ],
    ids=str,
)
def test_where_samples_are_in_a_view(d: int, index: Any) -> None:
    """As the numbers of the samples themselves tell, taken by the same index."""
    shape = [3, 3, 3]
    shape[d] = 6
    x = torch.rand(shape)
    result = x[index]
    (found,) = sample_dimensions(Tensor.__getitem__, (x, index), {}, [result], 3, [(x, d)])
    parts = numbers(shape, d, 3)[index]
    whole = [i for i in range(parts.ndim) if in_order(parts, i, 3)]
    assert found == (whole[0] if whole else None)
