"""What a model has computed from its weights and kept between calls, thrown away in a view of it.

A layer may keep a weight that it has computed (nflows' linear maps, say) while it is in eval mode.
A pass that takes it from there gives the parameters behind it no gradient. Such layers let go of it
in train mode, which they learn by an override of `train`. Others write into their weights there
(loralib merges adapters), so what it does is seen first on a view with weights of its own.
"""

import torch
from torch import Tensor, nn

from ood_monitor.modules.substitutes import settle

__all__ = ["overrides_train", "renew", "renew_if_harmless"]


def overrides_train(module: nn.Module) -> bool:
    """Whether a change of mode is more than a flag for a part of the module."""
    return any(
        type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval
        for m in module.modules()
    )


def renew(view: nn.Module) -> None:
    """Into train mode and back, as its user would; every flag then says eval mode."""
    view.train()
    view.eval()
    for module in view.modules():
        module.training = False
        settle(module)


def renew_if_harmless(view: nn.Module, module: nn.Module) -> bool:
    """Renew a view that has tensors of its own, and tell whether all are as the module's still.

    In between, too: averaged weights that are put in by eval mode are out again at the end.
    """
    try:
        view.train()
        as_they_were = _are_equal(view, module)
        renew(view)
    except Exception:  # whatever it needs of a training that is none
        return False
    return as_they_were and _are_equal(view, module)


def _are_equal(view: nn.Module, module: nn.Module) -> bool:
    """Whether weights are the same, and buffers that are still there: one may be a cache."""
    buffers, theirs = dict(view.named_buffers()), dict(module.named_buffers())
    pairs: list[tuple[Tensor, Tensor]] = [*zip(module.parameters(), view.parameters(), strict=True)]
    pairs += [(theirs[name], own) for name, own in buffers.items() if name in theirs]
    return all(p.is_meta or torch.equal(p.detach(), own.detach()) for p, own in pairs)
