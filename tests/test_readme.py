"""The snippets of the README and of the documentation run, as a reader would type them."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.mlflow_server import Server

import ood_monitor as om

ROOT = Path(__file__).parent.parent

#: By page: its snippets, which run one after the other and share their names.
SNIPPETS: dict[str, int] = {
    "README.md": 3,
    "docs/alerts.md": 2,
    "docs/choosing.md": 6,
    "docs/index.md": 1,
    "docs/recipes/accelerate.md": 2,
    "docs/recipes/checkpoints.md": 3,
    "docs/recipes/conditional.md": 3,
    "docs/recipes/diffusers-service.md": 5,
    "docs/recipes/fabric.md": 2,
    "docs/recipes/lightning.md": 4,
    "docs/recipes/mlflow.md": 5,
    "docs/recipes/replicas.md": 1,
    "docs/recipes/restart.md": 3,
    "docs/recipes/spark.md": 1,
    "docs/recipes/tables.md": 3,
    "docs/recipes/transformers.md": 3,
    "docs/recipes/webhooks.md": 4,
    "docs/recipes/your-own-model.md": 4,
    "docs/tour.md": 6,
    "docs/tutorial.md": 9,
}

#: The page that takes a server of MLflow, and the one that takes a store of its own.
SERVED, STORED = "docs/recipes/mlflow.md", "docs/tutorial.md"

pytestmark = [
    # Lightning's advice, and its own use of a deprecated torch function.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


def blocks(page: str, language: str) -> list[str]:
    fenced = rf"^```{language}\n(.*?)^```"
    return re.findall(fenced, (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(page: str) -> dict[str, object]:
    names: dict[str, object] = {}
    for number, snippet in enumerate(blocks(page, "python")):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    return names


def test_every_snippet_is_counted() -> None:
    pages = ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
    found = {page: len(blocks(page, "python")) for page in pages}
    assert {page: count for page, count in found.items() if count} == SNIPPETS


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in SNIPPETS if page not in (SERVED, STORED)])
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(page)["om"] is om


@contextmanager
def mlflow_server(folder: Path) -> Iterator[None]:
    """A real one, to which MLflow goes by default."""
    import mlflow  # not for the pages that do without

    server = Server(folder)
    try:
        mlflow.set_tracking_uri(server.url)
        yield
    finally:
        mlflow.set_tracking_uri(None)
        server.kill()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what MLflow, served and evaluating, has to say of others
def test_the_snippets_for_mlflow_run_on_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as a script's own folder is
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")  # which MLflow sets; put back after the test
    with mlflow_server(tmp_path / "server"):
        names = run(SERVED)
    sys.modules.pop("flows")
    assert names["om"] is om
    assert names["changes"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's use of sqlalchemy
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow  # not for the pages that do without

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")  # which MLflow sets; put back after the test
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the whole process
    try:
        names = run(STORED)
    finally:
        mlflow.set_tracking_uri(None)
    kinds = [alert.kind for alert in names["alerts"]]  # type: ignore[attr-defined]
    assert "drift" in kinds
    assert (tmp_path / "mlflow.db").exists()


def test_the_alert_in_the_documentation_is_the_one_that_its_snippet_raises() -> None:
    (shown,) = blocks("docs/alerts.md", "json")
    names = run("docs/alerts.md")
    raised = json.loads(names["alert"].to_json())  # type: ignore[attr-defined]
    read = om.Alert.from_json(shown)
    assert json.loads(read.to_json()).keys() == raised.keys()
    for field in ("kind", "severity", "status", "stream"):
        assert getattr(read, field) == raised[field]
