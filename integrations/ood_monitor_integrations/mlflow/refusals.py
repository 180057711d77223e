"""What MLflow refuses for good, in the words of what delivers alerts."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException

from ood_monitor.alerts import Refused

__all__ = ["refusals"]

#: Answers that trying again does not change: a run that is not there, a name that MLflow does not
#: take, a user who may not. All others, and none, are tried again.
_FOR_GOOD = {400, 401, 403, 404, 410}


@contextmanager
def refusals() -> Iterator[None]:
    """Raise what MLflow refuses for good as a :class:`~ood_monitor.alerts.Refused`."""
    try:
        yield
    except MlflowException as error:
        if error.get_http_status_code() not in _FOR_GOOD:
            raise
        raise Refused(f"MLflow refuses it ({error.error_code}): {error}") from error
