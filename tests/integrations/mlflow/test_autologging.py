"""After `mlflow.autolog()` no run has a trace of a detector's own fits, and all of its user's."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

# MLflow reads it once, when it is imported.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.utils import autologging_utils
from sklearn.linear_model import LogisticRegression
from support.density_cases import DENSITIES, independent
from support.lightning_cases import QUIET, Flow, trained, watcher

import ood_monitor as om
from ood_monitor.densities import GaussianMixture
from ood_monitor.densities.autologging import without_autologging
from ood_monitor.densities.baselines import IsolationForest, OneClassSVM

pytestmark = [
    *QUIET,
    # What MLflow's own logging of a user's model warns of.
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Both are put back: the next test of the process has an experiment of its own.
        patch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
        patch.setenv("MLFLOW_EXPERIMENT_ID", "")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        yield MlflowClient()
        mlflow.set_tracking_uri(None)


@pytest.fixture
def client(store: MlflowClient) -> Iterator[MlflowClient]:
    """Autologging of an experiment of the test's own; settings that are the user's."""
    name = f"experiment {len(store.search_experiments())}"
    mlflow.set_experiment(experiment_id=store.create_experiment(name))
    mlflow.autolog(silent=True, log_models=False, log_datasets=False)
    yield store
    mlflow.autolog(disable=True, silent=True)


def runs(client: MlflowClient) -> list[str]:
    """What was fitted in each run of the latest experiment."""
    (experiment, *_) = client.search_experiments(order_by=["creation_time DESC"])
    found = client.search_runs([experiment.experiment_id])
    return [run.data.tags.get("estimator_name", "") for run in found]


def fit_of_the_user() -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    LogisticRegression().fit(x, x[:, 0] > 0)


def detector() -> om.Detector:
    flow = om.models.Glow(channels=1, size=4, levels=2, steps=1, hidden=4)
    return om.Detector(om.LogLikelihood(flow))


def held_out() -> list[torch.Tensor]:
    images = torch.rand(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return list(images.split(200))


def use() -> None:
    made = detector().fit(held_out(), progress=False)
    made.score(held_out()[0])
    assert om.diagnose(made.adapter, held_out()).mixed is not None


@pytest.mark.slow
@pytest.mark.both_methods
def test_a_detector_makes_no_run(client: MlflowClient) -> None:
    use()
    assert runs(client) == []
    fit_of_the_user()
    assert runs(client) == ["LogisticRegression"]


@pytest.mark.slow
@pytest.mark.both_methods
def test_a_detector_writes_nothing_into_the_active_run(client: MlflowClient) -> None:
    with mlflow.start_run() as run:
        mlflow.log_param("lr", 0.1)
        before = client.get_run(run.info.run_id).data.to_dictionary()
        use()
        assert client.get_run(run.info.run_id).data.to_dictionary() == before
        assert client.list_artifacts(run.info.run_id) == []
        fit_of_the_user()
    assert "penalty" in client.get_run(run.info.run_id).data.params


FITTED = DENSITIES | {"OneClassSVM": OneClassSVM, "IsolationForest": IsolationForest}


@pytest.mark.parametrize("name", FITTED)
def test_no_density_makes_a_run(client: MlflowClient, name: str) -> None:
    features = independent(60)
    FITTED[name]().fit(features).score(features)  # type: ignore[operator]
    assert runs(client) == []


def test_a_fit_in_another_thread_is_logged_meanwhile(client: MlflowClient) -> None:
    with without_autologging(), ThreadPoolExecutor(1) as pool:
        pool.submit(fit_of_the_user).result()
        fit_of_the_user()
    assert runs(client) == ["LogisticRegression"]


def test_the_last_of_several_threads_gives_mlflow_back(client: MlflowClient) -> None:
    own = autologging_utils.get_autologging_config
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with without_autologging():
            entered.set()
            assert left.wait(30)
            fit_of_the_user()

    with ThreadPoolExecutor(1) as pool:
        with without_autologging():
            done = pool.submit(other)
            assert entered.wait(30)
        left.set()
        done.result()
    assert runs(client) == []
    assert autologging_utils.get_autologging_config is own


def test_a_fit_that_fails_leaves_the_settings_as_they_were(client: MlflowClient) -> None:
    own = autologging_utils.get_autologging_config
    settings = {name: dict(c) for name, c in autologging_utils.AUTOLOGGING_INTEGRATIONS.items()}
    with pytest.raises(ZeroDivisionError), without_autologging(), without_autologging():
        raise ZeroDivisionError
    assert autologging_utils.get_autologging_config is own
    assert settings == autologging_utils.AUTOLOGGING_INTEGRATIONS
    fit_of_the_user()
    assert runs(client) == ["LogisticRegression"]


def test_settings_that_change_meanwhile_are_kept(client: MlflowClient) -> None:
    with without_autologging():
        mlflow.sklearn.autolog(disable=True)
    fit_of_the_user()
    assert runs(client) == []


def test_a_callbacks_fit_makes_no_run(client: MlflowClient) -> None:
    mlflow.pytorch.autolog(disable=True)  # within a training that it logs MLflow logs nothing else
    module = Flow()
    settings = om.Detector(
        om.LogLikelihood(module), method="gradient_norms", density=GaussianMixture()
    )
    callback = watcher(detector=settings)
    trained(callback, module=module)
    assert callback.detector is not None
    assert callback.failures == 0
    assert runs(client) == []


SCRIPT = """
import sys
import mlflow
mlflow.autolog(silent=True, log_models=False, log_datasets=False)
assert "sklearn" not in sys.modules
import numpy as np
from ood_monitor.densities.autologging import without_autologging
x = np.random.default_rng(0).normal(size=(40, 2))
with without_autologging():
    from sklearn.mixture import GaussianMixture
    GaussianMixture().fit(x)
from sklearn.linear_model import LogisticRegression
LogisticRegression().fit(x, x[:, 0] > 0)
"""


@pytest.mark.slow
@pytest.mark.both_methods
def test_what_a_detector_imports_first_is_logged_for_its_user(client: MlflowClient) -> None:
    # The store and the experiment are in the environment.
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
    assert runs(client) == ["LogisticRegression"]
