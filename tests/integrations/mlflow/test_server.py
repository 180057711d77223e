"""A real MLflow server that dies in mid-stream, and its own webhook that carries an alert."""

import base64
import hashlib
import hmac
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ood_monitor_integrations.mlflow import MLflowSink
from ood_monitor_integrations.prometheus import PrometheusSink
from support.alert_cases import ALERT, alert, started
from support.mlflow_server import Server
from support.receivers import receiving
from support.small_cases import SMALL

import ood_monitor as om
from ood_monitor.alerts import Alert, Dispatcher

pytestmark = pytest.mark.slow

BRANCHES = SMALL["branches"]
LONG = 300.0
#: Seconds that a call of the monitor may take while the server is dead: MLflow's client alone would
#: wait for minutes. A loaded machine takes some of them.
BOUND = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all, since it takes long to start; every test leaves it running."""
    with pytest.MonkeyPatch.context() as patch:
        # MLflow's client would be patient for minutes, and tests would with it.
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        server = Server(tmp_path_factory.mktemp("server"))
        yield server
        server.kill()


@pytest.fixture
def client(server: Server) -> MlflowClient:
    return MlflowClient(server.url)


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return client.create_run("0").info.run_id


def artifacts(client: MlflowClient, run_id: str) -> list[str]:
    return sorted(Path(file.path).name for file in client.list_artifacts(run_id, "ood/alerts"))


def expected(alerts: list[Alert]) -> list[str]:
    return sorted(f"{alert.id}.{kind}" for alert in alerts for kind in ("json", "png"))


def test_a_server_killed_in_mid_stream_gets_every_alert_once(
    server: Server, client: MlflowClient, run_id: str, tmp_path: Path
) -> None:
    detector = om.Detector(BRANCHES()).fit([BRANCHES.data(1000, seed=100)], progress=False)
    meters, sink = PrometheusSink(), MLflowSink(run_id, tracking_uri=server.url)
    x = BRANCHES.data(300, seed=1)
    x[::15] = 30 * x[::15]  # an alert every 15 samples
    alerts: list[Alert] = []
    longest = 0.0
    options = {"ert": 1e9, "cooldown": 0, "summary_every": 10**9}
    with om.Monitor(detector, sinks=[sink, meters], spool=tmp_path / "spool", **options) as monitor:
        for number, batch in enumerate(x.split(5)):
            if number == 20:
                server.kill()
            start = time.monotonic()
            alerts += monitor.update(batch)
            longest = max(longest, time.monotonic() - start)
            if number == 40:
                # The others have all by now, the dead one has not.
                assert meters.registry.get_sample_value(
                    "ood_monitor_alerts_total",
                    {
                        "model": alerts[0].model,
                        "detector": alerts[0].detector,
                        "kind": "sample",
                    },
                )
                server.start()
        assert monitor.flush(LONG)
        assert monitor.dispatcher.undelivered_count == 0
        assert monitor.samples_seen == 300
    assert len(alerts) >= 20
    assert artifacts(client, run_id) == expected(alerts)
    steps = [each.step for each in client.get_metric_history(run_id, "ood/status")]
    assert len(steps) == len(set(steps)) < len(alerts)  # alerts are events, and a status changes
    assert client.get_run(run_id).data.tags["ood_monitor.status"] == "WARN"
    verdicts = [
        sample.value
        for family in meters.registry.collect()
        for sample in family.samples
        if sample.name == "ood_monitor_samples_total"
    ]
    assert sum(verdicts) == 300
    assert longest < BOUND
    assert (tmp_path / "spool" / "alerts.jsonl").read_text().count("\n") == 1


SENDER = """
import sys
from dataclasses import replace
sys.modules.pop("ood_monitor")
from ood_monitor.alerts import Alert
from ood_monitor.alerts import Dispatcher
from ood_monitor_integrations.mlflow import MLflowSink
spool, url, run_id, text = sys.argv[1:]
alert = Alert.from_json(text)
dispatcher = Dispatcher([MLflowSink(run_id, tracking_uri=url)], spool=spool)
print("ready", flush=True)
sys.stdin.readline()
for number in range(12):
    dispatcher.send(replace(alert, samples_seen=number, id=f"{number:032x}"))
    print("sent", number, flush=True)
sys.stdin.readline()
"""


def test_alerts_outlive_the_server_and_the_watched_process_together(
    server: Server, client: MlflowClient, run_id: str, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    process = started(SENDER, str(spool), server.url, run_id, ALERT.to_json())
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    server.kill()
    process.stdin.write("go\n")
    process.stdin.flush()
    for number in range(12):
        assert process.stdout.readline() == f"sent {number}\n"
    process.kill()
    process.communicate()
    server.start()
    with Dispatcher([MLflowSink(run_id, tracking_uri=server.url)], spool=spool) as dispatcher:
        assert dispatcher.flush(LONG)
        assert dispatcher.undelivered_count == 0
    sent = [alert(number) for number in range(12)]
    assert artifacts(client, run_id) == expected(sent)


def test_a_model_version_fires_mlflows_signed_webhook_on_transitions(
    server: Server, client: MlflowClient, run_id: str
) -> None:
    client.create_registered_model("flow")
    version = client.create_model_version("flow", f"runs:/{run_id}/model", run_id).version
    secret = "a secret of ours"
    with receiving() as receiver:
        events = ["model_version_tag.set"]
        client.create_webhook("pager", receiver.url, events, secret=secret)
        drift, recovered = replace(ALERT), replace(ALERT, kind="recovered", status="OK")

        def restarted() -> MLflowSink:
            return MLflowSink(run_id, model_version=("flow", version), tracking_uri=server.url)

        sink = restarted()
        sink(drift)
        sink(drift)  # tried again
        sink = restarted()
        sink(replace(drift, id="1" * 32))
        sink(replace(recovered, id="2" * 32))
        sink(replace(recovered, id="3" * 32))
        assert receiver.wait_for(3, LONG)
        time.sleep(2)  # for a fourth that would be one too many
        found = [request.json["data"] for request in receiver.requests]
        assert sorted((data["key"], data["value"]) for data in found) == [
            ("ood_monitor.status", "ALERT"),
            ("ood_monitor.status", "OK"),
            ("ood_monitor.status_of", f"flow/{version}"),  # of the version, once
        ]
        for request, data in zip(receiver.requests, found, strict=True):
            assert (data["name"], data["version"]) == ("flow", str(version))
            headers = request.headers
            content = f"{headers['x-mlflow-delivery-id']}.{headers['x-mlflow-timestamp']}."
            digest = hmac.new(secret.encode(), content.encode() + request.body, hashlib.sha256)
            expected = "v1," + base64.b64encode(digest.digest()).decode()
            assert headers["x-mlflow-signature"] == expected
    tags = client.get_model_version("flow", version).tags
    assert tags["ood_monitor.status"] == "OK"
