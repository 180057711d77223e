"""What a detector learned, as numbers, and its files: safetensors and JSON, never pickle."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ood_monitor.adapters.base import SampleKind
from ood_monitor.calibration.conformal import ConformalPValue, samples_for
from ood_monitor.calibration.groups import GroupedPValue
from ood_monitor.calibration.usual import Usual
from ood_monitor.densities import Array
from ood_monitor.densities.features import layer_of
from ood_monitor.densities.joined import Joined
from ood_monitor.densities.parts import OF_DENOISERS, Method
from ood_monitor.saving.fingerprints import digest
from ood_monitor.saving.format import check_arrays, check_settings, strict_json
from ood_monitor.saving.parts import arrays_of, dump_part, parse_joined
from ood_monitor.saving.probe import Probe
from ood_monitor.saving.provenance import Provenance
from ood_monitor.whole_files import replace_files

__all__ = ["CONFIG", "FORMAT", "TENSORS", "Fitted", "digest"]

#: The file of a saved detector that people can read.
CONFIG = "config.json"
#: The file with its numbers.
TENSORS = "detector.safetensors"

_log = logging.getLogger(__name__)

#: Version of the two files together; a newer one is refused. It grows when an older reader would
#: misread what a newer one wrote, not when there is more to read.
FORMAT = 2


@dataclass(frozen=True)
class Fitted:
    """What fitting learned, and nothing that scoring changes.

    Attributes:
        joined: The parts, each with its live columns and their density.
        method: The detector's method, ``"parts"`` for parts that were chosen one by one.
        sample: What a sample is, as the adapter said.
        reason: Why this method and these parts, in words.
        calibration: Scores of the calibration samples.
        log_likelihood: (n,), nats, of the calibration samples, in the order of their scores' fit.
        parameters: Shapes of the parameters that are features, in module order.
        layer_mean: (L,), mean over the fit samples of the layer's mean log squared norm, over its
            live features, or of the term's value.
        layer_sd: (L,), its standard deviation.
        samples: Shape and dtype of each tensor of a batch, without B; empty if they varied.
        model: Digest of the weights, persistent buffers included.
        dtype: Floating-point type of the weights.
        fit_count: Samples that the density was fitted on.
        grouped: Scores of the calibration samples by group, if these were told apart.
        groups_of_adapter: Whether the adapter told them, by what is no part of the data; their mix
            is then not watched.
        provenance: How it was made.
        usual: What samples are explained by, if there is anything.
        probe: Some calibration samples and what was said of them; None if they had no names.
    """

    joined: Joined
    method: Method | Literal["parts"]
    sample: SampleKind | None
    reason: str
    calibration: ConformalPValue
    log_likelihood: Array
    parameters: dict[str, tuple[int, ...]]
    layer_mean: Array
    layer_sd: Array
    samples: tuple[str, ...]
    model: str
    dtype: str
    fit_count: int
    grouped: GroupedPValue | None = None
    provenance: Provenance = field(default_factory=Provenance)
    usual: Usual | None = None
    probe: Probe | None = None
    groups_of_adapter: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """What the live columns are of: "term/parameter", "term" or "part/name", in order."""
        return self.joined.layers

    @cached_property
    def expected_layers(self) -> dict[str, int]:
        """The layers whose expected norms are watched, and how many columns each has."""
        names = (
            name.partition("/")[2]
            for part in self.joined.parts
            if part.kind == "expected_norms"
            for name in part.columns.all_names
        )
        return dict(Counter(map(layer_of, names)))

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that identify what was learned."""
        return hashlib.sha256(save(self._arrays())).hexdigest()[:12]

    def p_value(self, scores: Array, groups: tuple[str, ...]) -> Array:
        """Of scores (B,), each within its group if the calibration samples have any."""
        if self.grouped is None:
            return self.calibration.p_value(scores)
        return self.grouped.p_value(scores, groups)

    def group(self, labels: tuple[str, ...], count: int) -> NDArray[np.int64] | None:
        """Of B samples, the place of each one's group; None without groups."""
        return None if self.grouped is None else self.grouped.indices(labels, count)

    def calibration_of(self, group: int) -> Array:
        """Calibration scores of a group, ascending; all of them without groups."""
        return self.calibration.scores if self.grouped is None else self.grouped.scores_of(group)

    def check_fpr(self, fpr: float) -> None:
        """Refuse a false-positive rate at which nothing is flagged; tell of groups where it is so.

        Raises:
            ValueError: The rate is not in (0, 1), or there are too few calibration samples.
        """
        (self.grouped or self.calibration).check_fpr(fpr)
        never = {} if self.grouped is None else self.grouped.never_flagged(fpr)
        if never:
            _log.warning(
                "Too few calibration samples to flag any sample at fpr %g in these groups (%d are "
                "needed): %s. [OOD108]",
                fpr,
                samples_for(fpr),
                ", ".join(f"{group!r} has {size}" for group, size in never.items()),
            )

    def based_on(self, base_model: str | None, revision: str | None) -> Self:
        """The same with the name of the model that is watched, where one is given."""
        if base_model is None and revision is None:
            return self
        if base_model is None:
            base_model = self.provenance.base_model
        elif revision is None and base_model == self.provenance.base_model:
            revision = self.provenance.base_model_revision
        provenance = replace(self.provenance, base_model=base_model, base_model_revision=revision)
        return replace(self, provenance=provenance)

    def save(self, directory: Path, options: dict[str, Any]) -> None:
        """Write the two files; ``options`` are the detector's own settings, JSON-able.

        Each is whole or as it was, whenever the process dies; of one new and one old the checksum
        says that they do not belong together.
        """
        config, tensors = self.dump(options)
        directory.mkdir(parents=True, exist_ok=True)
        replace_files({directory / TENSORS: tensors, directory / CONFIG: config.encode()})

    def dump(self, options: dict[str, Any]) -> tuple[str, bytes]:
        """The contents of the two files: JSON, and safetensors.

        Raises:
            ValueError: A density of your own, which no file can name.
        """
        config = {
            "format": FORMAT,
            "method": self.method,
            "sample": self.sample,
            "reason": self.reason,
            "parts": [dump_part(part) for part in self.joined.parts],
            "layers": list(self.layers),
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "samples": list(self.samples),
            "model": self.model,
            "dtype": self.dtype,
            "fit_count": self.fit_count,
            "calibration_count": len(self.calibration.scores),
            "fingerprint": self.fingerprint,
            "options": options,
        }
        if self.grouped is not None:
            config["groups"] = list(self.grouped.labels)
            config["large_groups"] = list(self.grouped.large)
        if self.groups_of_adapter:
            config["groups_of_adapter"] = True
        config |= self.provenance.dump()
        if self.usual is not None:
            config["explanation"] = self.usual.dump()
        if self.probe is not None:
            config["probe"] = self.probe.dump()
        tensors = save(self._arrays())
        config["checksum"] = _checksum(config, tensors)
        return json.dumps(config, indent=2) + "\n", tensors

    @classmethod
    def load(cls, directory: Path) -> tuple[Self, dict[str, Any]]:
        """Read the two files, as (fitted, options).

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged, of a newer format, or does not belong to the other.
        """
        config = (directory / CONFIG).read_bytes()
        tensors = (directory / TENSORS).read_bytes()
        try:
            return cls.parse(config, tensors)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error

    @classmethod
    def parse(cls, config: str | bytes, tensors: bytes) -> tuple[Self, dict[str, Any]]:
        """(fitted, options) from the contents of the two files.

        Raises:
            ValueError: They are damaged, of a newer format, or do not belong together.
        """
        settings = _settings(config)
        expected = settings.pop("checksum", None)
        if _checksum(settings, tensors) != expected:
            raise ValueError(
                f"Expected {CONFIG} and {TENSORS} with checksum {expected}, got another: they were "
                "changed, or do not belong together. Copy both again from where they were saved."
            )
        with _of_file(CONFIG):
            check_settings(settings)
        with _of_file(TENSORS):
            arrays = _read(tensors)
            check_arrays(arrays, settings)
        try:
            fitted, options = cls._from_parts(settings, arrays), dict(settings["options"])
        except (ArithmeticError, LookupError, TypeError) as error:  # of a density's own reading
            raise ValueError(f"Expected the files of a detector, got {error!r}.") from error
        kinds = {part.kind for part in fitted.joined.parts}
        if options.get("any_size") and not kinds <= OF_DENOISERS:
            raise ValueError(f"Expected any_size with parts of denoisers, got {sorted(kinds)}.")
        return fitted, options

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = arrays_of(self.joined)
        arrays |= {
            "calibration": self.calibration.scores,
            "log_likelihood": self.log_likelihood,
            "layer_mean": self.layer_mean,
            "layer_sd": self.layer_sd,
        }
        if self.grouped is not None:
            arrays["grouped"] = self.grouped.scores
        if self.usual is not None:
            arrays |= {f"explanation.{k}": v for k, v in self.usual.arrays().items()}
        return {name: np.ascontiguousarray(value) for name, value in arrays.items()}

    @classmethod
    def _from_parts(cls, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Self:
        return cls(
            joined=parse_joined(config["parts"], arrays),
            method=config["method"],
            sample=config["sample"],
            reason=str(config.get("reason", "")),
            calibration=ConformalPValue(arrays["calibration"]),
            log_likelihood=arrays["log_likelihood"],
            parameters={name: tuple(shape) for name, shape in config["parameters"].items()},
            layer_mean=arrays["layer_mean"],
            layer_sd=arrays["layer_sd"],
            samples=tuple(config["samples"]),
            model=str(config["model"]),
            dtype=str(config["dtype"]),
            fit_count=int(config["fit_count"]),
            grouped=_grouped(config, arrays),
            provenance=Provenance.parse(config),
            usual=_usual(config, arrays),
            probe=None if "probe" not in config else Probe.parse(config["probe"]),
            groups_of_adapter=config.get("groups_of_adapter", False),
        )


@contextmanager
def _of_file(name: str) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read(tensors: bytes) -> dict[str, np.ndarray]:
    try:
        return load(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # or a type numpy has not
        raise ValueError(f"Expected safetensors, got {error!r}.") from error


def _grouped(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> GroupedPValue | None:
    if "groups" not in config:
        return None
    groups = tuple(map(str, config["groups"]))
    return GroupedPValue(arrays["grouped"], groups, tuple(config["large_groups"]))


def _usual(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Usual | None:
    if "explanation" not in config:
        return None
    prefix = "explanation."
    own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return Usual.parse(config["explanation"], own)


def _checksum(settings: dict[str, Any], tensors: bytes) -> str:
    """Of both files' contents, so that one edited or swapped is found out."""
    text = json.dumps(settings, sort_keys=True).encode()
    return hashlib.sha256(text + b"\0" + tensors).hexdigest()


def _settings(config: str | bytes) -> dict[str, Any]:
    try:
        settings = strict_json(config)
    except ValueError as error:
        raise ValueError(f"Expected JSON in {CONFIG}, got {error}.") from error
    found = settings.get("format") if isinstance(settings, dict) else None
    if type(found) is not int or found != FORMAT:
        older = type(found) is int and found < FORMAT
        remedy = " It is of an earlier version: fit it again." if older else ""
        raise ValueError(
            f"Expected a detector of format {FORMAT} in {CONFIG}, got {found!r}.{remedy}"
        )
    return dict(settings)
