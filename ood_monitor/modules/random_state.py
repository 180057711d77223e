"""The global random state, which scoring leaves as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["kept_random_state"]

#: Whether what uses a model has ever drawn from a global generator.
_draws: WeakIdKeyDictionary = WeakIdKeyDictionary()


@contextmanager
def kept_random_state(device: torch.device, by: object) -> Iterator[None]:
    """The random state of the CPU and of a device as it was, if the block draws.

    What draws nothing on its first use is not looked at again: another thread's draws are its own,
    and never rolled back.

    Args:
        device: The device beside the CPU.
        by: What draws.
    """
    known = by in _draws
    if known and not _draws[by]:
        yield
        return
    states, draws = _states(device), _Draws()
    try:
        with draws:
            yield
        _draws[by] = known or draws.seen
    finally:
        if draws.seen:
            for set_, state in states:
                set_(state)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether this thread draws from a global generator."""

    supports_higher_order_operators = True  # `torch.cond` and its kind

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # An operator of a higher order has none; what it runs comes here, too.
        self.seen |= torch.Tag.nondeterministic_seeded in getattr(
            func, "tags", ()
        ) and _draws_globally(func._schema.arguments, args, kwargs)
        return func(*args, **kwargs)


def _draws_globally(parameters: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    values = defaults | given
    # Attention could draw for its dropout.
    return values.get("generator") is None and values.get("dropout_p") != 0


def _states(device: torch.device) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """Random states, each with what sets it."""
    states: list[tuple[Callable[[Tensor], None], Tensor]] = []
    states.append((torch.set_rng_state, torch.get_rng_state()))
    if device.type not in ("cpu", "meta"):
        backend = torch.get_device_module(device)
        states.append((partial(_set_on, backend, device), backend.get_rng_state(device)))
    return states


def _set_on(backend: ModuleType, device: torch.device, state: Tensor) -> None:
    backend.set_rng_state(state, device)
