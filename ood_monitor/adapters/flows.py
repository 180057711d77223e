"""Flows of other libraries, read term by term: each latent's log-density, the log-determinant.

A reader takes the module, a batch of samples and the module's further keywords, and gives
``{term: (B,)}`` in nats, which add up to the log-likelihood. Modules are known by what they have,
so that no library is imported.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from ood_monitor.adapters.base import describe

__all__ = ["Density", "density_of", "latents_and_log_det"]

#: ``function(module, x, **condition)``, giving log p(x), shape (B,), or its terms by name.
Density: TypeAlias = Callable[..., Tensor | Mapping[str, Tensor]]


def density_of(module: nn.Module) -> Density:
    """How to read a module's log-density, in terms where they can be told apart.

    Known are modules with ``log_prob_terms`` (:class:`ood_monitor.models.Glow`), normflows'
    ``MultiscaleFlow`` and ``NormalizingFlow``, zuko's flows, and anything with ``log_prob``.

    Raises:
        ValueError: None of these.
    """
    if callable(getattr(module, "log_prob_terms", None)):
        return _by_terms
    if _has(module, "q0", "flows", "merges", "inverse_and_log_det"):
        return _normflows_multiscale
    if _has(module, "q0", "flows", "inverse_and_log_det"):
        return _normflows
    if callable(getattr(module, "log_prob", None)):
        return _by_log_prob
    if _has(module, "transform", "base"):
        return _zuko
    raise ValueError(
        "Expected a module with `log_prob` or `log_prob_terms`, or a flow of normflows or zuko, "
        f"got {type(module).__name__}; pass `function=lambda module, x: ...` that returns the "
        "log-likelihood, shape (B,)."
    )


def latents_and_log_det(module: nn.Module, x: Tensor, **condition: Any) -> dict[str, Tensor]:
    """Terms of a module that maps x to standard normal latents and gives (z, log-determinant).

    To pass as ``function=`` for flows as FrEIA's; z is a tensor or a list or tuple of them.

    Args:
        module: ``module(x, **condition)`` gives ``(z, log |det dz/dx|)``, the latter of shape (B,),
            or a number if it is the same for all samples. z has as many elements as x.
        x: Samples, shape (B, ...).
        **condition: The module's further keywords.

    Returns:
        ``latent`` (of several: ``latent_1``, ...) and ``log_det``, in nats.

    Raises:
        ValueError: The module gives something else: also a log-determinant of each pixel, (B, H,
            W), of which it cannot be told whether a step's of each sample was spread over it.

    References:
        Framework for Easily Invertible Architectures (Ardizzone et al., 2018-2022),
        https://github.com/vislearn/FrEIA, for the convention.
    """
    output = module(x, **condition)
    if not isinstance(output, list | tuple) or len(output) != 2:
        raise ValueError(f"Expected (z, log-determinant), got {describe(output)}.")
    z, log_det = output
    latents = list(z) if isinstance(z, list | tuple) else [z]
    log_det = _per_sample(log_det, x)
    _check_elements(latents, x)
    terms = {name: _standard_normal(z) for name, z in _named(latents).items()}
    return terms | {"log_det": log_det}


def _per_sample(log_det: Any, x: Tensor) -> Tensor:
    """The log-determinant, of shape (B,)."""
    if isinstance(log_det, int | float):  # as of steps that keep the volume
        return x.new_full((len(x),), log_det)
    if isinstance(log_det, Tensor) and log_det.shape in ((len(x),), (len(x), 1)):
        return log_det.reshape(len(x))
    raise ValueError(
        f"Expected a log-determinant of shape ({len(x)},), one a sample, got {describe(log_det)}. "
        "Its parts may have been added up across samples: sum each over a sample's dimensions, in "
        "the module or in a `function=lambda module, x: ...` that gives the log-likelihood, (B,)."
    )


def _check_elements(latents: list[Any], x: Tensor) -> None:
    """Refuse latents of other samples, or of more or fewer dimensions than x: no bijection's."""
    hold = all(isinstance(z, Tensor) and z.shape[:1] == x.shape[:1] for z in latents)
    if not hold or sum(z.numel() for z in latents) != x.numel():
        raise ValueError(
            f"Expected latents of {x[:1].numel()} elements a sample, as x of shape "
            f"{tuple(x.shape)} has, got {', '.join(map(describe, latents))}: pass "
            "`function=lambda module, x: ...` for a model of another kind."
        )


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _named(latents: list[Any]) -> dict[str, Any]:
    if len(latents) == 1:
        return {"latent": latents[0]}
    return {f"latent_{i}": latent for i, latent in enumerate(latents, 1)}


def _standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).reshape(len(z), -1).sum(1)


def _by_terms(module: Any, x: Tensor, **condition: Any) -> Mapping[str, Tensor]:
    return module.log_prob_terms(x, **condition)  # type: ignore[no-any-return]


def _by_log_prob(module: Any, x: Tensor, **condition: Any) -> Tensor:
    return module.log_prob(x, **condition)  # type: ignore[no-any-return]


def _normflows(module: Any, x: Tensor, **context: Any) -> dict[str, Tensor]:
    """Of a conditional flow ``context`` is the condition, (B, ...)."""
    # Added up here: the module adds into zeros of the process's default dtype, which rounds.
    log_det = x.new_zeros(len(x))
    for flow in reversed(module.flows):
        x, of_flow = flow.inverse(x, **context)
        log_det = log_det + of_flow.to(x)
    return {"latent": module.q0.log_prob(x, **context), "log_det": log_det}


def _normflows_multiscale(module: Any, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    """Of a class-conditional flow y, shape (B,), is the label; the top level is the last latent."""
    latents, log_det = module.inverse_and_log_det(x)
    label = (y,) if module.class_cond else ()
    levels = reversed(list(zip(module.q0, latents, strict=True)))
    values = [q0.log_prob(z, *label) for q0, z in levels]
    return _named(values) | {"log_det": log_det}


def _zuko(module: Any, x: Tensor, c: Tensor | None = None) -> dict[str, Tensor]:
    """C is the context, shape (B, C)."""
    flow = module(c)
    z, log_det = flow.transform.call_and_ladj(x)
    # A transform of single numbers leaves the sum over them to be taken.
    log_det = log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det
    return {"latent": flow.base.log_prob(z), "log_det": log_det}
