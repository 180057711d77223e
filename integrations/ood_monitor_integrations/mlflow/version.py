"""The status of a stream as a tag of a model version, which MLflow's own webhooks tell of."""

from typing import Self

from mlflow import MlflowClient

from ood_monitor.alerts import Status
from ood_monitor.checks import items, text, whole
from ood_monitor_integrations.mlflow.tags import STATUS, STATUS_OF

__all__ = ["ShownVersion"]


class ShownVersion:
    """A model version that shows a status.

    MLflow's webhooks fire with every tag that is set, so none is set to what it is. A copy of a
    version carries the tags of its source, so the version is marked as the one that the status is
    of: another's status is none.

    Args:
        name: Of the registered model.
        version: Its version.
    """

    def __init__(self, name: str, version: str) -> None:
        self._version = name, version
        self._shown: Status | None = None

    @classmethod
    def of(cls, given: tuple[str, str | int]) -> Self:
        """The version of a name and a number.

        Raises:
            ValueError: Not two, or an empty one.
            TypeError: Of another type.
        """
        if len(parts := items("model_version", given)) != 2:
            raise ValueError(f"Expected model_version as a name and a version, got {given!r}.")
        name, number = parts
        version = number if isinstance(number, str) else str(whole("a model's version", number, 1))
        return cls(text("a model's name", name), text("a model's version", version))

    def show(self, client: MlflowClient, status: Status) -> None:
        """Set the tag, unless the version shows it already."""
        if status == self._shown:
            return
        tags, own = client.get_model_version(*self._version).tags, "/".join(self._version)
        is_own = tags.get(STATUS_OF) == own
        if not is_own or tags.get(STATUS) != status:
            client.set_model_version_tag(*self._version, STATUS, status)
        if not is_own:  # last: if this fails, the status is set once more, and not never
            client.set_model_version_tag(*self._version, STATUS_OF, own)
        self._shown = status
