"""What is counted of an MLflow run after kills: nothing of a sound one, and each thing amiss."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ood_monitor_integrations.mlflow import MLflowSink

from benchmarks.alerts.served import alert_of, on_run, summary_of

# MLflow's own use of SQLAlchemy, when it first opens a store.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

SENT = [0, 1, 2, 3]
SOUND = {"lost": 0, "changed": 0, "not of the latest": 0, "figures wrong or twice": 0}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


def as_it_is(client: MlflowClient, run_id: str, folder: Path) -> None:
    pass


def without_a_picture(client: MlflowClient, run_id: str, folder: Path) -> None:
    (picture,) = folder.rglob(f"{alert_of(1).id}.png")
    picture.unlink()


def of_another(client: MlflowClient, run_id: str, folder: Path) -> None:
    client.log_text(run_id, alert_of(1).to_json(), f"ood/alerts/{alert_of(2).id}.json")


def cut(client: MlflowClient, run_id: str, folder: Path) -> None:
    client.log_text(run_id, alert_of(2).to_json()[:-20], f"ood/alerts/{alert_of(2).id}.json")


def never_sent(client: MlflowClient, run_id: str, folder: Path) -> None:
    client.log_text(run_id, alert_of(9).to_json(), f"ood/alerts/{alert_of(9).id}.json")


def of_before(client: MlflowClient, run_id: str, folder: Path) -> None:
    client.set_tag(run_id, "ood_monitor.status", alert_of(2).status)


def twice(client: MlflowClient, run_id: str, folder: Path) -> None:
    client.log_metric(run_id, "ood/score_mean", 1.0, timestamp=1, step=1)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (as_it_is, {}),
        (without_a_picture, {"lost": 1}),
        (of_another, {"changed": 1}),
        (cut, {"changed": 1}),
        (never_sent, {"changed": 1}),
        (of_before, {"not of the latest": 1}),
        (twice, {"figures wrong or twice": 1}),
    ],
)
def test_what_is_amiss_on_a_run_is_counted(
    damage: Callable[[MlflowClient, str, Path], None],
    found: dict[str, int],
    client: MlflowClient,
    tmp_path: Path,
) -> None:
    experiment = client.create_experiment(tmp_path.name, (tmp_path / "artifacts").as_uri())
    sink = MLflowSink(client.create_run(experiment).info.run_id, client=client)
    for place in SENT:
        sink(alert_of(place))
        sink.summarise(summary_of(place))
    damage(client, sink.run_id, tmp_path / "artifacts")
    assert on_run(client, sink.run_id, SENT, tmp_path) == SOUND | found
