r"""The contract of :class:`~ood_monitor.Adapter` as a test to call on an adapter of your own.

Beyond what any adapter must keep, samples drawn from the model show whether its log-likelihood is
in nats and normalised. For them the expected gradient is zero, and along directions v

.. math:: E[(v^\top \nabla \log p)^2] = -E[v^\top \nabla^2 \log p \, v]

(Bartlett's identities): a factor c, such as bits instead of nats or a mean instead of a sum, enters
the left side as c squared and the right one as c. Where a term comes by element, what the model is
said to expect of it is that on average over its samples.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ood_monitor.adapters import SequenceLikelihood
from ood_monitor.adapters.base import (
    Adapter,
    Batch,
    batch_size,
    checked_elements,
    checked_terms,
    cpu_generator,
    map_tensors,
    pieces,
    tensors_in,
    term_values,
)
from ood_monitor.adapters.elements import Elements, resolved, total_of
from ood_monitor.adapters.fields import without_ignored
from ood_monitor.calibration.promise import FlaggedShare, flagged_interval, flagged_share
from ood_monitor.gradients import gradient_norms
from ood_monitor.gradients.check import disagreeing
from ood_monitor.modules import leaf_parameters, precision_of, scoring_in_place

__all__ = ["FlaggedShare", "check_adapter", "flagged_interval", "flagged_share"]

#: Random directions and parts of the samples over which the identities are averaged, and the
#: t-value that refutes them: of true ones, less than one in 1 000 is refused.
_DIRECTIONS, _PARTS, _T = 16, 20, 4.0

#: Samples whose gradient norms are computed alone, too.
_ALONE = 8

#: A seed that no test is likely to have set.
_OTHER_SEED = 7_046_029_254_386_353_131

#: Columns of padding that are added on a side.
_COLUMNS = 3

_NOISE = (
    "Noise must come from a generator of the adapter's own with a fixed seed, of the shape of one "
    "sample."
)
_PADDING = (
    "The model sees padding, as one that is not autoregressive does without an `attention_mask`; "
    "or padding by the end token ended a text that was without, which `padding_is_end=False` or a "
    "mask prevents."
)


def check_adapter(
    adapter: Adapter, batch: Batch, *, samples: Batch | None = None, progress: bool = True
) -> None:
    """Check that an adapter keeps what the gradient engine and the detector rest on.

    Its terms are finite and of shape (B,), the same each time, whatever the global random state, of
    each sample the same alone, in the batch and in another order, and the same by the structural
    copy of the model that scoring runs; some parameter has a gradient, all are finite, and their
    norms are the same alone and in the batch; and computing them leaves no trace in the model, the
    batch or the global random state. Elements add up to their term, and what they expect is finite
    and of their shape. Terms of a :class:`~ood_monitor.SequenceLikelihood` that tells padding from
    text, by ``padding`` or a mask, are the same with more padding on either side, or refused.

    Args:
        adapter: The adapter.
        batch: At least two different samples.
        samples: 1 000 or so samples drawn from the model itself, to check that the terms add up to
            its log-likelihood in nats, and that what elements expect is their expectation. Not for
            lower bounds, nor for models that cannot be differentiated twice.
        progress: Whether a bar shows how far the check of the samples is.

    Raises:
        AssertionError: What it does not keep, in words.
        ValueError: Fewer samples than that, a batch that the adapter refuses, or elements of the
            wrong shape or whose expectation is not finite.

    Example:
        >>> import ood_monitor as om
        >>> flow = om.models.Glow(channels=1, size=4, steps=1, hidden=4)
        >>> check_adapter(om.LogLikelihood(flow), torch.rand(3, 1, 4, 4))
    """
    batch = without_ignored(adapter, batch)
    if batch_size(batch) < 2:
        raise ValueError(f"Expected at least 2 samples, got {batch_size(batch)}.")
    with scoring_in_place(adapter.module, adapter):
        with _no_trace(adapter, batch):
            terms = _terms(adapter, batch)
        _check_values(adapter, batch, terms)
        _check_elements(adapter, batch)
    _check_same("by the copy that scoring makes", terms, term_values(adapter, batch))
    _check_gradients(adapter, batch)
    if samples is not None:
        samples = without_ignored(adapter, samples)
        with scoring_in_place(adapter.module, adapter):
            _check_nats(adapter, samples, progress=progress)
            _check_expectations(adapter, samples, progress=progress)


def _terms(adapter: Adapter, batch: Batch) -> dict[str, Tensor]:
    return {term: value.detach() for term, value in checked_terms(adapter, batch)}


def _check_values(adapter: Adapter, batch: Batch, terms: dict[str, Tensor]) -> None:
    for term, value in terms.items():
        if not value.isfinite().all():
            raise AssertionError(f"Expected finite values of {term!r}, got {value.tolist()}.")
    with _other_random_state():
        _check_same("a second time", terms, _terms(adapter, batch))
    first = map_tensors(lambda tensor: tensor[:1], batch)
    _check_same("alone", _first(terms), _terms(adapter, first))
    backwards = map_tensors(lambda tensor: tensor.flip(0), batch)
    reversed_terms = {term: value.flip(0) for term, value in _terms(adapter, backwards).items()}
    _check_same("in another order", terms, reversed_terms)
    if isinstance(adapter, SequenceLikelihood) and adapter.padded_length(batch) is not None:
        _check_padding(adapter, batch, terms)


def _check_elements(adapter: Adapter, batch: Batch) -> None:
    """That elements add up to their term; what they expect is checked as it is asked for."""
    for term, value in checked_elements(adapter, batch):
        if not isinstance(value, Elements):
            continue
        found, total = total_of(value, value.log_prob.double()), value.total().double()
        rtol = 1e3 * torch.finfo(value.log_prob.dtype).eps
        size = total_of(value, value.log_prob.double().abs())
        if not (found - total).abs().le(rtol * size).all():
            raise AssertionError(
                f"Expected the elements of {term!r} to add up to it, got {found.tolist()} "
                f"instead of {total.tolist()}: leave `total` to `Elements`, and say by "
                "`counted=` and `mean=` what the term is."
            )
        _differences(value)


def _differences(value: Elements) -> dict[str, Tensor]:
    """What came less its expectation, by sample, (B,): of means zero over samples of the model."""
    found = {}
    if value.expected is not None:
        found["log_prob"] = value.log_prob.double() - resolved(value.expected).double()
    if value.quadratic is not None:
        came, expected = value.quadratic()
        found["quadratic"] = came.double() - expected.double()
    return {name: total_of(value, each) for name, each in found.items()}


def _check_expectations(adapter: Adapter, samples: Batch, *, progress: bool) -> None:
    """Check by a t-test over the samples that what each term expects is its mean."""
    parts_of = list(pieces(samples, max(1, batch_size(samples) // _PARTS)))
    parts: dict[tuple[str, str], list[Tensor]] = {}
    with torch.no_grad():
        for piece in tqdm(parts_of, desc="expectations", unit="part", disable=not progress):
            for term, value in checked_elements(adapter, piece):
                found = _differences(value) if isinstance(value, Elements) else {}
                for what, each in found.items():
                    parts.setdefault((term, what), []).append(each.cpu())
    for (term, what), values in parts.items():
        differences = torch.cat(values).numpy()
        if not abs(_t_value(differences)) < _T:
            expected = "`expected`" if what == "log_prob" else "the second of `quadratic`"
            raise AssertionError(
                f"Expected {expected} of {term!r} to be the mean of what comes, {what}, over the "
                f"model's samples, got a mean that is {differences.mean():.4g} beside it, "
                f"{abs(_t_value(differences)):.1f} standard errors: E_p[log p] is minus the "
                "entropy of the law that log_prob is of."
            )


def _check_padding(adapter: SequenceLikelihood, batch: Batch, terms: dict[str, Tensor]) -> None:
    for side in ("left", "right"):
        try:
            found = _terms(adapter.with_padding(**{side: _COLUMNS}), batch)
        except (ValueError, RuntimeError):
            continue  # refused, by the adapter or by a network of one width: no wrong value
        _check_same(f"with more padding on the {side}", terms, found, _PADDING)


def _first(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {term: value[:1] for term, value in terms.items()}


def _check_same(
    how: str, expected: dict[str, Tensor], found: dict[str, Tensor], cause: str = _NOISE
) -> None:
    if expected.keys() != found.keys():
        raise AssertionError(f"Expected terms {list(expected)} {how}, got {list(found)}.")
    for term, value in expected.items():
        rtol = 1e3 * torch.finfo(value.dtype).eps
        if not torch.allclose(found[term], value, rtol=rtol, atol=rtol * float(value.abs().max())):
            raise AssertionError(
                f"Expected {term!r} of a sample to be the same {how}, got {found[term].tolist()} "
                f"instead of {value.tolist()}. {cause}"
            )


def _check_gradients(adapter: Adapter, batch: Batch) -> None:
    norms = gradient_norms(adapter, batch)
    for name, value in norms.items():
        if not value.isfinite().all():
            raise AssertionError(f"Expected finite gradient norms of {name!r}, got {value}.")
    singles = [gradient_norms(adapter, single) for single in islice(pieces(batch, 1), _ALONE)]
    alone = {name: torch.cat([single[name] for single in singles]) for name in norms}
    dtypes = {name: precision_of(p).to_real() for name, p in adapter.module.named_parameters()}
    together = {name: value[: len(singles)] for name, value in norms.items()}
    wrong = disagreeing(together, alone, dtypes)
    if wrong:
        raise AssertionError(
            "Expected the gradient norms of a sample to be the same alone and in a batch, got "
            f"others for {sorted(wrong)}. Please report this, with the model: the fast path takes "
            "another's gradients for a sample's. Until then score samples one by one."
        )


@contextmanager
def _other_random_state() -> Iterator[None]:
    """Another global random state, without a draw: that would be taken for one of the adapter's."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(cpu_generator(_OTHER_SEED).get_state())
        yield


