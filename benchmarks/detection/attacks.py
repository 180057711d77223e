"""Inputs moved a little, by the model's own gradient, to where it finds them more or less likely.

Every value moves by epsilon at most (the L-infinity ball), so that an image looks much as it did.
This moves the score of a detector that looks at the likelihood alone; what it does to one of
gradients is to be measured. Moved values are not rounded to 256 levels.

References:
    Explaining and harnessing adversarial examples (Goodfellow, Shlens, Szegedy, 2015),
    https://arxiv.org/abs/1412.6572, for one step along the gradient's sign;
    Towards deep learning models resistant to adversarial attacks (Madry et al., 2018),
    https://arxiv.org/abs/1706.06083, for many, each projected back into the ball.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

import ood_monitor as om
from ood_monitor.adapters.base import checked_range, checked_terms
from ood_monitor.modules import Passes, scored

#: Whether the log-likelihood is to rise, 1, or to fall, -1.
Sign: TypeAlias = Literal[1, -1]

Range: TypeAlias = tuple[float, float]


def fgsm(
    adapter: om.Adapter,
    batch: Tensor,
    epsilon: float,
    *,
    sign: Sign,
    value_range: Range = (0.0, 1.0),
) -> Tensor:
    """One step of epsilon along the gradient's sign; as :func:`pgd` otherwise."""
    return pgd(adapter, batch, epsilon, 1, epsilon, sign=sign, value_range=value_range)


def pgd(
    adapter: om.Adapter,
    batch: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    *,
    sign: Sign,
    value_range: Range = (0.0, 1.0),
) -> Tensor:
    """Samples after steps along the gradient's sign, the first from the sample itself.

    There is no randomness but the adapter's own, which is seeded. The model is left as it was.

    Args:
        adapter: A model of samples that do not depend on each other.
        batch: Its input, floating-point, (B, ...), in ``value_range``.
        epsilon: How far each value may end from where it was, in units of the input.
        steps: How many.
        step_size: How far each value moves in a step, in units of the input.
        sign: 1 to raise the log-likelihood, the sum of the adapter's terms, or -1 to lower it.
        value_range: The smallest and the largest value of the input.

    Returns:
        As the batch, in ``value_range``.

    Raises:
        ValueError: The batch has values outside of ``value_range``.
    """
    clean = checked_range(batch.detach().clone(), *value_range, "an attack")
    low = (clean - epsilon).clamp(min=value_range[0])
    high = (clean + epsilon).clamp(max=value_range[1])

    def attacked(passes: Passes[om.Adapter]) -> Tensor:
        moved = clean
        for _ in range(steps):
            step = sign * step_size * input_gradient(passes.fresh(), moved).sign()
            moved = torch.clamp(moved + step, low, high)
        return moved

    return scored(attacked, adapter, adapter.module)


def input_gradient(adapter: om.Adapter, batch: Tensor) -> Tensor:
    """Of each sample's log-likelihood, in nats per unit of the input; shape of the batch."""
    x = batch.detach().requires_grad_()
    total = torch.stack([value.sum() for _, value in checked_terms(adapter, x)]).sum()
    return torch.autograd.grad(total, x)[0]
