"""Saved and loaded: to a folder, to the Hub, to a checkpoint."""

import abc
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeAlias

from torch import Tensor

from ood_monitor.adapters.base import Adapter, Batch
from ood_monitor.calibration.diagnostics import Diagnosis
from ood_monitor.checks import path_of, text
from ood_monitor.saving import hub
from ood_monitor.saving.card import save_card
from ood_monitor.saving.checkpoints import of_weights, states_of
from ood_monitor.saving.fitted import Fitted

__all__ = ["Groups", "Pretrained"]

#: Gives the group of each sample of a batch.
Groups: TypeAlias = Callable[[Batch], Tensor | Sequence[Any]]


class Pretrained(abc.ABC):
    """A fitted detector's ways to files and back; :class:`~ood_monitor.Detector` is the one."""

    @property
    @abc.abstractmethod
    def fitted(self) -> Fitted:
        """What was learned."""

    @abc.abstractmethod
    def _options(self) -> dict[str, Any]:
        """Its own settings, JSON-able."""

    @classmethod
    @abc.abstractmethod
    def _restored(
        cls, fitted: Fitted, options: dict[str, Any], adapter: Adapter, groups: Groups | None
    ) -> Self:
        """The detector that has learned this, with these settings."""

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        *,
        base_model: str | None = None,
        base_model_revision: str | None = None,
        diagnosis: Diagnosis | None = None,
        card: bool = True,
    ) -> None:
        """Write ``detector.safetensors`` and ``config.json``; the model itself is not saved.

        A model card, ``README.md``, comes beside them with a figure, ``calibration.png``, where
        matplotlib is installed. A README that you wrote or changed is left alone.

        Args:
            directory: The folder, made if need be.
            base_model: Name on the Hub of the model that is watched, if it does not say it itself.
            base_model_revision: Its commit.
            diagnosis: Of :func:`~ood_monitor.diagnose`, for the card.
            card: Whether there is a card.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: ``layers`` is a function, which no file can hold; give name patterns.
        """
        folder = path_of("directory", directory)
        fitted = self.fitted.based_on(base_model, base_model_revision)
        fitted.save(folder, self._options())
        if card:
            save_card(folder, fitted, self._options(), diagnosis=diagnosis)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        base_model_revision: str | None = None,
        diagnosis: Diagnosis | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload detector",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, in one commit; the repository is made.

        Args:
            repo_id: Name of the repository, ``"owner/name"``.
            base_model: As for :meth:`save_pretrained`.
            base_model_revision: As for :meth:`save_pretrained`.
            diagnosis: As for :meth:`save_pretrained`.
            private: Whether a new repository is private; None takes the owner's default.
            revision: An existing branch; by default ``main``.
            token: A token for the Hub; by default the one that you are logged in with.
            commit_message: The message of the commit.

        Returns:
            The commit's address.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: As :meth:`save_pretrained`.
            huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
        """
        fitted = self.fitted.based_on(base_model, base_model_revision)
        options = self._options()

        def write(directory: Path, readme: str | None) -> None:
            fitted.save(directory, options)
            save_card(directory, fitted, options, name=repo_id, diagnosis=diagnosis, there=readme)

        repository = hub.Repository(repo_id, revision, token)
        return repository.push(write, private=private, message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        adapter: Adapter,
        *,
        groups: Groups | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        cache_dir: str | PathLike[str] | None = None,
    ) -> Self:
        """Read what :meth:`save_pretrained` wrote, from a folder or from the Hub.

        Args:
            name_or_path: The folder, or the repository, ``"owner/name"``, where no such folder is.
            adapter: The model that the detector was fitted on.
            groups: The function that gave the groups, if it was fitted with one.
            revision: A branch, tag or commit of the repository.
            token: A token for the Hub; by default the one that you are logged in with.
            local_files_only: Whether to look only at what was downloaded before.
            cache_dir: Where downloads are kept.

        Raises:
            FileNotFoundError: A file or the repository is missing, or not yours to read.
            ValueError: A file where a folder was expected, a damaged file, a newer format, a model
                with other layers, or ``groups`` given although there were none, or missing.

        Warns:
            UserWarning: The calibration is stale, since the model has other weights or another
                precision than at the fit; or the adapter has other arguments, such as its seed or
                noise levels.
        """
        directory = path_of("name_or_path", name_or_path)
        if directory.is_file():
            raise ValueError(
                f"Expected the folder of a detector, or a repository on the Hub, got the file "
                f"{directory}: the detector in a checkpoint is read by `from_checkpoint`."
            )
        if not directory.is_dir() and hub.is_repository(name_or_path):
            repository = hub.Repository(str(name_or_path), revision, token)
            directory = repository.pull(local_files_only=local_files_only, cache_dir=cache_dir)
        return cls._restored(*Fitted.load(directory), adapter, groups)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | PathLike[str],
        adapter: Adapter,
        *,
        name: str = "OODMonitor",
        groups: Groups | None = None,
    ) -> Self:
        """Read what the Lightning callback left in a checkpoint; Lightning is not needed.

        A checkpoint of weights alone has no callbacks: the detector is then in the folder
        ``<path>.detector``, as :meth:`save_pretrained` writes it. If both are there, it is the one
        that was fitted on these weights. The file is loaded as weights only, without pickle.

        Args:
            path: The checkpoint, sharded or not.
            adapter: The adapter that the detector was fitted with: the LightningModule's own
                ``adapter()``, or `LogLikelihood(module)` of the whole module if it has none.
            name: The callback's name.
            groups: As for :meth:`from_pretrained`.

        Raises:
            FileNotFoundError: There is neither a checkpoint nor a folder.
            ValueError: No detector of this name is there, the file does not load as weights only,
                or as :meth:`from_pretrained`.

        Warns:
            UserWarning: As :meth:`from_pretrained`.
        """
        place = path_of("path", path)
        states = states_of(place, text("name", name))
        try:
            state = of_weights(states, adapter.module)
            fitted, options = Fitted.parse(state["config"], state["tensors"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        return cls._restored(fitted, options, adapter, groups)

    def state_dict(self) -> dict[str, str | bytes]:
        """What :meth:`save_pretrained` writes, as primitives for a checkpoint.

        Raises:
            RuntimeError: The detector is not fitted.
            ValueError: ``layers`` is a function.
        """
        config, tensors = self.fitted.dump(self._options())
        return {"config": config, "tensors": tensors}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], adapter: Adapter, *, groups: Groups | None = None
    ) -> Self:
        """The detector whose :meth:`state_dict` this is; see :meth:`from_pretrained`.

        Raises:
            ValueError: As :meth:`from_pretrained`, or a part of the state is missing.
        """
        missing = sorted({"config", "tensors"} - state.keys())
        if missing:
            raise ValueError(f"Expected the state of a detector, got one without {missing}.")
        return cls._restored(*Fitted.parse(state["config"], state["tensors"]), adapter, groups)
