r"""Densities of log squared gradient norms: how unusual is a sample's gradient, over all layers?

Features are :math:`v_l = \log f_l(x)`, an array (N, F). A score is higher for the more anomalous.
With mean mu, standard deviations sd and :math:`z_l = (v_l - \mu_l) / sd_l`:

- :class:`DiagonalGaussian`, the paper's: :math:`-\sum_l \log N(v_l; \mu_l, sd_l^2)`;
- :class:`ShrunkGaussian`: :math:`-\log N(v; \mu, \Sigma)` with a shrunk covariance, for layers that
  are correlated, as they are in a UNet (measured: .62 on average);
- :class:`Maximum`: the larger of both log distances, each standardised. No single density wins
  on every model; the maximum is near the best on each. It is the default.

:class:`StudentT`, :class:`FisherCombination` and :class:`PrincipalGaussian` are their relatives.
"""

from collections.abc import Callable

from ood_monitor.densities.base import Array, Density
from ood_monitor.densities.gaussian import PrincipalGaussian, Shrinkage, ShrunkGaussian
from ood_monitor.densities.independent import DiagonalGaussian, FisherCombination, StudentT
from ood_monitor.densities.maximum import Maximum

__all__ = [
    "DENSITIES",
    "Array",
    "Density",
    "DiagonalGaussian",
    "FisherCombination",
    "Maximum",
    "PrincipalGaussian",
    "Shrinkage",
    "ShrunkGaussian",
    "StudentT",
]

#: The densities by the name that a saved detector carries.
DENSITIES: dict[str, Callable[[], Density]] = {
    "DiagonalGaussian": DiagonalGaussian,
    "FisherCombination": FisherCombination,
    "Maximum": Maximum,
    "PrincipalGaussian": PrincipalGaussian,
    "ShrunkGaussian": ShrunkGaussian,
    "StudentT": StudentT,
}
