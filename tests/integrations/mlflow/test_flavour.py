"""Detectors as MLflow models: logged, registered, served and evaluated, on a SQLite store."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# MLflow reads them once, when it is imported.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's own, about its type hints
    import mlflow.pyfunc

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.models import MetricThreshold, Model
from mlflow.models.evaluation.evaluator_registry import _model_evaluation_registry
from ood_monitor_integrations.mlflow import flavour
from ood_monitor_integrations.mlflow.evaluator import MODEL_TYPE, DetectorEvaluator
from safetensors.torch import save_file
from support import flavour_cases as cases
from support.pickles import pickles_in

import ood_monitor as om

ROOT = Path(__file__).parents[3]
COLUMNS = ["score", "p_value", "log_likelihood", "valid"]

pytestmark = [
    # MLflow's own use of SQLAlchemy, when it first opens a store.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|starlette|fastapi).*"),
]


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SQLite store that is made once, in a folder of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        yield folder
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def detector() -> om.Detector:
    return cases.fitted()


@pytest.fixture(scope="module")
def saved(detector: om.Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    flavour.save_model(detector, path, factory=cases.FACTORY, input_example=cases.images(2))
    return path


def expected(detector: om.Detector, batch: Any) -> pd.DataFrame:
    scores = detector.score(batch)
    return pd.DataFrame({name: getattr(scores, name).numpy() for name in COLUMNS})


def assert_same(found: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, other, rtol=1e-6, atol=1e-9)


# What is saved and comes back


def test_a_loaded_detector_scores_as_the_saved_one(saved: Path, detector: om.Detector) -> None:
    x = cases.images(9, seed=1)
    loaded = flavour.load_model(str(saved))
    assert torch.equal(loaded.score(x).score, detector.score(x).score)
    assert not loaded.is_stale


def test_the_weights_are_the_models_not_the_factorys(saved: Path, detector: om.Detector) -> None:
    means = [
        adapter.module.get_parameter("mean").detach().mean().item()
        for adapter in (flavour.load_model(str(saved)).adapter, cases.build())
    ]
    assert means == [0.25, 0.5]


def test_no_file_is_a_pickle_or_holds_one(saved: Path) -> None:
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {
        "",
        ".json",
        ".md",
        ".png",
        ".safetensors",
        ".txt",
        ".yaml",
    }
    assert not [path for path in files if pickles_in(path.read_bytes())]


def test_a_model_says_what_it_takes_and_gives(saved: Path) -> None:
    model = Model.load(str(saved))
    assert model.signature.inputs.inputs[0].shape == (-1, 1, 4, 4)
    assert model.signature.inputs.inputs[0].type == np.float32
    assert model.signature.outputs.input_names() == COLUMNS
    requirements = (saved / "requirements.txt").read_text()
    assert "ood-monitor[mlflow]==" in requirements
    assert "torch==2" in requirements
    assert "+" not in requirements


def test_files_are_copied_and_given_to_the_factory(tmp_path: Path) -> None:
    detector = cases.fitted()
    save_file(detector.adapter.module.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "t.txt").write_text("hello")
    flavour.save_model(
        detector,
        tmp_path / "model",
        factory="support.flavour_cases:build_from_file",
        files={"weights": tmp_path / "w.safetensors", "text": tmp_path / "t.txt"},
        weights=False,
    )
    for name in ("w.safetensors", "t.txt"):
        (tmp_path / name).unlink()
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert not flavour.load_model(str(moved)).is_stale
    assert not (moved / "weights.safetensors").exists()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    detector = om.Detector(cases.build_tied()).fit([x], progress=False)
    flavour.save_model(detector, tmp_path / "model", factory="support.flavour_cases:build_tied")
    module: Any = flavour.load_model(str(tmp_path / "model")).adapter.module
    assert module.first.weight is module.second.weight


def test_weights_come_back_in_their_precision(tmp_path: Path) -> None:
    adapter = cases.build()
    adapter.module.double()
    detector = om.Detector(adapter).fit([cases.images(300).double()], progress=False)
    flavour.save_model(detector, tmp_path / "model", factory=cases.FACTORY)
    loaded = flavour.load_model(str(tmp_path / "model"))
    assert {p.dtype for p in loaded.adapter.module.parameters()} == {torch.float64}
    assert not loaded.is_stale


def test_groups_are_named_and_come_back(tmp_path: Path) -> None:
    detector = cases.fitted(groups=cases.groups, minimum_group=20)
    options: Any = {"factory": cases.FACTORY, "groups": "support.flavour_cases:groups"}
    flavour.save_model(detector, tmp_path / "model", **options)
    x = cases.images(9, seed=1)
    found = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(x.numpy())
    assert_same(found, expected(detector, x))


@pytest.mark.slow
def test_code_travels_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "travelling_code.py").write_text("from support.flavour_cases import build\n")
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from ood_monitor_integrations.mlflow import flavour
if sys.argv[1] == "save":
    sys.path.insert(0, {str(tmp_path)!r})
    from support import flavour_cases
    flavour.save_model(
        flavour_cases.fitted(), {str(tmp_path / "model")!r},
        factory="travelling_code:build", code_paths=[{str(tmp_path / "travelling_code.py")!r}],
    )
else:
    assert flavour.load_model({str(tmp_path / "model")!r}).is_fitted
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for action in ("save", "load"):
        command = [sys.executable, "-W", "ignore", "-c", program, action]
        subprocess.run(command, env=environment, check=True, timeout=180, cwd="/")


# What is refused when it is saved, not when it is served


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"factory": "support.flavour_cases.build"}, "as 'package.module:function', got"),
        (
            {"factory": "support.flavour_cases:gone"},
            "flavour_cases:gone' to be importable",
        ),
        ({"factory": "no_such_package:build"}, "'no_such_package:build' to be importable"),
        ({"factory": "os:system; x"}, "as 'package.module:function', got"),
        ({"factory": "os:getcwd"}, "'os:getcwd' of Python's own library"),
        ({"arguments": {"size": torch.ones(1)}}, "JSON-able arguments"),
        ({"arguments": {"start": float("nan")}}, "JSON-able arguments"),
        ({"arguments": {"size": 5}}, "weights of what support.flavour_cases:build builds"),
        ({"weights": False}, "got other weights"),
        ({"groups": "support.flavour_cases:groups"}, "`groups` as"),
        ({"arguments": {"size": 4}, "files": {"size": "x"}}, r"got \['size'\] twice"),
    ],
    ids=lambda value: str(value)[:50],
)
@pytest.mark.filterwarnings("ignore:Stale calibration")
def test_what_could_not_be_loaded_is_not_saved(
    options: dict[str, Any], told: str, detector: om.Detector, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        flavour.save_model(detector, tmp_path / "m", **({"factory": cases.FACTORY} | options))


def test_a_factory_of_something_else_is_refused(detector: om.Detector, tmp_path: Path) -> None:
    for name in ("build_nothing", "Flow", "groups"):
        factory = f"support.flavour_cases:{name}"
        with pytest.raises(TypeError, match=rf"`def {name}\(...\) -> ood_monitor.Adapter:`, got"):
            flavour.save_model(detector, tmp_path / "m", factory=factory)
    with pytest.raises(TypeError, match="build_other to give an Adapter, got Flow"):
        flavour.save_model(detector, tmp_path / "m", factory="support.flavour_cases:build_other")


@pytest.mark.parametrize(
    ("setting", "name", "told"),
    [
        ("factory", "os:getcwd", "of Python's own library"),
        ("factory", "support.flavour_cases:build_nothing", "-> ood_monitor.Adapter"),
        ("factory", "support..flavour_cases:build", "as 'package.module:function'"),
        ("groups", "os:getcwd", "of Python's own library"),
        (
            "groups",
            "support.flavour_cases:build_nothing",
            r"torch.Tensor \| collections.abc.Sequence",
        ),
    ],
)
def test_a_model_that_was_edited_runs_no_function_of_anothers(
    setting: str, name: str, told: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "m")
    file = tmp_path / "m" / "MLmodel"
    settings = yaml.safe_load(file.read_text())
    settings["flavors"]["ood_monitor"][setting] = name
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises((TypeError, ValueError), match=told):
        flavour.load_model(str(tmp_path / "m"))


def test_an_adapter_with_another_seed_is_told(detector: om.Detector, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fitted with seed=0, got 1"):
        flavour.save_model(detector, tmp_path / "m", factory=cases.FACTORY, arguments={"seed": 1})


@pytest.mark.filterwarnings("ignore:Stale calibration")
def test_nothing_is_left_of_what_was_not_saved(detector: om.Detector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got other weights"):
        flavour.save_model(detector, tmp_path / "m", factory=cases.FACTORY, weights=False)
    flavour.save_model(detector, tmp_path / "m", factory=cases.FACTORY)


def test_an_unfitted_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fitted detector"):
        flavour.save_model(om.Detector(cases.build()), tmp_path / "m", factory=cases.FACTORY)


# Predictions


X = cases.images(6, seed=1)
FORMS: dict[str, Any] = {
    "an array": X.numpy(),
    "an array of doubles": X.double().numpy(),
    "rows of numbers": X.flatten(1).numpy(),
    "a table": pd.DataFrame(X.flatten(1).numpy()),
    "a column of arrays": pd.DataFrame({"x": [row.numpy() for row in X]}),
    "a column of flat lists": pd.DataFrame({"x": X.flatten(1).tolist()}),
    "nested lists": X.tolist(),
    "a named array": {"x": X.numpy()},
}


@pytest.mark.parametrize("given", FORMS.values(), ids=FORMS)
def test_a_prediction_is_the_detectors_scores(
    given: Any, saved: Path, detector: om.Detector
) -> None:
    found = flavour._load_pyfunc(str(saved)).predict(given)
    assert list(found.columns) == COLUMNS
    assert_same(found, expected(detector, X))


def test_predictions_in_pieces_are_the_same(saved: Path, detector: om.Detector) -> None:
    x = cases.images(50, seed=2)
    model = mlflow.pyfunc.load_model(str(saved), model_config={"batch_size": 7})
    assert_same(model.predict(x.numpy()), expected(detector, x))


def test_a_sample_that_is_not_finite_is_not_valid(saved: Path, detector: om.Detector) -> None:
    x = X.clone()
    x[2, 0, 0, 0] = float("nan")
    found = mlflow.pyfunc.load_model(str(saved)).predict(x.numpy())
    assert found["valid"].tolist() == [True, True, False, True, True, True]
    assert found.loc[2, ["score", "p_value", "log_likelihood"]].isna().all()
    others = [0, 1, 3, 4, 5]
    same = expected(detector, X[others])
    assert_same(found.iloc[others].reset_index(drop=True), same)


def test_no_sample_has_no_row(saved: Path) -> None:
    found = flavour._load_pyfunc(str(saved)).predict(np.empty((0, 1, 4, 4), np.float32))
    assert found.shape == (0, 4)


@pytest.mark.parametrize(
    "given",
    [np.zeros((3, 1, 5, 5), np.float32), np.array([["a"]]), np.float32(1.0), {"a": X, "b": X}],
    ids=["another size", "text", "a number", "two inputs"],
)
def test_inputs_that_are_none_are_refused(given: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match="Expected"):
        flavour._load_pyfunc(str(saved)).predict(given)


BYTES = (X * 255).to(torch.uint8).numpy()


@pytest.mark.parametrize(
    "given",
    [BYTES, BYTES.astype(np.int64), pd.DataFrame({"x": list(BYTES)}), {"x": BYTES}],
    ids=["bytes", "whole numbers", "a column of bytes", "named bytes"],
)
def test_whole_numbers_where_real_ones_were_fitted_are_refused(given: Any, saved: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected torch.float32, got torch.(uint8|int64).*/ 255"):
        flavour._load_pyfunc(str(saved)).predict(given)


def test_a_batch_size_of_none_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="batch_size of at least 1, got 0"):
        mlflow.pyfunc.load_model(str(saved), model_config={"batch_size": 0})


def test_several_tensors_keep_their_order(tmp_path: Path) -> None:
    x, label = torch.randn(200, 6), torch.arange(200) % 2
    detector = om.Detector(cases.build_labelled()).fit([(x, label)], progress=False)
    factory = "support.flavour_cases:build_labelled"
    options: Any = {"factory": factory, "input_example": (x[:2], label[:2])}
    flavour.save_model(detector, tmp_path / "model", **options)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    found = model.predict({"1": label[:9].numpy(), "0": x[:9].numpy()})
    assert_same(found, expected(detector, (x[:9], label[:9])))


def test_a_mapping_reaches_the_adapter_by_name(tmp_path: Path) -> None:
    batch = {"x": torch.randn(200, 6), "label": torch.arange(200) % 2}
    detector = om.Detector(cases.build_named()).fit([batch], progress=False)
    example = {name: tensor[:2] for name, tensor in batch.items()}
    options: Any = {"factory": "support.flavour_cases:build_named", "input_example": example}
    flavour.save_model(detector, tmp_path / "model", **options)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    some = {name: tensor[:9] for name, tensor in batch.items()}
    found = model.predict({name: tensor.numpy() for name, tensor in reversed(some.items())})
    assert_same(found, expected(detector, some))


def test_several_tensors_need_an_example(tmp_path: Path) -> None:
    x, label = torch.randn(200, 6), torch.arange(200) % 2
    detector = om.Detector(cases.build_labelled()).fit([(x, label)], progress=False)
    with pytest.raises(ValueError, match="input_example, since the detector takes 2 tensors"):
        flavour.save_model(detector, tmp_path / "m", factory="support.flavour_cases:build_labelled")


# In a store


@pytest.fixture(scope="module")
def logged(detector: om.Detector, store: Path) -> Any:
    with mlflow.start_run():
        return flavour.log_model(
            detector,
            "detector",
            factory=cases.FACTORY,
            input_example=cases.images(2),
            registered_model_name="detector",
        )


def test_a_logged_model_is_registered_and_loads_by_name(logged: Any, detector: om.Detector) -> None:
    assert logged.registered_model_version == 1
    assert MlflowClient().get_model_version("detector", "1").status == "READY"
    tags = MlflowClient().get_logged_model(logged.model_id).tags
    assert tags["ood_monitor.method"] == detector.fitted.method
    x = cases.images(9, seed=1)
    for uri in (logged.model_uri, "models:/detector/1"):
        assert_same(mlflow.pyfunc.load_model(uri).predict(x.numpy()), expected(detector, x))
        assert torch.equal(flavour.load_model(uri).score(x).score, detector.score(x).score)


def test_the_scoring_server_answers_a_batch(saved: Path, detector: om.Detector) -> None:
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    client = TestClient(init(mlflow.pyfunc.load_model(str(saved))))
    answer = client.post("/invocations", json={"inputs": X.tolist()})
    assert answer.status_code == 200, answer.text
    assert_same(pd.DataFrame(answer.json()["predictions"])[COLUMNS], expected(detector, X))
    assert client.post("/invocations", json={"inputs": [[[[1.0]]]]}).status_code == 400
    assert client.get("/health").status_code == 200


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def server(saved: Path, tmp_path: Path) -> Iterator[str]:
    """The address of `mlflow models serve`, a process of its own."""
    script = tmp_path / "uvicorn"  # which MLflow looks for on the path, and not in this environment
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m uvicorn "$@"\n')
    script.chmod(0o755)
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(saved)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--env-manager", "local"]
    process = subprocess.Popen(command, env=os.environ | paths, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(address: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None
            time.sleep(0.5)
    raise TimeoutError(address)


@pytest.mark.slow
def test_a_server_answers_a_batch(server: str, detector: om.Detector) -> None:
    request = urllib.request.Request(
        f"{server}/invocations",
        json.dumps({"inputs": X.tolist()}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = pd.DataFrame(json.load(answer)["predictions"])[COLUMNS]
    assert_same(found, expected(detector, X))


# Evaluation


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluator by its name, also where another checkout is installed."""
    if not _model_evaluation_registry.is_registered("ood_monitor"):
        monkeypatch.setitem(_model_evaluation_registry._registry, "ood_monitor", DetectorEvaluator)


