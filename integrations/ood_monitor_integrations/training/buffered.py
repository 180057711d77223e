"""A stage whose name is known only at its end: scores where batches come, decisions afterwards.

Several processes each score their own batches. At the end all decide on the whole in the order of
the dataset, cut into the batches that one process would have loaded: scores, alerts and status are
those of one process. Nobody keeps the samples, so that an alert has no explanation to follow.
"""

from ood_monitor import Alert, Detector, Monitor, Scores
from ood_monitor.modules import Lockstep
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.indices import Indices
from ood_monitor_integrations.training.stage_scores import StageScores

__all__ = ["BufferedStage"]


class BufferedStage:
    """Scores of a stage until it is decided on.

    Args:
        detector: What scores.
        lockstep: Of the passes over a sharded model.

    Attributes:
        log_e_value: The strongest evidence of a drift, at least 0.
        recorded: All scores, in the order of the dataset, once it is decided on.
    """

    def __init__(self, detector: Detector, lockstep: Lockstep) -> None:
        self.detector, self.log_e_value = detector, 0.0
        self.recorded = StageScores.none()
        self._lockstep = lockstep
        self._parts: list[StageScores] = []

    def take(self, scores: Scores, dataset: Indices, rows: Indices) -> None:
        """Keep the scores (B,) of a batch.

        Args:
            scores: Of all its samples.
            dataset: (B,), their places.
            rows: Of those that count: others only fill a batch up.
        """
        self._parts.append(StageScores(scores, dataset, 0 * dataset).take(rows))

    def gathered(self, world: World) -> StageScores:
        """The scores of all processes, in the order of the dataset; all must call it.

        Raises:
            RuntimeError: A process failed, or is lost; all hear of it.
        """
        return StageScores.of_all(self._parts, world, self.detector.fitted.layers)

    def decide(self, monitor: Monitor, whole: StageScores, size: int | None) -> list[Alert]:
        """The alerts of a stage.

        Args:
            monitor: On the detector.
            whole: What :meth:`gathered` gave.
            size: Samples of a batch; None for all at once.
        """
        self.recorded = whole.without_layers().numbered()
        alerts: list[Alert] = []
        for piece in whole.pieces([size]):
            found = monitor.observe(piece.scores)
            raised = [alert.evidence.log_e_value or 0.0 for alert in found]
            self.log_e_value = max(self.log_e_value, monitor.log_e_value, *raised)
            alerts += found
        return alerts
