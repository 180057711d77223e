"""Where a copy of a module is not of the module's class, or needs a word more."""

import functools
from typing import Any, cast

from torch import nn

__all__ = ["Unwrapped", "renormalises", "settle", "wrapped_in"]

#: Wrappers of a module that do what a scoring pass must not (compile, synchronise), and where in
#: them the module is.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def wrapped_in(module: nn.Module) -> str | None:
    """The attribute in which a compiled or parallel module holds the module that it wraps."""
    name = _attribute_of_wrapper(cast(Any, type(module)))
    return name if name in module._modules else None


@functools.lru_cache(maxsize=1024)
def _attribute_of_wrapper(kind: Any) -> str | None:
    classes = (base.__name__ for base in kind.__mro__)
    return next((_WRAPPERS[name] for name in classes if name in _WRAPPERS), None)


def renormalises(module: nn.Module) -> bool:
    """Whether a forward pass renormalises the rows of the weight that it looks up, in place."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def settle(view: nn.Module) -> None:
    """What two kinds of layers need to be scored."""
    if isinstance(view, nn.RNNBase):
        # CUDA gives these no gradient in eval mode. In train mode they do the same, but dropout.
        vars(view).update(training=True, dropout=0.0)
    if renormalises(view):
        weight: Any = view.weight
        weight.data = weight.data.clone()


class Unwrapped(nn.Module):
    """Stands in for a wrapper: calls what it wraps, under the same names of parameters."""

    def __init__(self, inner: str) -> None:
        super().__init__()
        self._inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of what is wrapped."""
        inner: Any = self._modules[self._inner]
        return inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules[self._inner], name)
