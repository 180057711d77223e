"""Fields of a batch that have no row for each sample: ignored ones are left out, others refused."""

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, batch_size, map_tensors, pieces, tensors_in
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.adapters.left_out import LeftOut, LeftOutError
from ood_monitor.statistics import expected_layers, forward_statistics
from ood_monitor.testing import check_adapter

N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


class Net(nn.Module):
    """log p(x | y), up to a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        shift = 0 if y is None else y.unsqueeze(1)
        return -0.5 * (self.layer(x) - shift).square().sum(1)


def of_x() -> om.LogLikelihood:
    return om.LogLikelihood(Net(), inputs=lambda batch: batch["x"], sample="row")


def of_x_and_y() -> om.LogLikelihood:
    return om.LogLikelihood(
        Net(),
        inputs=lambda batch: batch["x"],
        condition=lambda batch: {"y": batch["y"]},
        sample="row",
    )


@dataclass
class Sizes:
    image: Tensor
    name: str = "size"


IGNORED: dict[str, Any] = {
    "scalar": torch.tensor(1.0),
    "shared": torch.zeros(1, 7),
    "of another length": torch.tensor([8, 8]),
    "text": list("abcdef"),
    "tuple": tuple("abcdef"),
    "array": np.arange(N),
    "array of another length": np.arange(2),
    "items": [{"id": i} for i in range(N)],
    "boxes": [{"boxes": torch.zeros(i, 4), "id": i} for i in range(N)],
    "nested": {"sizes": [torch.tensor([8, 8]), {"temperature": torch.tensor(1.0)}]},
    "dataclass": Sizes(torch.tensor([8, 8])),
    "nothing": None,
    "number": 0.5,
    "object": object(),
}
every_field = pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)


@every_field
@pytest.mark.parametrize("make", [of_x, of_x_and_y])
def test_what_is_ignored_is_no_obstacle_and_changes_nothing(
    make: Callable[[], om.LogLikelihood], ignored: Any
) -> None:
    adapter, plain = make(), {"x": X, "y": Y}
    expected = om.gradient_norms(adapter, plain)
    before = copy.copy(batch := {"ignored": ignored, **plain})
    found = om.gradient_norms(copy.copy(adapter), batch, chunk_size=4)
    assert all(map(torch.equal, found.values(), expected.values()))
    forward = forward_statistics(copy.copy(adapter), batch, sample="row")
    told = forward_statistics(adapter, plain, sample="row")
    assert torch.equal(
        forward.log_likelihood["log_likelihood"], told.log_likelihood["log_likelihood"]
    )
    assert batch.keys() == before.keys()
    assert all(batch[name] is before[name] for name in batch)
    check_adapter(copy.copy(adapter), batch)


@every_field
@pytest.mark.parametrize("method", ["forward", "gradient_norms"])
def test_a_detector_fits_scores_and_explains_among_ignored_fields(
    method: Any, ignored: Any
) -> None:
    def batch(n: int, seed: int) -> Batch:
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
        own = ignored * 10 if isinstance(ignored, list | tuple) and len(ignored) == N else ignored
        own = ignored.repeat(10) if isinstance(ignored, np.ndarray) else own
        return {"ignored": own[:n] if own is not ignored else own, "x": x, "y": torch.zeros(n)}

    data = [batch(60, 1), batch(60, 2), batch(7, 3)]
    plain = [{"x": each["x"], "y": each["y"]} for each in data]
    adapter = of_x()
    detector = om.Detector(adapter, method=method).fit(data, progress=False)
    other = om.Detector(adapter, method=method).fit(plain, progress=False)
    monitor = om.Monitor(detector, ert=1000, fpr=0.05, identify="hash")
    for given, alone in zip(data, plain, strict=True):
        assert torch.equal(detector.score(given).score, other.score(alone).score)
        monitor.update(given)
    assert monitor.samples_seen == 127
    assert detector.verify(data).found == other.verify(plain).found
    detector.explain(data[0])
    detector.recalibrate(data, progress=False)
    monitor.close()


class Tempered(om.Adapter):
    """Uses a temperature, by whatever it may be asked for."""

    def __init__(self, use: Callable[[Any], Any] = float) -> None:
        self.module, self._use = Net(), use

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        self._use(batch["temperature"])
        yield "log_likelihood", self.module.log_prob(batch["x"])


USES: dict[str, Callable[[Any], Any]] = {
    "a method": lambda t: t.item(),
    "an attribute": lambda t: t.dtype,
    "arithmetic": lambda t: 2 / t,
    "PyTorch": lambda t: torch.exp(t),
    "PyTorch, in a list": lambda t: torch.stack([t, t]),
    "PyTorch, by keyword": lambda t: torch.add(input=t, other=1),
    "a tensor's": lambda t: X.mul(t),
    "a test of its type": lambda t: isinstance(t, Tensor) and t,
    "math": math.exp,
    "truth": bool,
    "comparison": lambda t: t == 1,
    "text": str,
    "NumPy": np.asarray,
    "a copy": lambda t: t.clone(),
    "swallowed": lambda t: _swallowed(t),
    "where it is asked whether it has something": lambda t: hasattr(t, "item"),
}


def _swallowed(value: Any) -> None:
    with suppress(ValueError):
        value.item()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    "value", [torch.tensor(1.0), torch.ones(1, 1), torch.ones(2)], ids=["scalar", "row", "two"]
)
def test_what_is_used_and_cannot_be_cut_is_refused_by_name(
    use: Callable[[Any], Any], value: Tensor
) -> None:
    def tolerant(temperature: Any) -> None:
        try:
            use(temperature)
        except (ValueError, RuntimeError, TypeError) as error:  # of a shape that it does not take
            if isinstance(error, LeftOutError):
                raise

    message = r"Expected Tempered to use fields with a row .* 6 samples.* batch\['temperature'\], a"
    with pytest.raises(ValueError, match=message):
        om.gradient_norms(Tempered(tolerant), {"x": X, "temperature": value})
    with pytest.raises(ValueError, match=message):
        om.Detector(Tempered(tolerant)).measure({"temperature": value, "x": X})


@pytest.mark.parametrize("value", [list("abcdef"), tuple("abcdef"), np.arange(N)], ids=str)
def test_a_list_of_the_samples_that_is_used_is_refused_cut_or_not(value: Any) -> None:
    with pytest.raises(ValueError, match=r"a use of batch\['temperature'\]"):
        om.gradient_norms(Tempered(lambda items: items[0]), {"x": X, "temperature": value})


def test_what_is_no_tensor_and_has_nothing_to_do_with_samples_is_passed_as_it_is() -> None:
    given: list[Any] = []
    adapter = Tempered(given.append)
    om.gradient_norms(adapter, {"x": X, "temperature": 0.5})
    om.gradient_norms(adapter, {"x": X, "temperature": "warm"})
    assert set(given) == {0.5, "warm"}


def test_a_later_use_of_what_was_ignored_is_refused_by_name() -> None:
    uses = [False]
    adapter = Tempered(lambda t: t.item() if uses[0] else None)
    batch = {"x": X, "temperature": torch.tensor(1.0)}
    om.gradient_norms(adapter, batch)
    uses[0] = True
    with pytest.raises(LeftOutError, match=r"a use of batch\['temperature'\], which it ignored"):
        om.gradient_norms(adapter, batch)


def test_what_was_ignored_stays_out_where_a_small_batch_has_a_row_by_chance() -> None:
    adapter = of_x()
    sizes = torch.tensor([8, 8])
    assert batch_size(without_ignored(adapter, {"size": sizes, "x": X})) == N
    small = without_ignored(adapter, {"size": sizes, "x": X[:2]})
    assert tensors_in(small) == [small["x"]]


def test_labels_of_the_samples_stay_although_they_are_ignored() -> None:
    kept = without_ignored(of_x(), {"x": X, "y": Y, "temperature": torch.tensor(1.0)})
    assert kept["y"] is Y
    assert type(kept["temperature"]) is LeftOut


@pytest.mark.parametrize("batch", [X, (X, Y), {"x": X, "y": Y}, (X, "a"), [X]], ids=str)
def test_a_batch_that_can_be_cut_is_given_back_and_the_model_not_called(batch: Batch) -> None:
    adapter = om.LogLikelihood(Net(), lambda *given: pytest.fail("it was called"))
    assert without_ignored(adapter, batch) is batch


def test_groups_may_be_told_by_what_the_model_ignores() -> None:
    names = ["a", "b"] * 60
    x = torch.randn(120, 3)
    detector = om.Detector(
        of_x(), groups=lambda batch: batch["tenant"], minimum_group=10, method="forward"
    )
    detector.fit([{"x": x, "tenant": names}], progress=False)
    scores = detector.score({"x": x, "tenant": names})
    assert scores.group is not None
    assert set(scores.group.tolist()) == {0, 1}


def test_a_null_condition_may_use_more_than_the_likelihood() -> None:
    network = nn.Conv2d(1, 1, 3, padding=1)
    network.forward = lambda x, t, scale, of=network.forward: of(x) * scale  # type: ignore[misc]
    adapter = om.DenoisingBound(
        network,
        torch.linspace(0.99, 0.01, 100),
        levels=[5],
        inputs=lambda batch: batch["x"],
        condition=lambda batch: {"scale": 1.0},
        null_condition=lambda batch: {"scale": batch["null"]},
    )
    with pytest.raises(ValueError, match=r"a use of batch\['null'\]"):
        without_ignored(adapter, {"x": torch.rand(4, 1, 8, 8), "null": torch.tensor(1.0)})


def test_an_error_of_the_model_comes_as_it_is() -> None:
    def broken(module: Any, x: Tensor) -> Tensor:
        raise KeyError("weights")

    adapter = om.LogLikelihood(Net(), broken, inputs=lambda batch: batch["x"])
    with pytest.raises(KeyError, match="weights"):
        without_ignored(adapter, {"x": X, "temperature": torch.tensor(1.0)})


def test_looking_leaves_no_trace() -> None:
    adapter = of_x()
    adapter.module.train()
    state = torch.get_rng_state()
    without_ignored(adapter, {"x": X, "temperature": torch.tensor(1.0)})
    assert adapter.module.training
    assert torch.equal(torch.get_rng_state(), state)


# Dataclasses


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor | None = None
    name: str = "frozen"


@dataclass
class Computed:
    x: Tensor
    y: Tensor
    made: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.made = 2 * self.x
        self.beside = 3 * self.x

    @cached_property
    def count(self) -> int:
        return len(self.x)


class Pair(NamedTuple):
    inner: Frozen
    y: Tensor


DATACLASSES: dict[str, Any] = {
    "frozen": Frozen(X, Y),
    "without labels": Frozen(X),
    "computed": Computed(X, Y),
    "in a tuple": Pair(Frozen(X, Y), Y),
    "in a dict": {"a": Frozen(X), "b": [Computed(X, Y)]},
}


@pytest.mark.parametrize("batch", DATACLASSES.values(), ids=DATACLASSES)
def test_dataclasses_are_cut_as_other_batches(batch: Batch) -> None:
    assert batch_size(batch) == N
    whole, parts = tensors_in(batch), list(pieces(batch, 4))
    assert [type(part) for part in parts] == [type(batch)] * 2
    joined = [torch.cat(pair) for pair in zip(*map(tensors_in, parts), strict=True)]
    assert all(map(torch.equal, joined, whole))
    assert [t.shape[0] for t in tensors_in(batch)] == [N] * len(whole)


def test_what_a_dataclass_computed_is_computed_again() -> None:
    batch = Computed(X, Y)
    assert batch.count == N
    part = map_tensors(lambda tensor: tensor[:2], batch)
    assert (part.count, batch.count) == (2, N)
    assert torch.equal(part.beside, 3 * X[:2])


def test_a_dataclass_without_tensors_is_passed_as_it_is() -> None:
    config = Sizes.__new__(Sizes)
    config.name = "config"
    batch = {"x": X, "config": config}
    assert map_tensors(torch.clone, batch)["config"] is config


def test_a_model_is_scored_by_a_dataclass() -> None:
    adapter = om.LogLikelihood(Net(), inputs=lambda batch: batch.x)
    plain = om.gradient_norms(om.LogLikelihood(adapter.module), X)
    found = om.gradient_norms(adapter, Frozen(X, Y), chunk_size=4)
    assert all(map(torch.equal, found.values(), plain.values()))
    sized = om.gradient_norms(adapter, Frozen(X, torch.tensor([8, 8])))
    assert all(map(torch.equal, sized.values(), plain.values()))
    assert expected_layers(adapter, Frozen(X, torch.tensor(1.0)))


def test_what_is_left_out_may_be_shown_and_copied() -> None:
    field = without_ignored(of_x(), {"x": X, "t": torch.tensor(1.0)})["t"]
    assert repr(field) == "<left out: batch['t']>"
    assert copy.copy(field) is copy.deepcopy([field])[0] is field
