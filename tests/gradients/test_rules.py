"""Each operation's rule against autograd, one group of samples at a time."""

import operator
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ood_monitor.gradients import factors
from ood_monitor.gradients.factors import (
    Factor,
    Granularity,
    Materialised,
    Outer,
    count_of,
    gram_is_cheaper,
    norms_by,
    norms_of_gradient,
    united,
)
from ood_monitor.gradients.owners import Owners
from ood_monitor.gradients.rules import POINTWISE, RULES
from ood_monitor.gradients.uses import of_owners, pointwise

SAMPLES = 4


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Call(NamedTuple):
    """A call of an operation: shapes for tensors to draw, anything else as it is."""

    operation: Callable[..., Tensor]
    arguments: dict[str, Any]

    def drawn(self) -> dict[str, Any]:
        shaped = {"input", "weight", "bias", "running_mean"} & self.arguments.keys()
        return self.arguments | {
            name: draw(*self.arguments[name])
            for name in shaped
            if isinstance(self.arguments[name], tuple)
        }

    def __call__(self, **arguments: Any) -> Tensor:
        """The operation, whose first arguments some operations name otherwise or not at all."""
        first = takewhile(arguments.__contains__, RULES[self.operation].arguments)
        positional = [arguments.pop(name) for name in list(first)]
        return self.operation(*positional, **arguments)


