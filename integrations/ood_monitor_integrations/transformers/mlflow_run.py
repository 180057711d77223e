"""The MLflow run that a Trainer reports to, by its id: a callback's sinks run in threads."""

import sys
from collections.abc import Iterator

from transformers import TrainingArguments

from ood_monitor.alerts import Sink

__all__ = ["MLflowRun"]


class MLflowRun:
    """The run, which the Trainer ends with the training, and which can be written to afterwards.

    Attributes:
        id: None where there is none.
    """

    def __init__(self) -> None:
        self.id: str | None = None
        self._uri: str | None = None

    def look(self, args: TrainingArguments) -> None:
        """Remember the run that is active in this thread, if the Trainer reports to MLflow."""
        # Whoever reports to MLflow has imported it already.
        mlflow = sys.modules.get("mlflow")
        if mlflow is None or "mlflow" not in (args.report_to or ()):
            return
        if (run := mlflow.active_run()) is not None:
            self.id, self._uri = str(run.info.run_id), mlflow.get_tracking_uri()

    def sinks(self, stage: str, first_step: int) -> Iterator[Sink]:
        """One that shows a stage on the run, if there is one."""
        if self.id is not None:
            from ood_monitor_integrations.mlflow import MLflowSink

            yield MLflowSink(self.id, tracking_uri=self._uri, stage=stage, first_step=first_step)
