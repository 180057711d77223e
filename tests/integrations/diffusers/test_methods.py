"""A pipeline watched by either method: the same images, and scores of each."""

from typing import Any, get_args

import numpy as np
import pytest
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, replayed_bound
from support.pipeline_cases import FEW, case_of, seeded_call

import ood_monitor as om
from ood_monitor.densities.parts import Method

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

METHODS: tuple[Method, ...] = get_args(Method)


@pytest.mark.parametrize("name", ["ddim", "stable-diffusion", "flux"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_pipeline_is_watched_by_its_method(method: Method, name: str) -> None:
    case = case_of(name)
    pipe, plain, call = case(), case(), case.call_of_one()
    levels = (100, 500)
    options: dict[str, Any] = {"levels": levels, "explain": FEW, "progress": False}
    options["watches"] = "outputs"
    detector = fit_pipeline(pipe, [case.images(44)], call=call, method=method, **options)
    assert detector.fitted.method == method
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05), raise_on_error=True)
    output = watched(**seeded_call(case.arguments()))
    assert np.array_equal(
        np.asarray(output[0]), np.asarray(plain(**seeded_call(case.arguments()))[0])
    )
    assert output.ood.valid.all()
    loaded = om.Detector.from_state_dict(
        detector.state_dict(), replayed_bound(case(), call=call, levels=levels)
    )
    assert loaded.fitted.fingerprint == detector.fitted.fingerprint
