"""What the callback watches: the model, as its options say."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, getattr_static
from typing import Any, TypeAlias

from torch import Tensor, nn

from ood_monitor import Adapter, Detector, LogLikelihood
from ood_monitor.adapters.base import Batch, Condition, describe, keywords_of, tensors_in
from ood_monitor.checks import function

__all__ = ["AdapterLike", "WatchedModel"]

#: An adapter, or a function `(module, x, **condition) -> (B,)` that gives log-likelihoods in nats.
AdapterLike: TypeAlias = Adapter | Callable[..., Tensor]

#: Methods of a module that :class:`~ood_monitor.LogLikelihood` calls, the first that is.
_METHODS = ("log_prob_elements", "log_prob_terms", "log_prob")


class WatchedModel:
    """Where the model of a module in training is, and which parts of a batch it takes.

    Args:
        adapter: The model: an :class:`~ood_monitor.Adapter`; a function
            ``(module, x, **condition) -> (B,)`` giving log-likelihoods in nats; or None for the
            module's own ``adapter()``, ``log_prob_terms`` or ``log_prob``.
        inputs: Takes the sample x, shape (B, ...), from a batch; by default the batch itself, or
            the first item of a list or tuple.
        condition: Gives the further keywords of the function or method from a batch, such as
            ``lambda batch: {"y": batch[1]}``.
        batch: Makes a batch of what the loader yields, before anything else sees it: of objects
            that are no tensors, lists, tuples, mappings or dataclasses of them.
        detector: A detector of the user's, whose adapter is the model.
        make: Makes an adapter of the module where none is given, or gives None where it cannot,
            before the module's own methods are asked for.

    Raises:
        ValueError: ``inputs`` or ``condition`` beside an adapter or a detector, which have their
            own, or ``adapter`` beside a detector.
        TypeError: An option of another type, or an adapter's class.
    """

    def __init__(
        self,
        adapter: AdapterLike | None = None,
        *,
        inputs: Callable[[Any], Tensor] | None = None,
        condition: Condition | None = None,
        batch: Callable[[Any], Batch] | None = None,
        detector: Detector | None = None,
        make: Callable[[nn.Module], Adapter | None] | None = None,
    ) -> None:
        self._make = make
        given = {"inputs": inputs, "condition": condition}
        self._options: dict[str, Any] = {
            k: function(k, v) for k, v in given.items() if v is not None
        }
        self._batch = None if batch is None else function("batch", batch)
        adapter = _checked(adapter)
        self._adapter = adapter if isinstance(adapter, Adapter) else None
        self._function = None if isinstance(adapter, Adapter) else adapter
        if detector is not None:
            self._refuse_beside("a detector", *([] if adapter is None else ["adapter"]))
            self._adapter = detector.adapter
        elif self._adapter is not None:
            self._refuse_beside(type(adapter).__name__)

    def prepared(self, batch: Any) -> Batch:
        """What the loader has yielded, as the model's batch.

        Raises:
            Exception: What ``batch=`` raises.
        """
        return batch if self._batch is None else self._batch(batch)

    def adapter_for(self, module: nn.Module) -> Adapter:
        """The module's model: the given adapter, `module.adapter()`, or its `log_prob`.

        Raises:
            ValueError: The module has no log-likelihood, its ``adapter()`` fails or gives none, or
                it has one and ``inputs`` or ``condition`` stand beside it.
        """
        if self._adapter is not None:
            return self._adapter
        if (own := self._factory(module)) is not None:
            self._refuse_beside(f"{type(module).__name__}.adapter()")
            return _made(module, own)
        makes = self._make if self._function is None else None
        if makes is not None and (made := makes(module)) is not None:
            self._refuse_beside(f"an adapter that is made of {type(module).__name__}")
            return made
        return LogLikelihood(module, self._function, **self._options)

    def check_batch(self, module: nn.Module, batch: Batch) -> None:
        """Refuse a first batch, as :meth:`prepared`, of which labels would be dropped in silence.

        It has several tensors, and the model can take more than the sample, but nobody said what.

        Raises:
            ValueError: It is one.
        """
        is_given = self._adapter is not None or self._factory(module) is not None
        count = len(tensors_in(batch)) if isinstance(batch, list | tuple) else 0
        if self._options or is_given or count < 2:
            return
        name, further = _further(module, self._function)
        if further:
            keyword = "y" if further[0].startswith("*") else further[0]
            raise ValueError(
                f"Expected `inputs=` or `condition=` where batches have {count} tensors and {name} "
                f"takes {', '.join(further)} beside x, got neither: give `condition=lambda batch: "
                f"{{{keyword!r}: batch[1]}}`, or `inputs=lambda batch: batch[0]` to "
                "say that x alone is meant."
            )

    def _factory(self, module: nn.Module) -> Callable[[], Any] | None:
        """The module's own ``adapter``, if it is a method or a function and no part of it."""
        is_property = isinstance(getattr_static(type(module), "adapter", None), property)
        if self._function is not None or is_property:
            return None
        own = getattr(module, "adapter", None)
        return own if inspect.isroutine(own) else None

    def _refuse_beside(self, what: str, *more: str) -> None:
        """Refuse options beside what has its own."""
        if found := [*more, *self._options]:
            told = " and ".join(f"`{name}=`" for name in found)
            raise ValueError(
                f"Expected {told} or {what}, got both: it has its own, give them where it is made."
            )


def _checked(adapter: AdapterLike | None) -> AdapterLike | None:
    if isinstance(adapter, type):
        raise TypeError(
            f"Expected adapter as an adapter or a function, got the class {adapter.__name__}: "
            f"make one, `{adapter.__name__}(module)`, or let the module's own `adapter()` "
            "make it."
        )
    if isinstance(adapter, nn.Module):
        raise TypeError(
            f"Expected adapter as an adapter or a function, got the module "
            f"{type(adapter).__name__}: give an adapter of it, such as `LogLikelihood(module)`."
        )
    is_checked = adapter is None or isinstance(adapter, Adapter)
    return adapter if is_checked else function("adapter", adapter)


def _made(module: nn.Module, own: Callable[[], Any]) -> Adapter:
    name = f"{type(module).__name__}.adapter()"
    try:
        found = own()
    except Exception as error:  # of any kind: it is the user's code
        raise ValueError(
            f"Expected {name} to give an adapter, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Adapter):
        got = f"the class {found.__name__}" if isinstance(found, type) else describe(found)
        raise ValueError(f"Expected {name} to give an adapter, `ood_monitor.Adapter`, got {got}.")
    return found


def _further(module: nn.Module, given: Callable[..., Any] | None) -> tuple[str, list[str]]:
    """What is called, in words, and what it takes beside the sample."""
    if given is not None:
        return getattr(given, "__name__", "the function"), _beside(given, 2)
    name = next((name for name in _METHODS if callable(getattr(module, name, None))), None)
    if name is None:  # a flow of a library, which is read term by term
        return type(module).__name__, []
    return f"{type(module).__name__}.{name}", _beside(getattr(module, name), 1)


def _beside(called: Callable[..., Any], count: int) -> list[str]:
    """Names of what is taken beside the first so many parameters; none of compiled code."""
    parameters: Mapping[str, Parameter] = keywords_of(called) or {}
    marks: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}
    told = called.keywords if isinstance(called, partial) else {}
    names = [name for name in [*parameters][count:] if name not in told]
    return [f"{marks.get(parameters[name].kind, '')}{name}" for name in names]
