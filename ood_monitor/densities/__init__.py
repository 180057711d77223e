r"""Densities of log squared gradient norms: how unusual is a sample's gradient, over all layers?

Features are :math:`v_l = \log f_l(x)`, an array (N, F). A score is higher for the more anomalous.
With mean mu, standard deviations sd and :math:`z_l = (v_l - \mu_l) / sd_l`:

- :class:`~ood_monitor.DiagonalGaussian`, the paper's: :math:`-\sum_l \log N(v_l; \mu_l, sd_l^2)`;
- :class:`~ood_monitor.ShrunkGaussian`: :math:`-\log N(v; \mu, \Sigma)` with a covariance half-way
  between that and the layers' correlations;
- :class:`~ood_monitor.TermsAndNorms`, the default: that, and a :class:`GaussianMixture` of the
  values of the likelihood's terms, each standardised, by a smooth maximum;
- :class:`~ood_monitor.Maximum`: the larger of two log distances, under independent layers and
  under Ledoit and Wolf's covariance, each standardised.

:class:`StudentT`, :class:`FisherCombination` and :class:`PrincipalGaussian` are their relatives.
"""

from collections.abc import Callable

from ood_monitor.densities.base import Array, Density
from ood_monitor.densities.gaussian import PrincipalGaussian, Shrinkage, ShrunkGaussian
from ood_monitor.densities.independent import DiagonalGaussian, FisherCombination, StudentT
from ood_monitor.densities.maximum import Maximum
from ood_monitor.densities.mixture import GaussianMixture
from ood_monitor.densities.one_sided import OneSided
from ood_monitor.densities.terms import TermsAndNorms

__all__ = [
    "DENSITIES",
    "Array",
    "Density",
    "DiagonalGaussian",
    "FisherCombination",
    "GaussianMixture",
    "Maximum",
    "OneSided",
    "PrincipalGaussian",
    "Shrinkage",
    "ShrunkGaussian",
    "StudentT",
    "TermsAndNorms",
]

#: The densities by the name that a saved detector carries.
DENSITIES: dict[str, Callable[[], Density]] = {
    "DiagonalGaussian": DiagonalGaussian,
    "FisherCombination": FisherCombination,
    "GaussianMixture": GaussianMixture,
    "Maximum": Maximum,
    "OneSided": OneSided,
    "PrincipalGaussian": PrincipalGaussian,
    "ShrunkGaussian": ShrunkGaussian,
    "StudentT": StudentT,
    "TermsAndNorms": TermsAndNorms,
}
