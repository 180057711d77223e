"""Flows of other libraries, read term by term: each latent's log-density, the log-determinant.

A reader takes the module, a batch of samples and the module's further keywords, and gives
``{term: (B,)}`` in nats, which add up to the log-likelihood, or elements in the place of (B,).
Modules are known by what they have, so that no library is imported.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from ood_monitor.adapters.base import describe
from ood_monitor.adapters.elements import Elements
from ood_monitor.adapters.laws import gaussian, of_distribution

__all__ = ["Density", "density_of", "latents_and_log_det"]

#: A term: its values, shape (B,), or its elements.
Term: TypeAlias = Tensor | Elements

#: ``function(module, x, **condition)``, giving log p(x), shape (B,) or by element, its terms by
#: name, or the distribution of x.
Density: TypeAlias = Callable[..., Term | Distribution | Mapping[str, Term]]


def density_of(module: nn.Module) -> Density:
    """How to read a module's log-density, in terms where they can be told apart.

    Known are modules with ``log_prob_elements`` (:class:`ood_monitor.models.Glow`) or
    ``log_prob_terms``, a mapping of elements or of values of shape (B,), normflows'
    ``MultiscaleFlow`` and ``NormalizingFlow``, zuko's flows, and anything with ``log_prob``.

    Raises:
        ValueError: None of these.
    """
    if _has_elements(module):
        return _by_elements
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
        f"got {type(module).__name__}; give a function, `lambda module, x: ...`, that returns the "
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
        "Its parts may have been added up across samples: sum each over a sample's dimensions in "
        "the module, or give a function, `lambda module, x: ...`, of the log-likelihood, (B,)."
    )


def _check_elements(latents: list[Any], x: Tensor) -> None:
    """Refuse latents of other samples, or of more or fewer dimensions than x: no bijection's."""
    hold = all(isinstance(z, Tensor) and z.shape[:1] == x.shape[:1] for z in latents)
    if not hold or sum(z.numel() for z in latents) != x.numel():
        raise ValueError(
            f"Expected latents of {x[:1].numel()} elements a sample, as x of shape "
            f"{tuple(x.shape)} has, got {', '.join(map(describe, latents))}: give "
            "a function, `lambda module, x: ...`, for a model of another kind."
        )


def _has(module: Any, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _named(latents: list[Any]) -> dict[str, Any]:
    if len(latents) == 1:
        return {"latent": latents[0]}
    return {f"latent_{i}": latent for i, latent in enumerate(latents, 1)}


def _standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).reshape(len(z), -1).sum(1)


def _has_elements(module: nn.Module) -> bool:
    """Whether it has elements, which a subclass with terms of its own has not overridden."""
    if not callable(getattr(module, "log_prob_elements", None)):
        return False
    has = [(vars(kind).keys() & {"log_prob_elements", "log_prob_terms"}) for kind in _kinds(module)]
    nearest = next((names for names in has if names), {"log_prob_elements"})
    return "log_prob_elements" in nearest


def _kinds(module: nn.Module) -> tuple[Any, ...]:
    """The module itself, then its classes, in the order in which an attribute is looked for."""
    return (module, *type(module).__mro__)


def _by_elements(module: Any, x: Tensor, **condition: Any) -> Mapping[str, Term]:
    return module.log_prob_elements(x, **condition)  # type: ignore[no-any-return]


def _by_terms(module: Any, x: Tensor, **condition: Any) -> Mapping[str, Tensor]:
    return module.log_prob_terms(x, **condition)  # type: ignore[no-any-return]


def _by_log_prob(module: Any, x: Tensor, **condition: Any) -> Tensor:
    return module.log_prob(x, **condition)  # type: ignore[no-any-return]


def _normflows(module: Any, x: Tensor, **context: Any) -> dict[str, Term]:
    """Of a conditional flow ``context`` is the condition, (B, ...)."""
    # Added up here: the module adds into zeros of the process's default dtype, which rounds.
    log_det = x.new_zeros(len(x))
    for flow in reversed(module.flows):
        x, of_flow = flow.inverse(x, **context)
        log_det = log_det + of_flow.to(x)
    return {"latent": _normflows_latent(module.q0, x, **context), "log_det": log_det}


