"""What a model has computed from its weights and kept between calls, thrown away in a view of it.

A layer may keep a weight that it has computed (nflows' linear maps, say) while it is in eval mode.
A pass that takes it from there gives the parameters behind it no gradient. Such layers let go of it
in train mode, which they learn by an override of `train`. Others write into their weights there
(loralib merges adapters), so what it does is seen first on a view with weights of its own.
"""

import torch
from torch import nn

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
    """Renew a view that has weights of its own, and tell whether they are as the module's still."""
    try:
        renew(view)
    except Exception:  # whatever it needs of a training that is none
        return False
    pairs = zip(module.parameters(), view.parameters(), strict=True)
    return all(p.is_meta or torch.equal(p.detach(), own.detach()) for p, own in pairs)