def labelled(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """As many foreign samples, all but blank, as others, in rows."""
    normal = cases.images(count, seed=3).flatten(1)
    foreign = 0.5 + 0.05 * cases.images(count, seed=4).flatten(1)
    x = torch.cat([normal, foreign]).numpy()
    return x, np.repeat([0, 1], count)


@pytest.mark.usefixtures("evaluator")
def test_an_evaluation_has_auroc_and_false_alarms(logged: Any, detector: om.Detector) -> None:
    x, labels = labelled()
    with mlflow.start_run() as run:
        result = mlflow.models.evaluate(
            logged.model_uri,
            x,
            targets=labels,
            model_type=MODEL_TYPE,
            evaluators="ood_monitor",
            evaluator_config={"fpr": 0.05},
        )
    metrics = result.metrics
    p_value = detector.score(torch.from_numpy(x).view(-1, 1, 4, 4)).p_value.numpy()
    assert metrics["ood/false_alarm_rate"] == (p_value[:200] <= 0.05).mean()
    assert metrics["ood/detection_rate"] == (p_value[200:] <= 0.05).mean()
    assert metrics["ood/auroc"] > 0.9
    low, high = metrics["ood/false_alarm_rate_low"], metrics["ood/false_alarm_rate_high"]
    assert low <= metrics["ood/false_alarm_rate"] <= high
    assert MlflowClient().get_run(run.info.run_id).data.metrics.items() >= metrics.items()


@pytest.mark.usefixtures("evaluator")
def test_a_gate_lets_a_good_model_pass_and_stops_another(logged: Any) -> None:
    x, labels = labelled()
    table = pd.DataFrame(x).assign(label=labels)
    with mlflow.start_run():
        result = mlflow.models.evaluate(
            logged.model_uri,
            table,
            targets="label",
            model_type=MODEL_TYPE,
            evaluators="ood_monitor",
            evaluator_config={"fpr": 0.05},
        )
    gate = {
        "ood/auroc": MetricThreshold(threshold=0.9, greater_is_better=True),
        "ood/false_alarm_rate_low": MetricThreshold(threshold=0.05, greater_is_better=False),
    }
    mlflow.validate_evaluation_results(candidate_result=result, validation_thresholds=gate)
    strict = {"ood/auroc": MetricThreshold(threshold=1.0, greater_is_better=True)}
    reverse = 1 - labels
    with mlflow.start_run():
        bad = mlflow.models.evaluate(
            logged.model_uri,
            pd.DataFrame(x).assign(label=reverse),
            targets="label",
            model_type=MODEL_TYPE,
            evaluators="ood_monitor",
        )
    with pytest.raises(mlflow.exceptions.MlflowException, match="ood/auroc"):
        mlflow.validate_evaluation_results(candidate_result=bad, validation_thresholds=strict)


@pytest.mark.usefixtures("evaluator")
def test_a_table_of_scores_is_evaluated_without_a_model() -> None:
    table = pd.DataFrame({"score": [0.1, 0.2, 0.9, float("nan")], "label": [0, 0, 1, 1]})
    with mlflow.start_run():
        result = mlflow.models.evaluate(
            data=table,
            predictions="score",
            targets="label",
            evaluators="ood_monitor",
            model_type=MODEL_TYPE,
        )
    assert result.metrics == {
        "ood/samples": 4,
        "ood/invalid": 1,
        "ood/auroc": 1.0,
        "ood/average_precision": 1.0,
    }


@pytest.mark.usefixtures("evaluator")
@pytest.mark.parametrize(
    ("labels", "config", "told"),
    [([0, 2, 1], {}, "labels of 0 and 1"), ([0, 0, 1], {"fpr": 1.5}, r"fpr in \(0, 1\), got 1.5")],
    ids=["labels", "fpr"],
)
def test_an_evaluation_that_makes_no_sense_is_refused(
    labels: list[int], config: dict[str, float], told: str
) -> None:
    table = pd.DataFrame({"score": [0.1, 0.2, 0.3], "label": labels})
    with mlflow.start_run(), pytest.raises(ValueError, match=told):
        mlflow.models.evaluate(
            data=table,
            predictions="score",
            targets="label",
            evaluators="ood_monitor",
            model_type=MODEL_TYPE,
            evaluator_config=config,
        )


@pytest.mark.usefixtures("evaluator")
def test_models_of_others_are_evaluated_as_ever() -> None:
    table = pd.DataFrame({"a": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0], "p": [1.0, 2.0, 4.0]})
    with mlflow.start_run():
        result = mlflow.models.evaluate(
            data=table, predictions="p", targets="y", model_type="regressor"
        )
    assert not [name for name in result.metrics if name.startswith("ood/")]
    assert not DetectorEvaluator.can_evaluate(model_type="classifier", evaluator_config={})


def test_the_entry_point_is_the_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.utils.plugins import get_entry_points

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "ood_monitor-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ood-monitor\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in groups["mlflow.model_evaluator"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[mlflow.model_evaluator]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {entry.name: entry for entry in get_entry_points("mlflow.model_evaluator")}
    assert found["ood_monitor"].load() is DetectorEvaluator
