"""The fast path compared with the loop, on first use of a model."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ood_monitor.adapters.base import Adapter, Batch, batch_size, pieces
from ood_monitor.gradients.fast import recorded_norms, recorded_rows
from ood_monitor.gradients.layers import supported
from ood_monitor.gradients.loop import loop_norms
from ood_monitor.modules import Passes, precision_of

__all__ = ["Facts", "facts_of"]

#: Relative difference up to which the fast path and the loop agree. Through a deep flow (96 steps)
#: the loop itself is off by 2e-3 in single precision.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
_TOLERANCE_IN_HALF = 0.3


@dataclass(frozen=True)
class Facts:
    """What the first use of a model found.

    Attributes:
        looped: Parameters that only the loop gets right.
        last_of_graph: Terms after which no other needs the graph of their forward pass.
        at_once: Whether the adapter's one pass for all terms gives what its passes give.
    """

    looped: frozenset[str]
    last_of_graph: frozenset[str]
    at_once: bool = False


#: By adapter: found on two gradients, and on one, which does not show what samples do to others.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
_known_of_one: WeakIdKeyDictionary = WeakIdKeyDictionary()


def facts_of(passes: Passes[Adapter], batch: Batch, group: int) -> Facts:
    """Compare the fast path with the loop on two samples, once per adapter; on one until two come.

    Raises:
        ValueError: A sample's value depends on its batch, or no parameter gets a gradient.
    """
    adapter, n = passes.holder, min(2, batch_size(batch) // group)
    for found in (_known,) if n > 1 else (_known, _known_of_one):
        if adapter in found:
            known: Facts = found[adapter]
            return known
    chosen = supported(adapter.module)
    parameters = adapter.module.named_parameters()
    dtypes = {name: precision_of(p) for name, p in parameters if name in chosen}
    probe, every = next(iter(pieces(batch, n * group))), chosen.__contains__
    fast = recorded_norms(passes, probe, n, every, by_row=True)
    values, exact = loop_norms(passes, probe, n, every)
    _check_independence(adapter, fast.log_likelihood, values, set(dtypes.values()))
    if not any(rows.any() for rows in exact.values()):
        raise ValueError(
            f"Expected the terms of {type(adapter).__name__} to depend on the parameters of "
            f"{type(adapter.module).__name__}, got no gradient for any of them."
        )
    wrong = _disagreeing(fast.norms, exact, dtypes) - fast.left_over
    if wrong:
        warnings.warn(
            f"The fast path disagrees with the loop over samples for {sorted(wrong)}; these "
            "parameters are scored by the loop: exact, but slower.",
            stacklevel=4,
        )
    looped = frozenset(wrong | fast.left_over)
    at_once = _gives_the_same(passes.fresh(), probe, n, values, exact, dtypes, looped)
    facts = Facts(looped, fast.last_of_graph, at_once)
    (_known if n > 1 else _known_of_one)[adapter] = facts
    return facts


def _check_independence(
    adapter: Adapter,
    together: dict[str, Tensor],
    alone: dict[str, Tensor],
    dtypes: set[torch.dtype],
) -> None:
    rtol = max(1e-4, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
    for term, values in together.items():
        if not values.isfinite().all():
            raise ValueError(
                f"Expected the term {term!r} to be finite, got {values.tolist()} for the first "
                "samples."
            )
        if not torch.allclose(
            values, alone[term], rtol=rtol, atol=rtol * float(values.abs().max())
        ):
            raise ValueError(
                f"Expected the term {term!r} of a sample to be the same alone and in a batch, got "
                f"{alone[term].tolist()} alone and {values.tolist()} together: the model mixes "
                f"samples or draws random numbers that {type(adapter).__name__} does not fix."
            )


def _gives_the_same(
    adapter: Adapter,
    probe: Batch,
    n: int,
    values: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    looped: frozenset[str],
) -> bool:
    """Whether all terms can be had by one pass, for the parameters that the loop does not take."""
    one = adapter.one_pass(probe)
    if one is None or one.terms != tuple(values):
        return False
    rest = dtypes.keys() - looped
    found = recorded_rows(adapter.module, one, n, rest.__contains__, by_row=True)
    try:
        _check_independence(adapter, found.log_likelihood, values, set(dtypes.values()))
    except ValueError:  # a network that looks at the time of its first row, say
        return False
    exact = {key: rows for key, rows in exact.items() if key.split("/", 1)[1] in rest}
    return not found.left_over and not _disagreeing(found.norms, exact, dtypes)


def _disagreeing(
    fast: dict[str, Tensor], exact: dict[str, Tensor], dtypes: dict[str, torch.dtype]
) -> set[str]:
    """Parameters with a norm that differs by more than rounding."""
    largest: dict[str, float] = {}
    for key, rows in exact.items():
        term = key.split("/", 1)[0]
        largest[term] = max(largest.get(term, 0.0), float(rows.sum(1).max()))
    wrong = set()
    for key, rows in exact.items():
        term, name = key.split("/", 1)
        # Below this a norm is rounding noise (a key bias before a softmax), whoever computes it.
        eps = torch.finfo(dtypes[name]).eps
        noise = largest[term] * ((32 if eps < 1e-6 else 8) * eps) ** 2
        rtol = _TOLERANCES.get(dtypes[name], _TOLERANCE_IN_HALF)
        if not torch.allclose(fast[key].sum(1), rows.sum(1), rtol=rtol, atol=noise):
            wrong.add(name)
    return wrong
