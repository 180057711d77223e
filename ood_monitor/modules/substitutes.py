"""Where a copy of a module is not of the module's class, or needs a word more."""

import functools
from typing import Any, cast

from torch import nn

__all__ = ["Unwrapped", "renormalises", "settle", "takes_train_mode", "wrapped_in"]

#: Wrappers of a module that do what a scoring pass must not (compile, synchronise), and where in
#: them the module is.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


#: Forward passes of PyTorch's recurrent layers.
_RECURRENT = frozenset(kind.forward for kind in (nn.RNN, nn.LSTM, nn.GRU))


def wrapped_in(module: nn.Module) -> str | None:
    """The attribute in which a compiled or parallel module holds the module that it wraps."""
    name = _attribute_of_wrapper(cast(Any, type(module)))
    return name if name in module._modules else None


@functools.lru_cache(maxsize=1024)
def _attribute_of_wrapper(kind: Any) -> str | None:
    wrapper = next((base for base in kind.__mro__ if base.__name__ in _WRAPPERS), None)
    # One with a forward pass of its own does more than wrap.
    return (
        None
        if wrapper is None or kind.forward is not wrapper.forward
        else _WRAPPERS[wrapper.__name__]
    )


def renormalises(module: nn.Module) -> bool:
    """Whether a forward pass renormalises the rows of the weight that it looks up, in place."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def takes_train_mode(module: nn.Module) -> bool:
    """Whether CUDA gives a layer no gradient in eval mode, while train mode is only dropout more.

    So it is of PyTorch's recurrent layers. Of one with a forward pass or hooks of its own nobody
    knows what else the mode means.
    """
    if not isinstance(module, nn.RNNBase) or type(module).forward not in _RECURRENT:
        return False
    return not module._forward_pre_hooks and any(p.is_cuda for p in module.parameters())


def settle(view: nn.Module) -> None:
    """What two kinds of layers need to be scored."""
    if takes_train_mode(view):
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
