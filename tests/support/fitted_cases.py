"""Adapters of single precision with as much data as a detector asks for: `ADAPTERS`."""

import functools
from collections.abc import Callable
from typing import Any

import torch

import ood_monitor as om
from ood_monitor.adapters.base import Batch, pieces
from support.diffusers_cases import FAMILIES
from support.foreign_cases import Autoencoder, gpt2_model
from support.model_case import perturbed

__all__ = ["ADAPTERS", "adapter_of", "batch_of", "fitted"]


def adapter_of(name: str) -> om.Adapter:
    """In single precision, with the same weights each time."""
    torch.manual_seed(0)
    adapter = ADAPTERS[name][0]()
    perturbed(adapter.module)
    adapter.module.eval()
    return adapter


def batch_of(name: str, n: int, seed: int) -> Batch:
    torch.manual_seed(seed)
    return ADAPTERS[name][1](n)


families = {family.name: family for family in FAMILIES}
ADAPTERS: dict[str, tuple[Callable[[], om.Adapter], Callable[[int], Any]]] = {
    **{
        name: (
            lambda family=families[name]: family.adapter(family.network(), levels=[50, 500]),
            families[name].batch,
        )
        for name in ("ddpm", "dit", "flux")
    },
    "glow": (
        lambda: om.LogLikelihood(om.models.Glow(channels=1, size=4, steps=2, hidden=8), bins=256),
        lambda n: torch.rand(n, 1, 4, 4),
    ),
    "vae": (
        lambda: om.ELBO(Autoencoder(), draws=4, importance_weighted=True),
        lambda n: torch.rand(n, 6),
    ),
    "gpt2": (
        lambda: om.SequenceLikelihood(gpt2_model(), padding=0),
        lambda n: torch.randint(1, 11, (n, 7)),
    ),
}


@functools.cache
def fitted(name: str) -> om.Detector:
    """One for all tests, which leave it as it is."""
    held_out = pieces(batch_of(name, 80, seed=1), 40)
    return om.Detector(adapter_of(name), explain=8).fit(held_out, progress=False)
