"""Detectors on the Hugging Face Hub.

Composed of the Hub's client, not inherited from its ``ModelHubMixin``: the mixin deletes
``config.json`` before it saves, so that a crash costs the old detector too; parses it before
anything has checked it; hands its keys to ``Detector`` where an argument has the same name, as
``layers``, which are names in the one and patterns in the other; and has no place for the model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ood_monitor.checks import text
from ood_monitor.saving.fitted import CONFIG, TENSORS

__all__ = ["Repository", "is_repository"]

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_repository(name: str | PathLike[str]) -> bool:
    """Whether a name can be a repository's, ``"owner/name"``; a path object never is."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Repository:
    """A repository of a detector.

    Attributes:
        name: ``"owner/name"``.
        revision: A branch, tag or commit; ``main`` if None.
        token: For the Hub; the one that you are logged in with if None.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = None

    def __post_init__(self) -> None:
        """Checks the names.

        Raises:
            TypeError: One is no text.
            ValueError: One is empty.
        """
        text("a repository", self.name)
        if self.revision is not None:
            text("revision", self.revision)

    def pull(
        self, *, local_files_only: bool = False, cache_dir: str | PathLike[str] | None = None
    ) -> Path:
        """The folder with the detector's two files, both of one commit.

        Raises:
            FileNotFoundError: There is no such repository or revision, it is not yours to read, or
                the Hub is out of reach and nothing was downloaded before.
        """
        try:
            found = snapshot_download(
                self.name,
                revision=self.revision,
                token=self.token,
                local_files_only=local_files_only,
                cache_dir=None if cache_dir is None else str(cache_dir),
                allow_patterns=[CONFIG, TENSORS],
            )
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            at = "" if self.revision is None else f" at revision {self.revision!r}"
            raise FileNotFoundError(
                f"Expected a detector in a folder or a repository {self.name!r}{at}, got: {error}"
            ) from error
        return Path(found)

    def push(
        self,
        write: Callable[[Path, str | None], None],
        *,
        private: bool | None,
        message: str,
    ) -> str:
        """Upload a folder as one commit, to a repository that is made if need be.

        Args:
            write: Fills the folder, given the README that is there, or None.
            private: Whether a new repository is private.
            message: Of the commit.

        Returns:
            The commit's address.
        """
        api = HfApi(token=self.token)
        name = api.create_repo(self.name, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            write(Path(folder), self._readme(api, name))
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=message,
                revision=self.revision,
            )
        return str(commit.commit_url)

    def _readme(self, api: HfApi, name: str) -> str | None:
        with TemporaryDirectory() as folder:
            try:
                path = api.hf_hub_download(
                    name, "README.md", revision=self.revision, local_dir=folder
                )
            except LocalEntryNotFoundError:  # the Hub is out of reach
                raise
            except EntryNotFoundError:  # no other error may let us write over a README
                return None
            return Path(path).read_text(encoding="utf-8")
