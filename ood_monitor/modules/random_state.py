"""The global random state, which scoring leaves as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["kept_random_state", "leaving_random_state"]

R = TypeVar("R")

#: Random states, each with what sets it.
_States: TypeAlias = list[tuple[Callable[[Tensor], None], Tensor]]

#: Whether what uses a model has ever drawn from a global generator.
_draws: WeakIdKeyDictionary = WeakIdKeyDictionary()


def leaving_random_state(run: Callable[[], R], device: torch.device, by: object) -> R:
    """What a function gives, with the random state of the CPU and of a device left as it was.

    To see each operation costs more than a small model's backward pass. So a first use is watched
    only where the random state has moved, and the function is called once more for that.

    Args:
        run: The function; it may be called a second time.
        device: The device beside the CPU.
        by: What draws.
    """
    if by in _draws:
        with kept_random_state(device, by):
            return run()
    before = _states(device)
    try:
        result = run()
        if _are(before, device):
            _draws[by] = False
            return result
        del result  # which may take as much memory as the one that comes
    except Exception:  # of any kind: what fails may have drawn before
        if _are(before, device):
            raise
    except BaseException:  # an interruption, after which nothing is called again
        _put_back(before)
        raise
    with kept_random_state(device, by, before):
        return run()


@contextmanager
def kept_random_state(
    device: torch.device, by: object, before: _States | None = None
) -> Iterator[None]:
    """The random state of the CPU and of a device as it was, if the block draws.

    What draws nothing on its first use is not looked at again: another thread's draws are its own,
    and never rolled back.

    Args:
        device: The device beside the CPU.
        by: What draws.
        before: What it is put back to; by default what it is.
    """
    known = by in _draws
    if known and not _draws[by]:
        yield
        return
    states, draws = before or _states(device), _Draws()
    try:
        with draws:
            yield
        _draws[by] = known or draws.seen
    finally:
        if draws.seen:
            _put_back(states)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether this thread draws from a global generator."""

    supports_higher_order_operators = True  # `torch.cond` and its kind

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: for that PyTorch would load its compiler, seconds of a process that compiles none."""
        return False

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
    generator = values.get("generator")
    owned = (torch.default_generator, *torch.cuda.default_generators)
    is_global = generator is None or any(generator is its for its in owned)
    # Attention could draw for its dropout.
    return is_global and values.get("dropout_p") != 0


def _put_back(states: _States) -> None:
    for set_, state in states:
        set_(state)


def _are(states: _States, device: torch.device) -> bool:
    """Whether the random states are these."""
    pairs = zip(states, _states(device), strict=True)
    return all(torch.equal(state, now) for (_, state), (_, now) in pairs)


def _states(device: torch.device) -> _States:
    states: _States = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type not in ("cpu", "meta"):
        backend = torch.get_device_module(device)
        states.append((partial(_set_on, backend, device), backend.get_rng_state(device)))
    return states


def _set_on(backend: ModuleType, device: torch.device, state: Tensor) -> None:
    backend.set_rng_state(state, device)