@contextmanager
def _no_trace(adapter: Adapter, batch: Batch) -> Iterator[None]:
    """Check that the block leaves all as it was."""
    before = _state(adapter, batch)
    yield
    after = _state(adapter, batch)
    changed = [name for name in before if not _equal(before[name], after.get(name))]
    if changed or before.keys() != after.keys():
        names = changed or sorted(before.keys() ^ after.keys())
        raise AssertionError(f"Expected terms to leave no trace, got a change of {names}.")


def _state(adapter: Adapter, batch: Batch) -> dict[str, Any]:
    module = adapter.module
    state: dict[str, Any] = {"the global random state": torch.get_rng_state()}
    state["Python's random state"] = random.getstate()
    state["NumPy's random state"] = str(np.random.get_state())
    for name, part in module.named_modules():
        hooks = (len(v) for k, v in vars(part).items() if k.endswith("_hooks"))
        state[f"{name}.hooks".lstrip(".")] = sum(hooks)
    state |= {f"batch[{i}]": tensor.clone() for i, tensor in enumerate(tensors_in(batch))}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        state[name] = tensor.detach().clone()
        state[f"{name}.grad"] = None if tensor.grad is None else tensor.grad.clone()
    return state | {f"{n}.training": m.training for n, m in module.named_modules()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return bool(a == b)


def _check_nats(adapter: Adapter, samples: Batch, *, progress: bool) -> None:
    """Check both identities by t-tests over parts of the samples."""
    size = batch_size(samples)
    if size < 20 * _PARTS:
        raise ValueError(f"Expected at least {20 * _PARTS} samples of the model, got {size}.")
    parts = list(pieces(samples, size // _PARTS))[:_PARTS]
    shown = tqdm(parts, desc="identities", unit="part", disable=not progress)
    slopes, squares, curvatures = np.stack([_along(adapter, part) for part in shown], -1)
    if not np.abs(_t_value(slopes)).max() < _T + 2:  # the largest of as many as directions
        raise AssertionError(
            "Expected a gradient of zero on average over the model's samples, got one that differs "
            f"by {np.abs(_t_value(slopes)).max():.1f} standard errors: this is not the "
            "log-likelihood of the model that was sampled."
        )
    if not abs(_t_value((squares + curvatures).mean(0))) < _T:
        raise AssertionError(
            "Expected E[(v . gradient)^2] = -E[v . Hessian . v], as of log-likelihoods in nats, "
            f"got {squares.mean():.4g} and {-curvatures.mean():.4g}: of log-likelihoods times a "
            f"factor of {squares.mean() / -curvatures.mean():.3g}."
        )


def _along(adapter: Adapter, samples: Batch) -> np.ndarray:
    """Means of v . gradient, of its square and of v . Hessian . v, shape (3, directions)."""
    with leaf_parameters(adapter.module) as named, sdpa_kernel(SDPBackend.MATH):
        leaves = list(named.values())
        weights = torch.ones(
            batch_size(samples), dtype=torch.float32, device="cpu", requires_grad=True
        )
        terms = checked_terms(adapter, samples)
        total = torch.stack([(value * weights.to(value)).sum() for _, value in terms]).sum()
        gradients = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        generator = cpu_generator(0)
        found = []
        for _ in range(_DIRECTIONS):
            v = [_standard_normal(p, generator) for p in leaves]
            # Of weighted samples' total, so that its derivative by a weight is that sample's own.
            (slope,) = torch.autograd.grad(_inner(gradients, v), weights, create_graph=True)
            twice = torch.autograd.grad(slope.sum(), leaves, retain_graph=True, allow_unused=True)
            curvature = _inner(twice, v) / len(weights)
            found.append([slope.mean().item(), slope.square().mean().item(), curvature.item()])
    return np.array(found).T


def _standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)


def _inner(gradients: Sequence[Tensor | None], direction: list[Tensor]) -> Tensor:
    pairs = zip(gradients, direction, strict=True)
    # Of complex numbers, the derivative along v is the real part of the product with conj(g).
    return torch.stack([(g.conj() * v).real.sum() for g, v in pairs if g is not None]).sum()


def _t_value(values: np.ndarray) -> np.ndarray:
    """Of means over the last dimension, which is that of the parts."""
    error = values.std(-1, ddof=1) / math.sqrt(values.shape[-1])
    return np.asarray(values.mean(-1) / (error + np.finfo(float).tiny))
