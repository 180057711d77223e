"""A model without what accelerate has put around its forward."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

__all__ = ["plain_forward"]


@contextmanager
def plain_forward(module: nn.Module) -> Iterator[None]:
    """A model without the mixed precision that accelerate has put around their forward.

    It is bound to the model itself, which a copy for scoring would then run; and a detector that
    was fitted with it would find other scores in the model once it is saved and loaded.
    """
    with ExitStack() as stack:
        for own in map(vars, module.modules()):
            if "_original_forward" in own and "forward" in own:
                stack.callback(own.__setitem__, "forward", own.pop("forward"))
        yield
