"""What a promised run time is worth where neighbouring scores are alike."""

import numpy as np

from ood_monitor.checks import number

__all__ = ["CORRELATIONS", "MEAN_RUN_TIMES", "RUN_TIMES", "expected_run_time"]

#: Lag-1 correlations that were simulated.
CORRELATIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.95)
#: Promised run times that were simulated.
RUN_TIMES = (100, 1_000, 10_000, 100_000)

#: Mean samples to an alarm, by promised run time and correlation: `benchmarks.drift.correlation`.
MEAN_RUN_TIMES = (
    (100, 102, 95, 87, 73, 49, 27, 17),
    (1_000, 1_000, 742, 541, 313, 145, 49, 28),
    (10_000, 7_545, 5_968, 2_127, 1_046, 274, 88, 40),
    (100_000, 52_628, 31_415, 6_585, 2_192, 500, 118, 56),
)


def expected_run_time(ert: float, correlation: float) -> float:
    """Returns the mean run time to a false alarm to be expected where neighbours are alike.

    Simulated for Gaussian scores of first order, interpolated between the logarithms; an estimate,
    and no promise.

    Args:
        ert: The run time that was promised, in samples.
        correlation: Of neighbouring scores, lag 1; below 0 is as 0.

    Returns:
        Samples, at most ``ert``.

    Raises:
        TypeError: An argument is no number.
        ValueError: ``ert`` is below 2 or the correlation not in [-1, 1].
    """
    promised, rho = number("ert", ert, 2), number("correlation", correlation, -1, 1)
    by_promise = [
        np.interp(rho, CORRELATIONS, np.log(times), right=np.log(times[-1]))
        for times in MEAN_RUN_TIMES
    ]
    at, known = np.log(promised), np.log(RUN_TIMES)
    # Beyond the table as its last two rows go on.
    i = int(np.clip(np.searchsorted(known, at), 1, len(known) - 1))
    slope = (by_promise[i] - by_promise[i - 1]) / (known[i] - known[i - 1])
    return min(promised, float(np.exp(by_promise[i - 1] + slope * (at - known[i - 1]))))
