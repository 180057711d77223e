"""What checked options are given back as; what is refused is in `test_options.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ood_monitor import checks

GIVEN: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "NumPy's whole number": (checks.whole, np.int64(3), 3),
    "a tensor's": (checks.whole, torch.tensor(3), 3),
    "a seed": (checks.seed_of, np.uint64(2**64 - 1), 2**64 - 1),
    "NumPy's real number": (checks.number, np.float64(0.5), 0.5),
    "a whole number as a real one": (checks.number, 3, 3.0),
    "NumPy's truth": (checks.flag, np.bool_(True), True),
    "a path": (checks.path_of, "a/b", Path("a/b")),
    "a range": (checks.range_of, np.array([0, 1]), (0.0, 1.0)),
    "items of an iterator": (checks.items, iter("ab"), ["a", "b"]),
}


@pytest.mark.parametrize(("check", "value", "expected"), GIVEN.values(), ids=GIVEN)
def test_what_is_taken_is_pythons_own(
    check: Callable[..., Any], value: Any, expected: object
) -> None:
    found = check("it", value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("ends", ["[]", "()", "[)", "(]"])
@pytest.mark.parametrize(("value", "at"), [(0.0, 0), (1.0, 1)])
def test_an_interval_has_the_ends_that_its_brackets_say(ends: str, value: float, at: int) -> None:
    if ends[at] in "[]":
        assert checks.number("it", value, 0, 1, ends=ends) == value
        return
    with pytest.raises(ValueError, match="Expected it") as caught:
        checks.number("it", value, 0, 1, ends=ends)
    assert str(caught.value) == f"Expected it in {ends[0]}0, 1{ends[1]}, got {value}."


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(3), r"got a Tensor, which is one batch: give \[batch\], or a loader"),
        (np.zeros(3), "got a ndarray, which is one batch"),
        ({"x": torch.zeros(3)}, "got a dict, which is one batch"),
        ("val", "an iterable of batches, got 'val'"),
        (None, "got None"),
        (list, "got <class 'list'>"),
    ],
)
def test_one_batch_is_no_loader(value: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"Expected held_out as .*{told}"):
        checks.batches("held_out", value)


@pytest.mark.parametrize(
    "value", [[1], (1,), iter([1]), range(3)], ids=lambda value: type(value).__name__
)
def test_what_gives_batches_is_a_loader(value: Any) -> None:
    assert checks.batches("held_out", value) is value


def test_a_word_in_the_place_of_several_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"as several items, got 'val'. For one alone give \['val'"):
        checks.items("watch", "val")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("gradients", " Did you mean 'gradient_norms'?"),
        ("Forward", " Did you mean 'forward'?"),
        ("for", " Did you mean 'forward'?"),
        ("paper", ""),
        ("", ""),
        (3, ""),
    ],
)
def test_a_word_that_is_near_is_asked_for(value: Any, told: str) -> None:
    words = ("gradient_norms", "forward")
    with pytest.raises(ValueError, match="Expected method of") as caught:
        checks.word("method", value, words)
    assert str(caught.value) == f"Expected method of {words}, got {value!r}.{told}"
