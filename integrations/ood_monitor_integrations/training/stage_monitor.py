"""The monitor of one stage: scores where batches come, decisions in the order of the dataset."""

from ood_monitor import Alert, Monitor, Scores
from ood_monitor.adapters.base import Batch
from ood_monitor.modules import Lockstep
from ood_monitor_integrations.training.collectives import World
from ood_monitor_integrations.training.indices import Positions
from ood_monitor_integrations.training.stage_scores import StageScores

__all__ = ["StageMonitor"]


class StageMonitor:
    """A stage that is watched.

    In one process each batch is decided on at once. In several, each scores its own batches, and
    at the end all decide on the whole, put in the order of the dataset and cut into the batches
    that one process would have loaded: scores, alerts and status are then those of one process.
    There are no explanations then, as no process has all samples.

    Args:
        monitor: Has sinks in one process only.
        positions: Where the samples stand.
        world: The processes.
        lockstep: Of the passes over a sharded model.
        explains_at_once: Whether an alert is explained with its batch, before the weights change.

    Attributes:
        log_e_value: The strongest evidence of a drift so far, at least 0.
        latest: Scores of the latest batch.
    """

    def __init__(
        self,
        monitor: Monitor,
        positions: Positions,
        world: World,
        lockstep: Lockstep,
        *,
        explains_at_once: bool = False,
    ) -> None:
        self.monitor, self.log_e_value = monitor, 0.0
        self.latest: Scores | None = None
        self._positions, self._world = positions, world
        self._lockstep, self._explains_at_once = lockstep, explains_at_once
        self._parts: list[StageScores] = []
        self._latest_at: tuple[int, int] | None = None

    @property
    def is_online(self) -> bool:
        """Whether it decides with each batch."""
        return self._world.size == 1

    def take(self, batch: Batch, batch_idx: int, dataloader_idx: int) -> list[Alert]:
        """Score a batch; the alerts that it raised, after explanations of those before."""
        with self._lockstep.passes():  # also of a process that fails before its first
            explanations = self.monitor.explain()
            scores = self.monitor.score(batch)
        return [*explanations, *self._kept(scores, (batch_idx, dataloader_idx), batch)]

    def take_invalid(self, count: int, batch_idx: int, dataloader_idx: int) -> list[Alert]:
        """Keep a batch that could not be scored as such: what nobody has looked at is not OK.

        Args:
            count: B, where the sampler does not tell it.
            batch_idx: As of :meth:`take`, which has raised.
            dataloader_idx: Likewise.
        """
        at = batch_idx, dataloader_idx
        if at == self._latest_at:
            return []  # it is kept, and what failed came after
        count = self._positions.loaded(*at) or count
        return self._kept(Scores.none().among(count, []), at)

    def _kept(
        self, scores: Scores, place: tuple[int, int], batch: Batch | None = None
    ) -> list[Alert]:
        self._latest_at, at = place, (*place, len(scores.score))
        dataset = self._positions.of(*at)
        dataloader_idx = place[1]
        part = StageScores(scores, dataset, 0 * dataset + dataloader_idx)
        self.latest = scores
        if not self.is_online:
            self._parts.append(part.take(self._positions.counted(*at)))
            return []
        self._parts.append(part.without_layers())
        alerts = self._observe(part, batch)
        after = self.monitor.explain() if self._explains_at_once else []
        return [*alerts, *after]

    def finish(self) -> list[Alert]:
        """Decide on what is left; all processes must call it.

        Raises:
            RuntimeError: A process failed, or is lost; all hear of it.
        """
        if self.is_online:
            return self.monitor.explain()
        self._lockstep.end()
        whole = StageScores.of_all(self._parts, self._world, self.monitor.detector.fitted.layers)
        with self._world.agreed():  # what follows the stage is a collective of the training
            return self._decide(whole)

    @property
    def recorded(self) -> StageScores:
        """What was scored so far, without layers; in several processes only after the end."""
        return StageScores.together(self._parts).numbered()

    def _decide(self, whole: StageScores) -> list[Alert]:
        """On the samples of all processes."""
        self._parts = [whole.without_layers()]
        last = int(whole.dataloader_index.max(initial=0))
        sizes = [self._positions.batch_size(at) for at in range(last + 1)]
        return [alert for piece in whole.pieces(sizes) for alert in self._observe(piece)]

    def _observe(self, part: StageScores, batch: Batch | None = None) -> list[Alert]:
        alerts = self.monitor.observe(part.scores, batch=batch)
        raised = [alert.evidence.log_e_value or 0.0 for alert in alerts]
        self.log_e_value = max(self.log_e_value, self.monitor.log_e_value, *raised)
        return alerts
