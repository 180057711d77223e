"""What a model is given while a Trainer evaluates, of which its callbacks are told nothing."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import nn

__all__ = ["Tap"]


class Tap:
    """Hooks on a model, which tell what each pass in eval mode is given by keywords, and gives.

    It is no part of the model: copies of the model, and what is pickled of it, tell nobody.

    Args:
        tell: Is given the keywords of a pass; it is held weakly, as a bound method.
        tell_end: Is given what it gives; likewise.
    """

    def __init__(
        self,
        tell: Callable[[Mapping[str, Any]], None] | None = None,
        tell_end: Callable[[Any], None] | None = None,
    ) -> None:
        self._tell = None if tell is None else weakref.WeakMethod(tell)
        self._tell_end = None if tell_end is None else weakref.WeakMethod(tell_end)
        self._handles: list[Any] = []
        self._on: weakref.ref[nn.Module] | None = None

    def attach(self, module: nn.Module) -> None:
        """Put it on a module, and take it off any other."""
        if self._on is not None and self._on() is module:
            return
        self.detach()
        self._handles = [
            module.register_forward_pre_hook(self, with_kwargs=True),
            module.register_forward_hook(self.ended, always_call=True),
        ]
        self._on = weakref.ref(module)

    def detach(self) -> None:
        """Take it off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._on = [], None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Tell of a pass, if it is one of the module itself.

        There are no keywords where it was taken off while the call had begun.
        """
        is_own = self._on is not None and self._on() is module
        tell = None if self._tell is None else self._tell()
        if kwargs is None or tell is None:
            return
        if is_own and not module.training and not args:
            tell(dict(kwargs))

    def ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Tell of the end of a pass, of which there was told, also if it has failed."""
        is_own = self._on is not None and self._on() is module
        tell = None if self._tell_end is None else self._tell_end()
        if tell is not None and is_own and not module.training and not args:
            tell(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of a copied model: one that tells nobody."""
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Of a pickled model: likewise."""
        return type(self), ()
