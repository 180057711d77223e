"""How many normal samples a sound detector flags: the law, its edges, and against p-values."""

import numpy as np
import pytest

from ood_monitor.calibration import ConformalPValue
from ood_monitor.testing import flagged_interval


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(("samples", "calibration"), [(200, 100), (50, 500), (300, 299)])
def test_conformal_p_values_stay_within_and_fill_it(
    samples: int, calibration: int, fpr: float
) -> None:
    generator = np.random.default_rng(0)
    low, high = flagged_interval(samples, calibration, fpr, level=0.1)
    counts = []
    for _ in range(2_000):
        scores = generator.random(samples + calibration)
        p_values = ConformalPValue.fit(scores[:calibration]).p_value(scores[calibration:])
        counts.append(int((p_values <= fpr).sum()))
    outside = np.mean([not low <= count <= high for count in counts])
    assert outside < 0.1 + 0.02
    # One narrower on either side would not do.
    narrower = np.mean([not low < count < high for count in counts])
    assert narrower > 0.1 - 0.02 or low == 0


def test_it_is_wider_for_many_cells_and_than_a_binomials() -> None:
    low, high = flagged_interval(600, 600, 0.05)
    many = flagged_interval(600, 600, 0.05, cells=60)
    assert many[0] < low < 600 * 0.05 < high < many[1]
    assert high > 30 + 4.5 * (600 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize(
    ("calibration", "fpr", "expected"),
    [(98, 0.01, (0, 0)), (99, 0.01, (0, 47)), (99, 0.29, (88, 277)), (9, 0.1, None)],
)
def test_a_rate_that_few_scores_cannot_have(
    calibration: int, fpr: float, expected: tuple[int, int] | None
) -> None:
    found = flagged_interval(600, calibration, fpr)
    assert found == expected if expected else found[1] > 0
