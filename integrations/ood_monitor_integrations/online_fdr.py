"""online-fdr: single samples named such that few of those named are normal.

::

    found = Discoveries(fdr=0.1)
    for batch in stream:
        monitor.update(batch)
        report(found.update(monitor.last))

A false-positive rate counts among all samples: where one in a thousand is anomalous, most flags at
fpr .01 are false. The false-discovery rate counts among those named.
"""

import math

from online_fdr.p_values import BatchBH

from ood_monitor import Scores

__all__ = ["Discoveries"]


class Discoveries:
    """Names anomalous samples of a stream; of those named, a share of ``fdr`` is normal at most.

    On average over streams. Samples are judged together, a window at a time: a conformal p-value
    is never below 1 / (n + 1), which for a sample judged by itself is soon too much, however
    strange it is, while several in a window are evidence together. With n calibration samples, at
    least about ``window / (fdr (n + 1))`` samples of a window must be beyond all of them to be
    named: take n well above ``window / fdr``.

    The theorem is for independent p-values. Conformal ones share their calibration samples, which
    makes them positively dependent; simulated with 500, 2 000 and 10 000 of these, the rate was
    kept (``tests/integrations/test_online_fdr.py``).

    Args:
        fdr: The rate promised, in (0, 1).
        window: Samples judged together.

    Raises:
        ValueError: A rate outside (0, 1), or an empty window.

    References:
        The Power of Batching in Multiple Hypothesis Testing (Zrnic, Jiang, Ramdas, Jordan, 2020),
        https://arxiv.org/abs/1910.04968
    """

    def __init__(self, fdr: float = 0.1, window: int = 100) -> None:
        if not 0 < fdr < 1 or window < 1:
            raise ValueError(
                f"Expected a rate in (0, 1) and a window of at least 1, got {fdr} and {window}."
            )
        self._procedure, self._window = BatchBH(alpha=fdr), window
        self._waiting: list[tuple[int, float]] = []
        self._seen = 0

    def update(self, scores: Scores) -> list[int]:
        """Take in scores, in the order of the stream.

        Returns:
            Which samples of the stream, counted from 0, the windows that are full now name. One
            that could not be scored counts, and is never named.
        """
        for p_value in scores.p_value.tolist():
            if not math.isnan(p_value):
                self._waiting.append((self._seen, p_value))
            self._seen += 1
        named: list[int] = []
        while len(self._waiting) >= self._window:
            named += self._judge(self._window)
        return named

    def flush(self) -> list[int]:
        """Judge the samples of the window that is not full, as a window of its own."""
        return self._judge(len(self._waiting)) if self._waiting else []

    def _judge(self, count: int) -> list[int]:
        judged, self._waiting = self._waiting[:count], self._waiting[count:]
        decisions = self._procedure.test_batch([p_value for _, p_value in judged])
        return [at for (at, _), named in zip(judged, decisions, strict=True) if named]
