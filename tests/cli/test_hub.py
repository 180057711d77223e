"""`ood-monitor push` and `pull`, against a Hub on loopback.

`huggingface_hub` reads its address when it is imported: the commands run in a process of their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cli_cases import grey_images, write_images
from support.hub_server import TOKEN, Hub, served
from typer.testing import CliRunner

import ood_monitor as om
from ood_monitor.cli import app

WORKER = """
import json, os, sys
from typer.testing import CliRunner
from ood_monitor.cli import app
for line in sys.stdin:
    arguments, token = json.loads(line)
    os.environ["HF_TOKEN"] = token
    result = CliRunner().invoke(app, arguments)
    print(json.dumps([result.exit_code, result.stdout, result.stderr]), flush=True)
"""

#: Runs a command with a token: exit code, stdout and stderr.
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    given = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=os.environ | given,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(*arguments: object, token: str = TOKEN) -> tuple[int, str, str]:
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([[str(a) for a in arguments], token]), file=process.stdin, flush=True)
        code, out, err = json.loads(process.stdout.readline())
        return code, out, err

    yield ask
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("held_out"), grey_images(240))


@pytest.fixture
def detector(held_out: Path, tmp_path: Path) -> Path:
    local("fit", "support.cli_cases:flow", held_out, tmp_path / "detector", "--arg", "hidden=4")
    (tmp_path / "detector" / "README.md").write_text("A card.\n")
    return tmp_path / "detector"


def local(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def succeeded(outcome: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = outcome
    assert code == 0, err
    return dict(json.loads(out))


def files_of(hub: Hub, name: str) -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs["main"]]


def test_a_detector_comes_back_as_it_was_pushed(
    run: Run, detector: Path, held_out: Path, tmp_path: Path
) -> None:
    pushed = succeeded(run("push", detector, "me/whole", "--json"))
    assert pushed["commit"] in pushed["url"]
    facts = succeeded(run("pull", "me/whole", tmp_path / "pulled", "--json"))
    for name in ("config.json", "detector.safetensors", "README.md"):
        assert (tmp_path / "pulled" / name).read_bytes() == (detector / name).read_bytes()
    assert facts["fingerprint"] == json.loads(local("show", detector, "--json"))["fingerprint"]
    scores = local("score", tmp_path / "pulled", held_out, "--model", "support.cli_cases:flow")
    assert scores == local("score", detector, held_out)


def test_only_what_may_travel_does(run: Run, hub: Hub, detector: Path) -> None:
    for name in ("weights.pkl", "notes.txt", ".env", "figure.png"):
        (detector / name).write_bytes(b"x")
    (detector / "deeper").mkdir()
    (detector / "deeper" / "more.json").write_text("{}")
    succeeded(run("push", detector, "me/some", "--json"))
    assert files_of(hub, "me/some").keys() - {".gitattributes", "calibration.png"} == {
        "README.md",
        "config.json",
        "detector.safetensors",
        "figure.png",
        "model.json",
    }


def test_where_the_model_lies_stays_here(run: Run, hub: Hub, detector: Path) -> None:
    succeeded(run("push", detector, "me/secretive", "--json"))
    recipe = json.loads(files_of(hub, "me/secretive")["model.json"])
    assert (recipe["model"], recipe["arguments"]) == (None, {})
    assert recipe["images"]["size"] == [4, 4]


def test_no_file_from_elsewhere_says_what_is_run_here(
    run: Run, hub: Hub, detector: Path, held_out: Path, tmp_path: Path
) -> None:
    succeeded(run("push", detector, "me/evil", "--json"))
    recipe = json.loads((detector / "model.json").read_text()) | {"model": "os:system"}
    files = files_of(hub, "me/evil") | {"model.json": json.dumps(recipe).encode()}
    hub.repositories["me/evil"].commit(files | {"run.py": b"", "a/b.json": b"{}"}, "main")
    succeeded(run("pull", "me/evil", tmp_path / "pulled", "--json"))
    assert "os:system" not in (tmp_path / "pulled" / "model.json").read_text()
    assert not {"run.py", "a"} & {file.name for file in (tmp_path / "pulled").iterdir()}
    result = CliRunner().invoke(app, ["score", str(tmp_path / "pulled"), str(held_out)])
    assert result.exit_code == 1
    assert "--model" in result.stderr


def test_a_detector_without_model_json_is_scored_by_model(
    detector: Path, held_out: Path, tmp_path: Path
) -> None:
    expected = local("score", detector, held_out)
    (detector / "model.json").unlink()
    assert local("score", detector, held_out, "--model", "support.cli_cases:flow") == expected
    inbox = write_images(tmp_path / "inbox", grey_images(2))
    local("watch", detector, inbox, "--once", "--model", "support.cli_cases:flow", "--fpr", 0.009)


def test_a_revision_is_pulled_as_it_was(
    run: Run, detector: Path, held_out: Path, tmp_path: Path
) -> None:
    first = succeeded(run("push", detector, "me/twice", "--json"))["commit"]
    before = (detector / "config.json").read_bytes()
    local("fit", "support.cli_cases:flow", held_out, detector, "--seed", 1, "--overwrite")
    succeeded(run("push", detector, "me/twice", "--json", "--message", "Fit again"))
    succeeded(run("pull", "me/twice", tmp_path / "new", "--json"))
    succeeded(run("pull", "me/twice", tmp_path / "old", "--revision", first, "--json"))
    assert (tmp_path / "old" / "config.json").read_bytes() == before
    assert (tmp_path / "new" / "config.json").read_bytes() != before


def test_a_card_on_the_hub_is_kept(run: Run, hub: Hub, detector: Path) -> None:
    succeeded(run("push", detector, "me/carded", "--json"))
    (detector / "README.md").write_text("Another card.\n")
    code, _, err = run("push", detector, "me/carded")
    assert (code, files_of(hub, "me/carded")["README.md"]) == (0, b"A card.\n")
    assert "--overwrite-card" in err
    succeeded(run("push", detector, "me/carded", "--overwrite-card", "--json"))
    assert files_of(hub, "me/carded")["README.md"] == b"Another card.\n"


def test_private_is_private(run: Run, hub: Hub, detector: Path, tmp_path: Path) -> None:
    succeeded(run("push", detector, "me/mine", "--private", "--json"))
    assert hub.repositories["me/mine"].private
    code, _, err = run("pull", "me/mine", tmp_path / "stolen", token="hf_other")
    assert code == 1
    assert not (tmp_path / "stolen").exists()
    assert "hf_other" not in err
    assert err.count("\n") == 1


def test_a_wrong_push_or_pull_is_one_line(run: Run, detector: Path, tmp_path: Path) -> None:
    succeeded(run("push", detector, "me/there", "--json"))
    for arguments, message in (
        (("pull", "me/missing", tmp_path / "d"), "me/missing"),
        (("pull", "me/there", tmp_path / "d", "--revision", "nowhere"), "nowhere"),
        (("pull", "me/there", detector), "--overwrite"),
        (("push", tmp_path, "me/empty"), "config.json"),
        (("push", detector, "me/there", "--revision", "nowhere"), "nowhere"),
    ):
        code, _, err = run(*arguments)
        assert (code, err.count("\n")) == (1, 1), err
        assert message in err
        assert TOKEN not in err
    assert not (tmp_path / "d").exists()


def test_a_damaged_detector_is_neither_pushed_nor_written(
    run: Run, hub: Hub, detector: Path, tmp_path: Path
) -> None:
    succeeded(run("push", detector, "me/broken", "--json"))
    files = files_of(hub, "me/broken")
    files = files | {"detector.safetensors": files["detector.safetensors"][:-1]}
    hub.repositories["me/broken"].commit(files, "main")
    assert run("pull", "me/broken", tmp_path / "pulled")[0] == 1
    assert not (tmp_path / "pulled").exists()
    (detector / "detector.safetensors").write_bytes(b"")
    assert run("push", detector, "me/never")[0] == 1
    assert "me/never" not in hub.repositories


def test_the_model_is_not_needed(run: Run, detector: Path, tmp_path: Path) -> None:
    recipe = json.loads((detector / "model.json").read_text())
    (detector / "model.json").write_text(json.dumps(recipe | {"model": "gone:away"}))
    succeeded(run("push", detector, "me/modelless", "--json"))
    succeeded(run("pull", "me/modelless", tmp_path / "pulled", "--json"))
    with pytest.raises(ValueError, match="layers"):
        om.Detector.from_pretrained(
            tmp_path / "pulled", om.LogLikelihood(om.models.Glow(channels=1, size=8))
        )
