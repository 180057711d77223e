"""From a batch to scores, in which a sample that cannot be scored costs the others nothing."""

from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.calibration.scores import Scores
from ood_monitor.detector.detector import Detector
from ood_monitor.gradients.norms import finite_samples

__all__ = ["scored"]


def scored(detector: Detector, batch: Batch) -> Scores:
    """Scores of B samples, nan for one that cannot be scored.

    Raises:
        ValueError: An empty batch, or one of other shapes or types than the held-out data.
    """
    detector.check(batch)
    finite = finite_samples(batch)
    if finite.all():
        return detector.score(batch)
    if not finite.any():
        return Scores.none().among(len(finite), [])
    kept = map_tensors(lambda t: t[finite.to(t.device)], batch)
    return detector.score(kept).among(len(finite), finite)
