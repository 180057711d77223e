"""The status on a model version: set once a change, and the version's own, also of a copy."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from mlflow import MlflowClient
from ood_monitor_integrations.mlflow import MLflowSink
from support.mlflow_cases import DRIFT, RECOVERED, SUMMARY

from ood_monitor.alerts import Refused

# MLflow's own use of SQLAlchemy, when it first opens a store.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

STATUS, OWNER = "ood_monitor.status", "ood_monitor.status_of"


class Counting(MlflowClient):
    """The real client, and how often it sets a tag of a version."""

    def __init__(self, tracking_uri: str) -> None:
        super().__init__(tracking_uri)
        self.set = Counter[tuple[str, str, str]]()

    def set_model_version_tag(  # type: ignore[override]
        self, name: str, version: str, key: str, value: str
    ) -> None:
        self.set[name, key, value] += 1
        super().set_model_version_tag(name, version, key, value)


@pytest.fixture
def counting(client: MlflowClient) -> Counting:
    return Counting(client.tracking_uri)


@pytest.fixture
def name(client: MlflowClient, run_id: str) -> Iterator[str]:
    """A registered model of one version."""
    client.create_registered_model(name := f"flow-{run_id}")
    client.create_model_version(name, f"runs:/{run_id}/model", run_id)
    yield name
    client.delete_registered_model(name)


def shown(client: MlflowClient, name: str) -> dict[str, str]:
    return client.get_model_version(name, "1").tags


def test_each_change_is_set_once(counting: Counting, run_id: str, name: str) -> None:
    for said in (DRIFT, replace(DRIFT, number=11), RECOVERED, replace(DRIFT, number=30)):
        for _ in range(2):  # a repetition, and a restart
            MLflowSink(run_id, model_version=(name, 1), client=counting)(said)
    assert counting.set == {
        (name, STATUS, "ALERT"): 2,
        (name, STATUS, "OK"): 1,
        (name, OWNER, f"{name}/1"): 1,
    }


def test_a_late_alert_leaves_the_version(counting: Counting, run_id: str, name: str) -> None:
    sink = MLflowSink(run_id, model_version=(name, "1"), client=counting)
    sink(RECOVERED)
    sink(DRIFT)
    assert shown(counting, name)[STATUS] == "OK"


def test_a_copy_has_no_status_until_it_has_its_own(
    counting: Counting, store: tuple[MlflowClient, str], run_id: str, name: str
) -> None:
    MLflowSink(run_id, model_version=(name, 1), client=counting)(DRIFT)
    copy = counting.copy_model_version(f"models:/{name}/1", f"{name}-production")
    assert shown(counting, copy.name)[STATUS] == "ALERT"  # the source's
    counting.set.clear()
    own = counting.create_run(store[1]).info.run_id
    for _ in range(2):  # a restart
        MLflowSink(own, model_version=(copy.name, copy.version), client=counting)(DRIFT)
    assert counting.set == {
        (copy.name, STATUS, "ALERT"): 1,
        (copy.name, OWNER, f"{copy.name}/1"): 1,
    }
    MLflowSink(own, model_version=(copy.name, copy.version), client=counting)(RECOVERED)
    assert shown(counting, copy.name)[STATUS] == "OK"
    assert shown(counting, name)[STATUS] == "ALERT"


def test_running_figures_of_a_copy_replace_the_sources_status(
    counting: Counting, store: tuple[MlflowClient, str], run_id: str, name: str
) -> None:
    MLflowSink(run_id, model_version=(name, 1), client=counting)(DRIFT)
    copy = counting.copy_model_version(f"models:/{name}/1", f"{name}-quiet")
    own = counting.create_run(store[1]).info.run_id
    MLflowSink(own, model_version=(copy.name, copy.version), client=counting).summarise(SUMMARY)
    assert shown(counting, copy.name)[STATUS] == "OK"


def test_a_missing_version_is_the_first_calls_failure(
    client: MlflowClient, run_id: str, name: str
) -> None:
    sink = MLflowSink(run_id, model_version=(name, 7), client=client)
    with pytest.raises(Refused, match="not found"):
        sink(DRIFT)