def _normflows_multiscale(module: Any, x: Tensor, y: Tensor | None = None) -> dict[str, Term]:
    """Of a class-conditional flow y, shape (B,), is the label; the top level is the last latent."""
    latents, log_det = module.inverse_and_log_det(x)
    label = (y,) if module.class_cond else ()
    levels = reversed(list(zip(module.q0, latents, strict=True)))
    values = [_normflows_latent(q0, z, *label) for q0, z in levels]
    return _named(values) | {"log_det": log_det}


def _normflows_latent(q0: Any, z: Tensor, *label: Any, **context: Any) -> Term:
    """By element under a Gaussian that differs between samples."""
    condition = [*label, *context.values()]
    moments = _moments(q0, *condition) if len(condition) == 1 else None
    if moments is None:
        return q0.log_prob(z, *label, **context)  # type: ignore[no-any-return]
    mean, log_sd = moments
    temperature = getattr(q0, "temperature", None)
    return gaussian(z, mean, log_sd if temperature is None else log_sd + math.log(temperature))


def _moments(q0: Any, condition: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and log standard deviation of normflows' conditional Gaussians, or None for another."""
    if _has(q0, "context_encoder", "shape", "d"):
        encoded = q0.context_encoder(condition)
        return encoded.tensor_split([encoded.shape[-1] // 2], -1)  # type: ignore[no-any-return]
    classes = getattr(q0, "num_classes", None)
    if not classes or not _has(q0, "loc", "log_scale"):
        return None
    one_hot = condition
    if condition.ndim == 1:
        one_hot = q0.loc.new_zeros(len(condition), classes).scatter(1, condition[:, None], 1)
    if _has(q0, "loc_cc", "log_scale_cc", "logscale_factor"):

        def of_channels(shared: Tensor, logs: Tensor, of_class: Tensor) -> Tensor:
            each = (one_hot @ of_class).view(len(one_hot), -1, *[1] * (shared.ndim - 2))
            return shared * torch.exp(logs * q0.logscale_factor) + each

        mean = of_channels(q0.loc, q0.loc_logs, q0.loc_cc)
        return mean, of_channels(q0.log_scale, q0.log_scale_logs, q0.log_scale_cc)
    if q0.loc.shape[-1] == q0.log_scale.shape[-1] == classes and _has(q0, "perm"):
        mean, log_sd = (part @ one_hot.t() for part in (q0.loc, q0.log_scale))
        return mean.permute(*q0.perm), log_sd.permute(*q0.perm)
    return None


def _zuko(module: Any, x: Tensor, c: Tensor | None = None) -> dict[str, Term]:
    """C is the context, shape (B, C). Of rows of a table, elements are its columns."""
    flow = module(c)
    is_shared = _has_shared_base(module, c)
    if (columns := _columns(flow, x)) is not None:
        z, log_det = columns
        return {"latent": of_distribution(flow.base, z, is_shared=is_shared), "log_det": log_det}
    z, log_det = flow.transform.call_and_ladj(x)
    # A transform of single numbers leaves the sum over them to be taken.
    log_det = log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det
    latent = flow.base.log_prob(z) if is_shared else of_distribution(flow.base, z)
    return {"latent": latent, "log_det": log_det}


def _has_shared_base(module: Any, c: Tensor | None) -> bool:
    """Whether the base is the same for all samples: it has no dimension of theirs."""
    with torch.no_grad():  # seen before the flow expands it to the context's samples
        base = module.base(c)
    return not isinstance(base, Distribution) or not base.batch_shape


def _columns(flow: Any, x: Tensor) -> tuple[Tensor, Elements] | None:
    """Latents and log-derivatives by column of an autoregressive flow on (B, D), or None.

    Column i stays column i: each step maps it by a function of itself, given others.
    """
    base = flow.base
    if x.ndim != 2 or not isinstance(base, Independent) or base.reinterpreted_batch_ndims != 1:
        return None
    log_det = torch.zeros_like(x)
    for transform in getattr(flow.transform, "transforms", [flow.transform]):
        step = transform.meta(x) if _has(transform, "meta", "passes") else transform
        if getattr(step, "reinterpreted", None) == 1 and hasattr(step, "base"):
            step = step.base  # before it sums over the columns
        if getattr(getattr(step, "domain", None), "event_dim", None) != 0:
            return None
        x, of_step = step.call_and_ladj(x)
        log_det = log_det + of_step
    return x, Elements(log_det)
