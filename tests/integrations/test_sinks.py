"""The contract that every sink keeps, on each of them: a new sink is a new line below."""

import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
from mlflow import MlflowClient
from ood_monitor_integrations.lightning.telling import logger_sinks
from ood_monitor_integrations.mlflow import MLflowSink
from ood_monitor_integrations.prometheus import PrometheusSink
from ood_monitor_integrations.training.console import ConsoleSink
from ood_monitor_integrations.training.failures import Failures
from ood_monitor_integrations.training.figures import LeftOpen
from prometheus_client import CollectorRegistry, generate_latest
from pytorch_lightning.loggers import CSVLogger
from support.alert_cases import ALERT, LONG, summary
from support.receivers import receiving

from ood_monitor.alerts import (
    Alert,
    AlertEvidence,
    AlertKind,
    Dispatcher,
    LoggingSink,
    MeterSink,
    Reading,
    Sink,
    Summary,
    SummarySink,
    WebhookSink,
)

# MLflow's own use of SQLAlchemy, when it first opens a store.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


@dataclass
class Case:
    """A sink, and what is beyond it.

    Attributes:
        sink: Made anew.
        state: All that an alert has changed, apart from what a repetition may repeat.
        break_it: Puts what is beyond it out of order; None if nothing can be.
    """

    sink: Sink
    state: Callable[[], Any]
    break_it: Callable[[], object] | None = None


@contextmanager
def logging_case(folder: Path) -> Iterator[Case]:
    logger, ids = logging.getLogger("test.sinks"), set()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ids.add(record.getMessage())

    handler = Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield Case(LoggingSink(logger), lambda: set(ids))
    logger.removeHandler(handler)


@contextmanager
def left_open_case(folder: Path) -> Iterator[Case]:
    with logging_case(folder) as case:
        yield Case(LeftOpen(case.sink), case.state)


@contextmanager
def console_case(folder: Path) -> Iterator[Case]:
    written, console = io.StringIO(), ConsoleSink()

    def sink(alert: Alert) -> None:
        with redirect_stdout(written):  # not around all: pytest captures each phase anew
            console(alert)

    yield Case(sink, written.getvalue)


@contextmanager
def logger_case(folder: Path) -> Iterator[Case]:
    logger = CSVLogger(folder)
    (sink,) = logger_sinks([logger], "ood/test", lambda alert: 0, Failures("a monitor"))
    yield Case(sink, lambda: sorted(Path(logger.log_dir).rglob("*.json")))


@contextmanager
def webhook_case(folder: Path) -> Iterator[Case]:
    with receiving() as receiver:
        # By its id a receiver knows what it has.
        yield Case(
            WebhookSink(receiver.url, secret="whsec_" + "A" * 43 + "="),
            lambda: {request.headers["webhook-id"] for request in receiver.requests},
            lambda: setattr(receiver, "status", 503),
        )


@contextmanager
def prometheus_case(folder: Path) -> Iterator[Case]:
    registry = CollectorRegistry()
    yield Case(PrometheusSink(registry=registry), lambda: shown(registry))


def shown(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")


@contextmanager
def mlflow_case(folder: Path, store: MlflowClient) -> Iterator[Case]:
    experiment = store.create_experiment(folder.name, (folder / "artifacts").as_uri())
    run_id = store.create_run(experiment).info.run_id

    def state() -> Any:
        files = [file.path for file in store.list_artifacts(run_id, "ood/alerts")]
        return store.get_run(run_id).to_dictionary(), sorted(files)

    yield Case(MLflowSink(run_id, client=store), state, lambda: store.delete_run(run_id))


CASES: dict[str, Callable[..., AbstractContextManager[Case]]] = {
    "LoggingSink": logging_case,
    "LeftOpen": left_open_case,
    "ConsoleSink": console_case,
    "LoggerSink": logger_case,
    "WebhookSink": webhook_case,
    "PrometheusSink": prometheus_case,
    "MLflowSink": mlflow_case,
}
CAN_FAIL = ["WebhookSink", "MLflowSink"]


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    more = [request.getfixturevalue("store")] if request.param == "MLflowSink" else []
    with CASES[request.param](tmp_path, *more) as case:
        yield case


every_sink = pytest.mark.parametrize("case", CASES, indirect=True)


@every_sink
@pytest.mark.parametrize("kind", get_args(AlertKind))
def test_it_takes_every_kind_of_alert(case: Case, kind: str) -> None:
    before = case.state()
    case.sink(replace(ALERT, kind=kind, status="WARN"))
    assert case.state() != before


@every_sink
def test_it_takes_an_alert_without_figures(case: Case) -> None:
    nothing = AlertEvidence(**dict.fromkeys(vars(ALERT.evidence)) | {"flagged": 0, "window": 0})
    case.sink(replace(ALERT, evidence=nothing, top_layers=(), top_terms=(), samples=()))


@every_sink
def test_a_repeated_id_does_no_harm(case: Case) -> None:
    case.sink(ALERT)
    before = case.state()
    case.sink(Alert.from_json(ALERT.to_json()))  # as from the spool
    assert case.state() == before


@every_sink
def test_other_threads_may_call_it(case: Case) -> None:
    errors: list[BaseException] = []

    def call(number: int) -> None:
        try:
            case.sink(replace(ALERT, id=f"{number:032x}"))
        except BaseException as error:
            errors.append(error)

    for number in range(3):
        thread = threading.Thread(target=call, args=(number,))
        thread.start()
        thread.join()
    assert errors == []


@pytest.mark.parametrize("case", CAN_FAIL, indirect=True)
def test_it_raises_if_it_could_not_deliver(case: Case) -> None:
    assert case.break_it is not None
    case.break_it()
    with pytest.raises(Exception, match=r"503|active"):
        case.sink(ALERT)


@every_sink
def test_a_dispatcher_can_close_it(case: Case) -> None:
    with Dispatcher([case.sink]) as dispatcher:
        dispatcher.send(ALERT)
        dispatcher.summarise(summary(5))
        dispatcher.measure(Reading(stream="production", detector="d5", model="m7", failed=1))
        assert dispatcher.flush(LONG)
    assert set(dispatcher.failures.values()) == {0}


@every_sink
def test_it_shows_figures_if_it_says_so(case: Case) -> None:
    figures: Summary = summary(7)
    if isinstance(case.sink, SummarySink):
        case.sink.summarise(figures)
        case.sink.summarise(replace(figures, score_mean=None, log_e_value=None))
    if isinstance(case.sink, MeterSink):
        case.sink.measure(
            Reading(stream="s", detector="d", model="m", scores=[1.0], p_values=[0.5])
        )


@every_sink
def test_its_repr_is_short_and_has_no_secret(case: Case) -> None:
    assert len(repr(case.sink)) < 120
    assert "whsec" not in repr(case.sink)
