"""Detectors in checkpoints: of PyTorch Lightning in a callback's state, or in a folder beside.

The callback keeps in a checkpoint what ``state_dict`` of a detector gives. A checkpoint of weights
alone has no callbacks: what belongs to it is in the folder ``<checkpoint>.detector``, as
``save_pretrained`` writes it. A checkpoint of transformers' Trainer is itself a folder, with a file
of the model of the same name, so that a detector is in a folder inside it. Nothing here takes
Lightning or transformers, and nothing is unpickled but what ``weights_only`` allows.
"""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from ood_monitor.saving.fingerprints import digest
from ood_monitor.saving.fitted import CONFIG, TENSORS, Fitted

__all__ = ["State", "check_there", "folder_beside", "folder_inside", "of_weights", "states_of"]

#: What ``state_dict`` of a detector gives: "config", a text, and "tensors", bytes.
State: TypeAlias = Mapping[str, Any]

#: Lightning's key of a callback that goes by a name, of any class.
_NAMED = re.compile(r"[^{]*\{'name': (.*)\}", re.DOTALL)

#: The name of a callback that was given none, and what a folder's name should not hold.
_USUAL, _FOREIGN = "OODMonitor", re.compile(r"[^A-Za-z0-9_-]")

#: What a sharded checkpoint, which is a folder, has beside its shards.
_UNSHARDED = "meta.pt"


def folder_beside(path: Path, name: str = _USUAL) -> Path:
    """The folder of the detector that belongs to a checkpoint without callbacks.

    Of callbacks with names of their own, each has a folder of its own.
    """
    own = "" if name == _USUAL else f".{_FOREIGN.sub('_', name)}"
    return path.parent / f"{path.name}{own}.detector"


def folder_inside(path: Path, name: str = _USUAL) -> Path:
    """The folder of the detector of a checkpoint that is a folder, of each name its own."""
    own = "" if name == _USUAL else f".{_FOREIGN.sub('_', name)}"
    return path / f"ood_monitor{own}"


def check_there(path: Path, name: str = _USUAL) -> None:
    """Refuse a path where nothing is that could hold a detector.

    Raises:
        FileNotFoundError: It is one.
    """
    beside = _saved_beside(path, name)
    inside = _saved_inside(path, name)
    folders = [folder for folder in (inside, path, beside) if (folder / CONFIG).is_file()]
    if not folders and _file_of(path) is None:
        raise FileNotFoundError(
            f"Expected a checkpoint in {path}, or a saved detector there or in {beside}, got no "
            f"checkpoint and no {CONFIG}."
        )


def states_of(path: Path, name: str) -> tuple[State, ...]:
    """The detectors that a checkpoint holds under a name, then that of the folder beside it.

    Args:
        path: A checkpoint, or the folder of a saved detector, which is then the only one.
        name: Of the callback.

    Returns:
        At least one.

    Raises:
        FileNotFoundError: There is neither a checkpoint nor a folder, or a file of the folder is
            missing.
        ValueError: No detector is there, or the file is no checkpoint of Lightning, or one that
            does not load as weights only.
    """
    check_there(path, name)
    for folder in (_saved_inside(path, name), path):
        if (folder / CONFIG).is_file():
            return (_of_folder(folder),)
    file, beside = _file_of(path), _saved_beside(path, name)
    callbacks = {} if file is None else _callbacks(file)
    found = [state for own, state in _detectors(callbacks) if own == repr(name)]
    if (beside / CONFIG).is_file():
        found.append(_of_folder(beside))
    if not found:
        raise ValueError(_absence(path, name, callbacks))
    return tuple(found)


def of_weights(states: Sequence[State], module: nn.Module) -> State:
    """Of several, the detector that was fitted on a model's weights; the first if none was.

    Weights are read only where there are several; of shards that takes all processes.

    Raises:
        ValueError: A state is damaged.
    """
    if len(states) == 1:
        return states[0]
    weights = digest(module)
    own = (s for s in states if Fitted.parse(s["config"], s["tensors"])[0].model == weights)
    return next(own, states[0])


def _saved_beside(path: Path, name: str) -> Path:
    """The folder of a name, else the usual one, which people save into themselves."""
    places = [folder_beside(at, of) for at in (path, path.resolve()) for of in (name, _USUAL)]
    return next((place for place in places if (place / CONFIG).is_file()), folder_beside(path))


def _saved_inside(path: Path, name: str) -> Path:
    """Likewise of a checkpoint that is a folder."""
    places = [folder_inside(path, of) for of in (name, _USUAL)]
    return next((place for place in places if (place / CONFIG).is_file()), places[0])


def _file_of(path: Path) -> Path | None:
    """What of a checkpoint is not shards."""
    return next((file for file in (path, path / _UNSHARDED) if file.is_file()), None)


def _of_folder(folder: Path) -> State:
    # What is not UTF-8 is damaged: the checksum says so.
    config = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    return {"config": config, "tensors": (folder / TENSORS).read_bytes()}


def _callbacks(file: Path) -> dict[str, Any]:
    """Their states by Lightning's keys; none of a checkpoint of weights alone."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a damaged file anything
        raise ValueError(_refusal(file, error)) from error
    found = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(
            f"Expected a checkpoint of PyTorch Lightning in {file}, got a file of another kind."
        )
    return {str(key): state for key, state in found.items()}


def _refusal(file: Path, error: Exception) -> str:
    """Why a file is not read: what it holds beside weights, by name, or that it is damaged."""
    unsafe: list[str] = []
    if isinstance(error, pickle.UnpicklingError):
        with suppress(Exception):  # of a damaged file they cannot be told
            unsafe = sorted(get_unsafe_globals_in_checkpoint(str(file)))
    if not unsafe:
        said = str(error).partition("\n")[0]
        return f"Expected a checkpoint in {file}, got a file that PyTorch cannot read: {said}"
    return (
        f"Expected a checkpoint that loads as weights only in {file}, got one with "
        f"{', '.join(unsafe)}: to unpickle these may run code of the file. If you trust them, "
        "allow them by `torch.serialization.safe_globals`; or leave them out of what is saved, "
        "such as hyperparameters."
    )


def _detectors(callbacks: Mapping[str, Any]) -> Iterator[tuple[str, State]]:
    """Of each callback that keeps a detector, its name as Python writes it, and the state."""
    for key, state in callbacks.items():
        named = _NAMED.fullmatch(key)
        if named is not None and isinstance(state, Mapping) and {"config", "tensors"} <= {*state}:
            yield named[1], state


def _absence(path: Path, name: str, callbacks: Mapping[str, Any]) -> str:
    beside = _saved_beside(path, name)
    names = [own for own, _ in _detectors(callbacks)]
    told = f"detectors of the names {', '.join(names)}" if names else "no detector"
    save = f"save it by `detector.save_pretrained({str(beside)!r})`, or a checkpoint once it is"
    remedy = "give one of these as `name=`" if names else f"{save} fitted, callbacks included"
    return (
        f"Expected a detector of the name {name!r} in {path}, or one in {beside}, got {told} among "
        f"the callbacks {sorted(callbacks)}, and no such folder: {remedy}."
    )
