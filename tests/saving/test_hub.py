"""Detectors on a Hub, a real server on loopback; the client's processes are fresh ones.

``huggingface_hub`` reads its environment when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import TOKEN, Hub, served
from support.pickles import pickles_in
from support.small_cases import SMALL

import ood_monitor as om
from ood_monitor.saving.hub import is_repository

TESTS = Path(__file__).parents[1]
BRANCHES = SMALL["branches"]

WORKER = f"""
import json, sys
sys.path.insert(0, {str(TESTS)!r})
import ood_monitor as om
from support.small_cases import SMALL
B = SMALL["branches"]
def fitted(seed=0):
    return om.Detector(B(), seed=seed).fit([B.data(100, seed=seed)], progress=False)
def load(name="me/detector", **options):
    return om.Detector.from_pretrained(name, B(), **options).fitted.fingerprint
def refused(name="me/detector", **options):
    try:
        load(name, **options)
    except FileNotFoundError as error:
        return str(error)
    raise AssertionError("loaded")
for line in sys.stdin:
    print(json.dumps(eval(json.loads(line))), flush=True)
"""


class Client:
    """A process that answers expressions, with an environment and a cache of its own."""

    def __init__(self, hub: Hub, home: Path, **environment: str) -> None:
        given = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER],
            env=os.environ | given | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, expression: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(expression), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)


@contextmanager
def client_of(hub: Hub, home: Path, **environment: str) -> Iterator[Client]:
    client = Client(hub, home, **environment)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    with client_of(hub, home) as client:
        yield client


@pytest.fixture(scope="module")
def pushed(hub: Hub, client: Client) -> dict[str, str]:
    """Two versions, one after the other: address and fingerprint of each."""
    base = "base_model='me/flow', base_model_revision='v1'"
    urls = [client(f"fitted({i}).push_to_hub('me/detector', {base})") for i in (0, 1)]
    prints = client("[fitted().fitted.fingerprint, fitted(1).fitted.fingerprint]")
    return dict(zip(("url_1", "url_2", "first", "second"), [*urls, *prints], strict=True))


def test_a_push_is_one_commit_each(hub: Hub, pushed: dict[str, str]) -> None:
    repository = hub.repositories["me/detector"]
    assert len(repository.commits) == 3  # the first is the Hub's own
    assert pushed["url_2"] == f"{hub.url}/me/detector/commit/{repository.refs['main']}"


def test_what_is_pushed_is_the_detector_its_card_and_no_pickle(
    hub: Hub, pushed: dict[str, str]
) -> None:
    repository = hub.repositories["me/detector"]
    files = repository.commits[repository.refs["main"]]
    expected = {"config.json", "detector.safetensors", "README.md", "calibration.png"}
    assert files.keys() - {".gitattributes"} == expected
    assert not any(pickles_in(content) for content in files.values())
    card = files["README.md"].decode()
    assert "base_model: me/flow" in card
    assert 'from_pretrained("me/detector"' in card
    assert pushed["second"] in card


def test_a_pull_gives_the_newest(client: Client, pushed: dict[str, str]) -> None:
    assert client("load()") == pushed["second"]


def test_a_pinned_revision_gives_that_one(client: Client, pushed: dict[str, str]) -> None:
    commit = pushed["url_1"].rsplit("/", 1)[1]
    assert client(f"load(revision={commit!r})") == pushed["first"]


def test_a_pulled_detector_loads_without_the_hub(
    hub: Hub, client: Client, home: Path, pushed: dict[str, str]
) -> None:
    commit = pushed["url_1"].rsplit("/", 1)[1]
    both = f"[load(), load(revision={commit!r})]"
    client(both)
    before = len(hub.requests)
    assert client("load(local_files_only=True)") == pushed["second"]
    with client_of(hub, home, HF_HUB_OFFLINE="1") as offline:
        assert offline(both) == [pushed["second"], pushed["first"]]
    assert len(hub.requests) == before


def test_a_cache_of_ones_own_is_used(
    client: Client, pushed: dict[str, str], tmp_path: Path
) -> None:
    client(f"load(cache_dir={str(tmp_path)!r})")
    assert list(tmp_path.glob("models--me--detector/snapshots/*/config.json"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("'me/nothing'", "'me/nothing', got:"),
        ("revision='v9'", "'me/detector' at revision 'v9', got:"),
        ("local_files_only=True, cache_dir='empty'", "'me/detector', got:"),
    ],
    ids=["repository", "revision", "download"],
)
def test_what_is_missing_is_named(
    arguments: str, told: str, client: Client, pushed: dict[str, str]
) -> None:
    message = client(f"refused({arguments})")
    assert f"Expected a detector in a folder or a repository {told}" in message


def test_a_repository_without_a_detector_names_the_file(client: Client) -> None:
    client("str(__import__('huggingface_hub').HfApi().create_repo('me/empty'))")
    assert "config.json" in client("refused('me/empty')")


def test_a_private_repository_asks_for_the_token(hub: Hub, client: Client, tmp_path: Path) -> None:
    client("fitted().push_to_hub('me/private', private=True)")
    assert hub.repositories["me/private"].private
    with client_of(hub, tmp_path, HF_TOKEN="") as stranger:
        assert "'me/private', got: " in stranger("refused('me/private')")
        assert len(stranger(f"load('me/private', token={TOKEN!r})")) == 12


def test_a_hub_out_of_reach_is_told(tmp_path: Path) -> None:
    with served() as gone:
        pass
    with client_of(gone, tmp_path) as client:
        assert "'me/detector', got:" in client("refused()")


def test_a_readme_of_the_users_is_not_written_over(hub: Hub, client: Client) -> None:
    client("fitted().push_to_hub('me/own')")
    repository = hub.repositories["me/own"]
    files = repository.commits[repository.refs["main"]]
    repository.commit(files | {"README.md": b"# Mine\n"}, "main")
    client("fitted(1).push_to_hub('me/own')")
    files = repository.commits[repository.refs["main"]]
    assert files["README.md"] == b"# Mine\n"
    assert json.loads(files["config.json"])["options"]["seed"] == 1


def test_a_branch_is_pushed_to_and_pulled_from(hub: Hub, client: Client) -> None:
    client("fitted().push_to_hub('me/branches')")
    repository = hub.repositories["me/branches"]
    repository.refs["next"] = repository.refs["main"]
    client("fitted(1).push_to_hub('me/branches', revision='next')")
    main, new = client("[load('me/branches'), load('me/branches', revision='next')]")
    assert [main, new] == client("[fitted().fitted.fingerprint, fitted(1).fitted.fingerprint]")


# Which names are folders


def test_a_folder_goes_before_a_repository_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    detector = om.Detector(BRANCHES()).fit([BRANCHES.data(100)], progress=False)
    detector.save_pretrained("me/detector", card=False)
    found = om.Detector.from_pretrained("me/detector", BRANCHES())
    assert found.fitted.fingerprint == detector.fitted.fingerprint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/detector", True),
        ("me/detector-2.0_b", True),
        ("detector", False),
        ("./detector", False),
        ("../a", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("~/detector", False),
        ("a\\b", False),
        (Path("me/detector"), False),
    ],
    ids=str,
)
def test_a_repository_is_an_owner_and_a_name(name: Any, expected: bool) -> None:
    assert is_repository(name) is expected
