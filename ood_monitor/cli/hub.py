"""`ood-monitor push` and `ood-monitor pull`: a detector's files and the Hugging Face Hub."""

import glob
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import HfApi

from ood_monitor.cli.console import AsJson, Debug, checked, print_facts, say
from ood_monitor.cli.options import Directory
from ood_monitor.cli.recipe import RECIPE, Recipe
from ood_monitor.saving.fitted import CONFIG, Fitted

__all__ = ["pull", "push"]

#: What travels: numbers, text and figures, and nothing that could be run.
_SUFFIXES = (".safetensors", ".json", ".md", ".png")

_CARD = "README.md"

Repo = Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit.")]


@checked
def push(
    directory: Directory,
    repo: Repo,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="An existing branch; by default main.")
    ] = None,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload a detector",
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace the repository's README.md.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Upload a detector to the Hugging Face Hub; the model itself is not needed.

    Only .safetensors, .json, .md and .png files are sent. The path of your model, and the arguments
    of a function that makes it, stay here. Log in before by `hf auth login`, or set HF_TOKEN.

    \b
    Example:
        ood-monitor push runs/detector user/my-detector --private
    """
    Fitted.load(directory)  # nothing broken is sent
    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        _copy(directory, staged)
        if (staged / _CARD).exists() and not overwrite_card:
            _keep_card(api, repo, revision, staged)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=staged,
            revision=revision,
            commit_message=message,
        )
    facts = {"repository": repo, "commit": commit.oid, "url": str(commit.commit_url)}
    print_facts(facts, as_json=as_json)


@checked
def pull(
    repo: Repo,
    directory: Annotated[Path, typer.Argument(metavar="DETECTOR", help="The folder to write.")],
    revision: Revision = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a detector that is there.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    r"""Fetch a detector from the Hugging Face Hub, checked before it is written.

    Only .safetensors, .json, .md and .png files are taken. The other commands then ask for the
    model by --model: no file from elsewhere says what is run here.

    \b
    Example:
        ood-monitor pull user/my-detector runs/detector --revision 1f2e3d
        ood-monitor score runs/detector data/new --model runs/pipeline
    """
    if (directory / CONFIG).exists() and not overwrite:
        raise FileExistsError(
            f"Expected a new folder, got a detector in {directory}: `--overwrite` replaces it."
        )
    with tempfile.TemporaryDirectory() as name:
        fetched = _fetched(repo, revision, Path(name))
        fitted, _ = Fitted.load(fetched)
        directory.mkdir(parents=True, exist_ok=True)
        _copy(fetched, directory)
    facts: dict[str, Any] = {"detector": str(directory), "fingerprint": fitted.fingerprint}
    print_facts(facts, as_json=as_json)


def _keep_card(api: HfApi, repo: str, revision: str | None, staged: Path) -> None:
    """Do not send a card where there is one: somebody may have written in it."""
    if api.file_exists(repo, _CARD, revision=revision):
        (staged / _CARD).unlink()
        say(f"the {_CARD} of {repo} is kept: `--overwrite-card` replaces it.")


def _fetched(repo: str, revision: str | None, target: Path) -> Path:
    """The files that may travel, at one commit."""
    api = HfApi()
    found = api.model_info(repo, revision=revision)
    names = [file.rfilename for file in found.siblings or ()]
    wanted = [glob.escape(n) for n in names if "/" not in n and n.endswith(_SUFFIXES)]
    if not wanted:
        raise ValueError(f"Expected a detector in {repo}, got a repository with {names}.")
    return Path(
        api.snapshot_download(repo, revision=found.sha, local_dir=target, allow_patterns=wanted)
    )


def _copy(source: Path, target: Path) -> None:
    """What may travel of a folder, itself and not the folders in it."""
    for file in sorted(source.iterdir()):
        if file.suffix not in _SUFFIXES or not file.is_file():
            continue
        if file.name == RECIPE:
            (target / RECIPE).write_text(Recipe.load(source).shareable().to_json())
        else:
            shutil.copyfile(file, target / file.name)