def convolution(x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Call:
    operation = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[len(x)]
    bias = {"bias": (weight[0],)} if options.pop("biased", True) else {}
    return Call(operation, {"input": x, "weight": weight, **bias, **options})


def transposed(x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Call:
    operation = {3: torch.conv_transpose1d, 4: torch.conv_transpose2d, 5: torch.conv_transpose3d}
    bias = {"bias": (weight[1] * options.get("groups", 1),)}
    return Call(operation[len(x)], {"input": x, "weight": weight, **bias, **options})


def batch_norm(*x: int, **options: Any) -> Call:
    statistics = {"running_mean": (x[1],), "running_var": torch.linspace(0.5, 2, x[1]).double()}
    return Call(F.batch_norm, {"input": x, **statistics, **options})


def embedding(index: Tensor, **options: Any) -> Call:
    return Call(F.embedding, {"input": index, "weight": (5, 3), **options})


INDEX = torch.tensor([[0, 1, 1], [2, 4, 2], [3, 3, 3], [4, 0, 1]])
CALLS = {
    "linear": Call(F.linear, {"input": (4, 3), "weight": (2, 3), "bias": (2,)}),
    "linear-wide": Call(F.linear, {"input": (4, 2, 6), "weight": (7, 6)}),
    "linear-long": Call(F.linear, {"input": (4, 3, 5, 2), "weight": (3, 2), "bias": (3,)}),
    "linear-bias-only": Call(F.linear, {"input": (4, 5, 3), "weight": draw(2, 3), "bias": (2,)}),
    "conv1d": convolution((4, 3, 9), (2, 3, 3), stride=2, padding=1),
    "conv1d-even-same": convolution((4, 3, 9), (2, 3, 4), padding="same", dilation=1),
    "conv2d": convolution((4, 2, 6, 5), (3, 2, 3, 3)),
    "conv2d-tuples": convolution(
        *((4, 2, 9, 9), (3, 2, 3, 2)), stride=(2, 1), padding=(0, 2), dilation=(1, 2)
    ),
    "conv2d-lists": convolution((4, 2, 6, 6), (3, 2, 3, 3), stride=[2], padding=[1], dilation=[1]),
    "conv2d-same": convolution((4, 2, 6, 5), (3, 2, 3, 2), padding="same", dilation=(1, 3)),
    "conv2d-valid": convolution((4, 2, 6, 5), (3, 2, 3, 3), padding="valid", biased=False),
    "conv2d-wide": convolution((4, 9, 3, 3), (9, 9, 3, 3), stride=2, padding=1),
    "conv2d-wide-dilated": convolution((4, 9, 2, 2), (9, 9, 3, 3), padding=2, dilation=2),
    "conv2d-1x1": convolution((4, 3, 4, 4), (5, 3, 1, 1)),
    "conv2d-1x1-wide": convolution((4, 9, 1, 2), (8, 9, 1, 1)),
    "conv2d-1x1-strided": convolution((4, 3, 4, 4), (5, 3, 1, 1), stride=2),
    "conv2d-1x1-padded": convolution((4, 3, 4, 4), (5, 3, 1, 1), padding=1),
    "conv2d-groups": convolution((4, 4, 5, 5), (6, 2, 3, 3), groups=2, padding=1),
    "conv2d-groups-1x1": convolution((4, 4, 5, 5), (6, 2, 1, 1), groups=2),
    "conv2d-groups-wide": convolution((4, 18, 1, 1), (18, 9, 3, 3), groups=2, padding=1),
    "conv2d-many-columns": convolution((4, 17, 3, 4), (2, 17, 3, 2), padding=1),
    "conv2d-many-columns-in-groups": convolution(
        *((4, 34, 5, 3), (4, 17, 2, 2)), groups=2, stride=2, dilation=(2, 1)
    ),
    "conv2d-stride-beyond-kernel": convolution((4, 2, 9, 8), (3, 2, 2, 1), stride=(3, 2)),
    "conv2d-rest-unused": convolution((4, 2, 8, 8), (3, 2, 3, 3), stride=3, padding=(0, 2)),
    "conv3d": convolution((4, 2, 4, 3, 3), (3, 2, 2, 3, 2), padding=(1, 0, 1)),
    "conv3d-stride": convolution((4, 2, 5, 4, 3), (3, 2, 3, 2, 1), stride=2, dilation=(1, 2, 1)),
    "transposed1d": transposed((4, 3, 5), (3, 2, 4), stride=3, output_padding=1),
    "transposed2d": transposed((4, 2, 3, 4), (2, 3, 3, 3), padding=1),
    "transposed2d-stride": transposed(
        *((4, 2, 3, 4), (2, 3, 3, 2)), stride=2, padding=(1, 0), output_padding=(0, 1)
    ),
    "transposed2d-groups": transposed((4, 4, 3, 3), (4, 3, 2, 3), groups=2, dilation=(2, 1)),
    "transposed3d": transposed((4, 2, 2, 3, 2), (2, 3, 2, 2, 2), stride=(1, 2, 1)),
    "embedding": embedding(INDEX),
    "embedding-flat": embedding(INDEX[:, 0]),
    "embedding-square": embedding(INDEX[:, :, None]),
    "embedding-sparse": embedding(INDEX, sparse=True),
    "embedding-padding": embedding(INDEX, padding_idx=1),
    "embedding-padding-from-the-end": embedding(INDEX, padding_idx=-1),
    "group-norm": Call(
        F.group_norm, {"input": (4, 6, 3, 2), "num_groups": 2, "weight": (6,), "bias": (6,)}
    ),
    "group-norm-flat": Call(
        F.group_norm, {"input": (4, 6), "num_groups": 2, "weight": (6,), "eps": 0.1}
    ),
    "layer-norm": Call(
        F.layer_norm, {"input": (4, 5, 3), "normalized_shape": (3,), "weight": (3,), "bias": (3,)}
    ),
    "layer-norm-2d": Call(
        F.layer_norm,
        {"input": (4, 5, 2, 3), "normalized_shape": [2, 3], "weight": (2, 3), "eps": 0.1},
    ),
    "rms-norm": Call(
        F.rms_norm, {"input": (4, 5, 3), "normalized_shape": (3,), "weight": (3,), "eps": 0.1}
    ),
    "rms-norm-2d": Call(
        F.rms_norm, {"input": (4, 5, 2, 3), "normalized_shape": [2, 3], "weight": (2, 3)}
    ),
    "batch-norm": batch_norm(4, 3, 5, weight=(3,), bias=(3,), training=False, eps=0.1),
    "batch-norm-flat": batch_norm(4, 3, weight=(3,)),
}


def of_each_group(
    call: Call, arguments: dict[str, Any], names: list[str], g: Tensor, n: int
) -> Any:
    """Gradients by autograd, {name: (n, ...)}."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    parts = []
    for x, g_i in zip(arguments["input"].tensor_split(n), g.tensor_split(n), strict=True):
        output = call(**(arguments | leaves | {"input": x}))
        parts.append(torch.autograd.grad(output, list(leaves.values()), g_i))
    return {
        name: torch.stack(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)
    }


def assert_norms(factor: Factor, gradients: Iterable[Tensor]) -> None:
    """A factor's norms of every granularity are those of its gradients."""
    for granularity in get_args(Granularity):
        expected = torch.stack([norms_of_gradient(granularity, each) for each in gradients])
        torch.testing.assert_close(norms_by(granularity, factor), expected)


@pytest.mark.parametrize("n", [4, 2, 1], ids="{} groups".format)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_factors_equal_gradients(
    call: Call, n: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "gram_is_cheaper", lambda *sizes: form == "gram")
    arguments = call.drawn()
    g = torch.randn_like(call(**arguments))
    names = [name for name in ("weight", "bias") if name in arguments]
    found = RULES[call.operation].factors(n, g, arguments)
    for name, exact in of_each_group(call, arguments, names, g, n).items():
        factor = found[name]
        dense = exact.to_dense()
        torch.testing.assert_close(factor.gradients(0, n), dense)
        torch.testing.assert_close(factor.gradients(n - 1, n), dense[n - 1 :])
        assert_norms(factor, exact)


@pytest.mark.parametrize("alike", [True, False], ids=["as many each", "many of one"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_factors_of_rows_in_any_order(call: Call, alike: bool) -> None:
    n, rule, arguments = 3, RULES[call.operation], call.drawn()
    output = call(**arguments)
    leading = output.shape[: rule.leading(arguments)]
    count = leading.numel()
    # Of three samples the second has no row.
    own = 2 * torch.randint(2, (count,)) if alike else (torch.arange(count) == count // 2).long()
    own = own if alike else 2 * own
    names = [name for name in ("weight", "bias") if name in arguments]
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    output = call(**(arguments | leaves))
    g = torch.randn_like(output)
    found = of_owners(rule, g, arguments, Owners(own, n))
    exact: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(n):
        part = g * (own == i).reshape(*leading, *[1] * (g.ndim - len(leading)))
        gradients = torch.autograd.grad(output, list(leaves.values()), part, retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            exact[name].append(gradient.to_dense())
    for name in names:
        torch.testing.assert_close(found[name].gradients(0, n), torch.stack(exact[name]))
        torch.testing.assert_close(found[name].gradients(1, 2), torch.stack(exact[name][1:2]))
        assert_norms(found[name], exact[name])


def test_every_rule_is_called_above() -> None:
    assert {call.operation for call in CALLS.values()} == RULES.keys()


# Which form a factor takes


@pytest.mark.parametrize(
    ("sizes", "gram"),
    [
        ((1, 1, 5, 3), True),  # one position: the product of two norms
        ((64, 64, 5, 3), False),
        ((78, 100, 64, 64, (3, 3), (1, 1)), True),
        ((286, 324, 64, 64, (3, 3), (1, 1)), False),
        ((286, 324, 256, 256, (3, 3), (1, 1)), True),
        ((1086, 1156, 128, 128, (3, 3), (1, 1)), False),
        ((271, 289, 256, 256, (3, 3), (2, 2)), True),  # four images, one for each phase
        ((271, 289, 128, 128, (3, 3), (2, 2)), False),
    ],
    ids=str,
)
def test_gram_is_cheaper_as_measured(sizes: tuple[Any, ...], gram: bool) -> None:
    assert gram_is_cheaper(*sizes) == gram


FACTORS = {
    "outer": lambda: Outer(draw(4, 6, 3), draw(4, 6, 5), torch.Size((3, 5))),
    "convolution": lambda: RULES[torch.conv2d].factors(
        *(2, draw(4, 6, 5, 5), {"input": draw(4, 2, 7, 7), "weight": draw(6, 2, 3, 3)})
    )["weight"],
}


@pytest.mark.parametrize("make", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("gram", [False, True])
def test_slices_change_nothing(
    make: Callable[[], Factor], gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = make()
    expected = factor.row_norms(), factor.column_norms()
    monkeypatch.setattr(factors, "gram_is_cheaper", lambda *sizes: gram)
    monkeypatch.setitem(factors._HELD_ELEMENTS, "cpu", 1)
    torch.testing.assert_close((factor.row_norms(), factor.column_norms()), expected)


# What a rule leaves to the loop


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call(torch.conv2d, {"input": (2, 6, 5), "weight": (3, 2, 3, 3)}), "without a batch"),
        (batch_norm(4, 3, weight=(3,), training=True), "mix samples"),
        (embedding(INDEX, max_norm=1.0), "renormalises or rescales"),
        (embedding(INDEX, scale_grad_by_freq=True), "renormalises or rescales"),
    ],
    ids=("unbatched", "training", "max-norm", "frequency"),
)
def test_not_covered(call: Call, message: str) -> None:
    arguments = call.drawn()
    g = torch.ones_like(call(**arguments))
    with pytest.raises(NotImplementedError, match=message):
        RULES[call.operation].factors(SAMPLES, g, arguments)


# Broadcasting operations


def of_two() -> list[Callable[..., Tensor]]:
    """The broadcasting operations of two tensors."""
    of_three = ("where", "lerp", "addcmul", "addcdiv")
    return [f for f in sorted(POINTWISE, key=str) if f.__name__ not in of_three]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("shape", [(), (3,), (5, 1)], ids=str)
@pytest.mark.parametrize(
    "operation", [torch.where, torch.lerp, torch.addcmul, torch.addcdiv], ids=lambda f: f.__name__
)
def test_pointwise_of_three(
    operation: Callable[..., Tensor], shape: tuple[int, ...], position: int
) -> None:
    arguments = [2 + draw(SAMPLES, 5, 3).abs() for _ in range(3)]
    if operation is torch.where:
        arguments[0], position = arguments[0] > 2.5, max(position, 1)
    arguments[position] = 2 + draw(*shape).abs()
    g, leaf = draw(SAMPLES, 5, 3), arguments[position].clone().requires_grad_()
    factor, exact = pointwise(operation, SAMPLES, g, tuple(arguments), position), []
    for i in range(SAMPLES):
        own = [leaf if j == position else each[i : i + 1] for j, each in enumerate(arguments)]
        exact.append(torch.autograd.grad(operation(*own), leaf, g[i : i + 1])[0])
    torch.testing.assert_close(factor.gradients(0, SAMPLES), torch.stack(exact))


SHAPES = [(), (1,), (3,), (5, 1), (1, 3), (5, 3), (1, 5, 3), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("operation", of_two(), ids=lambda f: f.__qualname__)
def test_pointwise(operation: Callable[..., Tensor], position: int, shape: tuple[int, ...]) -> None:
    parameter, data, g = 2 + draw(*shape).abs(), 2 + draw(SAMPLES, 5, 3).abs(), draw(SAMPLES, 5, 3)
    arguments = (parameter, data) if position == 0 else (data, parameter)
    leaf = parameter.clone().requires_grad_()
    for n in (4, 2):
        factor, exact = pointwise(operation, n, g, arguments, position), []
        for x, g_i in zip(data.tensor_split(n), g.tensor_split(n), strict=True):
            output = operation(leaf, x) if position == 0 else operation(x, leaf)
            exact.append(torch.autograd.grad(output, leaf, g_i)[0])
        torch.testing.assert_close(factor.gradients(0, n), torch.stack(exact))


@pytest.mark.parametrize("shape", [*SHAPES, (4, 1, 3), (4, 5, 1)], ids=str)
def test_pointwise_of_rows_in_any_order(shape: tuple[int, ...]) -> None:
    parameter, data, g = draw(*shape), draw(4, 5, 3), draw(4, 5, 3)
    own = torch.randint(2, (4, 5)) * 2  # of three samples the second has no row
    factor = pointwise(torch.mul, 3, g, (data, parameter), 1, Owners(own.flatten(), 3))
    leaf = parameter.clone().requires_grad_()
    exact = [torch.autograd.grad(data * leaf, leaf, g * (own == i)[..., None])[0] for i in range(3)]
    torch.testing.assert_close(factor.gradients(0, 3), torch.stack(exact))
    assert_norms(factor, exact)


@pytest.mark.parametrize("shape", [(), (3,), (5, 1, 3), (5, 1, 1), (1, 3)], ids=str)
def test_pointwise_of_samples_along_another_dimension(shape: tuple[int, ...]) -> None:
    parameter, data, g = draw(*shape), draw(5, 4, 3), draw(5, 4, 3)
    leaf = parameter.clone().requires_grad_()
    for n in (4, 2):
        factor = pointwise(torch.mul, n, g, (data, parameter), 1, 1)
        exact = []
        for i in range(n):
            own = (torch.arange(4) // (4 // n) == i)[:, None]
            exact.append(torch.autograd.grad(data * leaf, leaf, g * own)[0])
        torch.testing.assert_close(factor.gradients(0, n), torch.stack(exact))


def test_pointwise_covers_the_operators() -> None:
    x, seen = draw(2), []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        for operation in (operator.add, operator.mul, operator.sub, operator.truediv):
            operation(x, x), operation(x, 2.0), operation(2.0, x)
    assert set(seen) <= POINTWISE


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 1, 1), (4, 5, 1)], ids=str)
def test_pointwise_of_an_operand_with_rows_for_each_sample(shape: tuple[int, ...]) -> None:
    operand, data, g = draw(*shape), draw(4, 5, 3), draw(4, 5, 3)
    leaf = operand.clone().requires_grad_()
    for n in (4, 2):
        factor, exact = pointwise(torch.mul, n, g, (data, operand), 1), []
        for i in range(n):
            own = torch.zeros(n, dtype=g.dtype)
            own[i] = 1
            part = g * own.repeat_interleave(4 // n)[:, None, None]
            exact.append(torch.autograd.grad(data * leaf, leaf, part)[0])
        torch.testing.assert_close(factor.gradients(0, n), torch.stack(exact))
        torch.testing.assert_close(factor.gradients(1, n), torch.stack(exact[1:]))
        assert_norms(factor, exact)


# Several uses of a parameter


def test_factors_of_several_uses_are_one_where_they_can_be() -> None:
    products = [Outer(draw(4, t, 3), draw(4, t, 2), torch.Size((3, 2))) for t in (1, 5)]
    held = [Materialised(draw(4, 3)) for _ in range(3)]
    for each in (products, held):
        found = united(each)
        assert found is not None
        exact = torch.stack([factor.gradients(0, 4) for factor in each]).sum(0)
        torch.testing.assert_close(found.gradients(0, 4), exact)
        assert_norms(found, exact)
    assert united([products[0], Materialised(draw(4, 3, 2))]) is None


# Materialised gradients


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (3, 2, 2)], ids=str)
def test_materialised(shape: tuple[int, ...]) -> None:
    gradients = draw(4, *shape)
    factor, whole = Materialised(gradients), gradients.reshape(4, -1).square().sum(1)
    for dimension, granularity in enumerate(("row", "column")):
        norms = norms_by(granularity, factor)
        assert norms.shape == (4, *count_of(granularity, torch.Size(shape)))
        torch.testing.assert_close(norms.sum(1), whole)
        if len(shape) > dimension:
            own = gradients.movedim(dimension + 1, 1).reshape(4, shape[dimension], -1)
            torch.testing.assert_close(norms, own.square().sum(2))
    torch.testing.assert_close(norms_by("tensor", factor), whole)
