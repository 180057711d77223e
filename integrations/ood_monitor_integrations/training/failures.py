"""What goes wrong in a monitor is counted and warned of once, and never raised into a loop."""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

__all__ = ["CODES", "Failures", "Kind"]

#: What can go wrong, in words that follow the monitor's name.
Kind = Literal[
    "calibrates on the data that the model is trained on",
    "could not be calibrated",
    "could not draw an alert",
    "could not finish a stage",
    "could not hand over its detector",
    "could not look at a checkpoint",
    "could not number a batch",
    "could not put its detector into a checkpoint",
    "could not put scores beside a prediction",
    "could not put scores beside predictions",
    "could not reach MLflow",
    "could not reach a logger",
    "could not read the detector of a checkpoint",
    "could not resume its training stream",
    "could not score a batch",
    "could not score a training batch",
    "could not score samples",
    "could not take over its detector",
    "could not write an alert to a logger",
    "could not write its figures",
    "does not watch evaluations of the training",
    "does not watch the validation of `fit`",
    "has a detector that no checkpoint can hold",
    "has no metric that another waits for",
    "has not watched a prediction",
    "has scored the samples that calibrated its detector",
    "leaves out samples of whose tokens none is trained on",
    "numbers samples as they are loaded",
    "was not calibrated and will not watch",
    "was not calibrated before a validation",
    "was not calibrated before an evaluation",
    "watches with a stale calibration",
    "will not watch",
]

#: By kind: the code of its warning.
CODES: Mapping[Kind, str] = {
    "calibrates on the data that the model is trained on": "OOD507",
    "could not be calibrated": "OOD502",
    "could not draw an alert": "OOD506",
    "could not finish a stage": "OOD509",
    "could not hand over its detector": "OOD513",
    "could not look at a checkpoint": "OOD505",
    "could not number a batch": "OOD508",
    "could not put its detector into a checkpoint": "OOD505",
    "could not put scores beside a prediction": "OOD509",
    "could not put scores beside predictions": "OOD509",
    "could not reach MLflow": "OOD506",
    "could not reach a logger": "OOD506",
    "could not read the detector of a checkpoint": "OOD505",
    "could not resume its training stream": "OOD510",
    "could not score a batch": "OOD501",
    "could not score a training batch": "OOD501",
    "could not score samples": "OOD501",
    "could not take over its detector": "OOD513",
    "could not write an alert to a logger": "OOD506",
    "could not write its figures": "OOD506",
    "does not watch evaluations of the training": "OOD503",
    "does not watch the validation of `fit`": "OOD503",
    "has a detector that no checkpoint can hold": "OOD505",
    "has no metric that another waits for": "OOD511",
    "has not watched a prediction": "OOD503",
    "has scored the samples that calibrated its detector": "OOD507",
    "leaves out samples of whose tokens none is trained on": "OOD515",
    "numbers samples as they are loaded": "OOD508",
    "was not calibrated and will not watch": "OOD502",
    "was not calibrated before a validation": "OOD502",
    "was not calibrated before an evaluation": "OOD502",
    "watches with a stale calibration": "OOD201",
    "will not watch": "OOD502",
}


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

    def tell(self, kind: Kind, cause: object) -> None:
        """Count one, and warn if it is the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            warnings.warn(f"{self.name} {kind}: {cause} [{CODES[kind]}]", stacklevel=3)

    def refuse(self, kind: Kind, error: Exception, *, strict: bool) -> None:
        """Raise what stands in the way of watching, or where not strict tell of it.

        Raises:
            ValueError: Strict; it says who refuses.
        """
        told = f"{type(error).__name__}: {error}"
        if strict:
            raise ValueError(f"{self.name} {kind}: {told}") from error
        self.tell(kind, told)

    @contextmanager
    def contained(self, kind: Kind) -> Iterator[None]:
        """Count an exception and go on: days of training must not end on a monitor's account."""
        try:
            yield
        except Exception as error:  # whatever a foreign model, logger or file system raises
            self.tell(kind, error)
