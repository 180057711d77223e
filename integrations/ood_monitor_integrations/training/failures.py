"""What goes wrong in a monitor is counted and warned of once, and never raised into a loop."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Failures"]


class Failures:
    """Counts what went wrong by kind, and warns of the first of each.

    Args:
        name: Who has them, in the warnings.

    Attributes:
        name: Likewise.
        counts: How often each kind went wrong.
    """

    def __init__(self, name: str) -> None:
        self.counts: Counter[str] = Counter()
        self.name = name

    def tell(self, kind: str, cause: object) -> None:
        """Count one, and warn if it is the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            warnings.warn(f"{self.name} {kind}: {cause}", stacklevel=3)

    def refuse(self, kind: str, error: Exception, *, strict: bool) -> None:
        """Raise what stands in the way of watching, or where not strict tell of it.

        Raises:
            ValueError: Strict; it says who refuses.
        """
        told = f"{kind}: {type(error).__name__}"
        if strict:
            raise ValueError(f"{self.name} {told}: {error}") from error
        self.tell(told, error)

    @contextmanager
    def contained(self, kind: str) -> Iterator[None]:
        """Count an exception and go on: days of training must not end on a monitor's account."""
        try:
            yield
        except Exception as error:  # whatever a foreign model, logger or file system raises
            self.tell(kind, error)
