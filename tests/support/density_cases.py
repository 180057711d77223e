"""Every density, and the kinds of log squared norms that it must cope with."""

from collections.abc import Callable

import numpy as np

from ood_monitor.densities import (
    Array,
    Density,
    DiagonalGaussian,
    FisherCombination,
    GaussianMixture,
    Maximum,
    OneSided,
    PrincipalGaussian,
    ShrunkGaussian,
    StudentT,
    TermsAndNorms,
)

#: Of what is no norm: values, and a likelihood that is anomalous below alone.
OF_VALUES: dict[str, Callable[[], Density]] = {
    "GaussianMixture": GaussianMixture,
    "OneSided": OneSided,
}

#: A density is added to all contract checks by a line here.
DENSITIES: dict[str, Callable[[], Density]] = {
    "DiagonalGaussian": DiagonalGaussian,
    "StudentT": StudentT,
    "FisherCombination": FisherCombination,
    "ShrunkGaussian": ShrunkGaussian,
    "ShrunkGaussian-oas": lambda: ShrunkGaussian("oas"),
    "ShrunkGaussian-leave-one-out": lambda: ShrunkGaussian("leave_one_out"),
    "ShrunkGaussian-ledoit-wolf": lambda: ShrunkGaussian("ledoit_wolf"),
    "PrincipalGaussian": PrincipalGaussian,
    "PrincipalGaussian-half": lambda: PrincipalGaussian(0.5),
    "StudentT-light": lambda: StudentT(5.0),
    "Maximum": Maximum,
    "Maximum-3": lambda: Maximum(folds=3),
    "TermsAndNorms": TermsAndNorms,
    **OF_VALUES,
}


def independent(n: int, seed: int = 0, width: int = 6) -> Array:
    """Independent, each of a mean and a scale of its own."""
    z = np.random.default_rng(seed).normal(size=(n, width))
    return z * np.linspace(0.2, 3.0, width) + np.linspace(-20.0, 10.0, width)


def correlated(n: int, seed: int = 0) -> Array:
    """All layers move with the sample's overall gradient, as in a UNet."""
    return independent(n, seed) + np.random.default_rng(seed + 1000).normal(size=(n, 1))


def wide(n: int, seed: int = 0) -> Array:
    """More features than samples."""
    return independent(n, seed, width=60)


def single(n: int, seed: int = 0) -> Array:
    """One layer."""
    return independent(n, seed, width=1)


#: (N, F) features by kind, given N and a seed.
FEATURES: dict[str, Callable[..., Array]] = {
    "independent": independent,
    "correlated": correlated,
    "wide": wide,
    "single": single,
}
