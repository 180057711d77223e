"""Models of other packages, each under an adapter: whose norms are held, and what they cost."""

from benchmarks.foreign import autoencoders, dynamics, flows, language, own, series
from benchmarks.foreign.case import Foreign

__all__ = ["FOREIGN", "Foreign"]

#: The list. Modules import a package where a case is made, so that any of them may be absent.
FOREIGN: tuple[Foreign, ...] = (
    *flows.CASES,
    *own.CASES,
    *autoencoders.CASES,
    *language.CASES,
    *series.CASES,
    *dynamics.CASES,
)
