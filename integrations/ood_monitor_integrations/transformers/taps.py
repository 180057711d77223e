"""What a model is given while a Trainer evaluates, of which its callbacks are told nothing."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import nn

__all__ = ["Tap"]


class Tap:
    """A hook on a model, which tells what each pass in eval mode is given by keywords.

    It is no part of the model: copies of the model, and what is pickled of it, tell nobody.

    Args:
        tell: Is given the keywords of a pass; it is held weakly, as a bound method.
    """

    def __init__(self, tell: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self._tell = None if tell is None else weakref.WeakMethod(tell)
        self._handle: Any = None
        self._on: weakref.ref[nn.Module] | None = None

    def attach(self, module: nn.Module) -> None:
        """Put it on a module, and take it off any other."""
        if self._on is not None and self._on() is module:
            return
        self.detach()
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)
        self._on = weakref.ref(module)

    def detach(self) -> None:
        """Take it off."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._on = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell of a pass, if it is one of the module itself."""
        is_own = self._on is not None and self._on() is module
        tell = None if self._tell is None else self._tell()
        if tell is not None and is_own and not module.training and not args:
            tell(dict(kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of a copied model: one that tells nobody."""
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Of a pickled model: likewise."""
        return type(self), ()
