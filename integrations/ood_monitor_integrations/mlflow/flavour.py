"""MLflow's flavour of a detector: logged, registered, served and run on Spark, without pickle.

A detector is nothing without its model. So beside the detector's own files a logged model says how
to build the adapter: by a function that can be imported, with JSON-able arguments and files that
are copied into the model, and holds the model's weights as safetensors::

    def build(width: int) -> om.Adapter:  # in package/models.py
        return om.LogLikelihood(Flow(width))

    flavour.log_model(
        detector, "detector", factory="package.models:build", arguments={"width": 64}
    )

With ``weights=False`` the function brings the weights itself: from a file of ``files``, or from a
base model by its name, as :mod:`ood_monitor_integrations.mlflow.pipelines` does for diffusers.
Loading a model imports and calls the function that it names, as MLflow does with any model's code,
if that says that it returns an adapter.
"""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import yaml
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.models.utils import _save_example
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.environment import _process_pip_requirements, _PythonEnv
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import (
    _add_code_from_conf_to_system_path,
    _get_flavor_configuration,
    _validate_and_copy_code_paths,
    _validate_and_prepare_target_save_path,
)

import ood_monitor
from ood_monitor import Detector
from ood_monitor.adapters.base import Batch, pieces
from ood_monitor.checks import path_of, text, whole
from ood_monitor.monitor.scoring import scored
from ood_monitor.saving import Fitted
from ood_monitor.saving.format import sample_of
from ood_monitor_integrations.mlflow.inputs import COLUMNS, Inputs
from ood_monitor_integrations.mlflow.recipes import (
    DETECTOR,
    FLAVOR_NAME,
    Recipe,
    recipe_of,
    save_weights,
)
from ood_monitor_integrations.mlflow.tags import METHOD

__all__ = ["FLAVOR_NAME", "load_model", "log_model", "save_model"]

_CONDA, _PYTHON, _REQUIREMENTS = "conda.yaml", "python_env.yaml", "requirements.txt"

#: What ``model_config=`` may set when a model is loaded: where it computes, and how many samples
#: are scored at once.
_OPTIONS: dict[str, Any] = {"device": None, "batch_size": 256}


def log_model(
    detector: Detector,
    name: str,
    *,
    factory: str,
    arguments: Mapping[str, Any] | None = None,
    files: Mapping[str, str | PathLike[str]] | None = None,
    weights: bool = True,
    groups: str | None = None,
    signature: ModelSignature | None = None,
    input_example: Batch | None = None,
    registered_model_name: str | None = None,
    **options: Any,
) -> ModelInfo:
    """Log a fitted detector as a model of the active run.

    Args:
        detector: Fitted.
        name: Of the model.
        factory: As :func:`save_model`; so are the next five.
        arguments: As there.
        files: As there.
        weights: As there.
        groups: As there.
        signature: As there.
        input_example: As there.
        registered_model_name: Registers the model as a new version of this one.
        **options: Further ones of :func:`save_model` and of ``mlflow.models.Model.log``; to
            ``tags`` the detector's method is added, as ``ood_monitor.method``.

    Returns:
        What MLflow knows of the model; its ``model_uri`` loads it.

    Raises:
        ValueError: As :func:`save_model`.
    """
    text("name", name)
    if registered_model_name is not None:
        text("registered_model_name", registered_model_name)
    # Before MLflow makes a run for it.
    inputs = Inputs.of(detector.fitted, input_example)
    recipe_of(detector, factory, arguments, files, weights, groups, inputs)
    tags = {METHOD: detector.fitted.method} | (options.pop("tags", None) or {})
    info: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        registered_model_name=registered_model_name,
        detector=detector,
        factory=factory,
        arguments=arguments,
        files=files,
        weights=weights,
        groups=groups,
        signature=signature,
        input_example=input_example,
        tags=tags,
        **options,
    )
    return info


def save_model(
    detector: Detector,
    path: str | PathLike[str],
    *,
    factory: str,
    arguments: Mapping[str, Any] | None = None,
    files: Mapping[str, str | PathLike[str]] | None = None,
    weights: bool = True,
    groups: str | None = None,
    signature: ModelSignature | None = None,
    input_example: Batch | None = None,
    code_paths: list[str] | None = None,
    pip_requirements: list[str] | None = None,
    extra_pip_requirements: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
    mlflow_model: Model | None = None,
) -> None:
    """Save a fitted detector in MLflow's format, and load it once, so that it can be.

    Args:
        detector: Fitted.
        path: The folder, which must not exist or be empty.
        factory: ``"package.module:function"`` that gives the adapter, and says so by its
            annotation, ``-> ood_monitor.Adapter``.
        arguments: Its keywords, JSON-able.
        files: Files and folders by keyword: they are copied into the model, and the function is
            given where they are.
        weights: Whether the model's weights are saved, to replace those that the function gives.
        groups: ``"package.module:function"``, the detector's ``groups`` if it has any; it says
            what it returns, a tensor or a sequence.
        signature: Of the model; by default what the detector was fitted on.
        input_example: A batch as the detector takes it, of a few samples.
        code_paths: Files and folders of code that the model brings along.
        pip_requirements: What to install; by default the versions that it was fitted with.
        extra_pip_requirements: What to install besides.
        metadata: Of your own.
        mlflow_model: To add the flavour to.

    Raises:
        RuntimeError: The detector is not fitted.
        ValueError: The function is none that can be imported, arguments that no JSON can hold, a
            detector with groups without their function, or a model built that is not the
            detector's.
        TypeError: The function gives no adapter, or does not say that it does.
    """
    folder, inputs = path_of("path", path), Inputs.of(detector.fitted, input_example)
    recipe = recipe_of(detector, factory, arguments, files, weights, groups, inputs)
    model = mlflow_model or Model()
    model.signature = signature or inputs.signature()
    if metadata is not None:
        model.metadata = metadata
    _validate_and_prepare_target_save_path(str(folder))
    try:
        if input_example is not None:
            _save_example(model, inputs.example(input_example), str(folder))
        _write_detector(detector, folder, recipe, files)
        _write_environment(folder, detector.fitted, pip_requirements, extra_pip_requirements)
        _write_model(model, folder, recipe, code_paths)
        _check_loads(folder, detector)
    except BaseException:  # also where it is interrupted
        shutil.rmtree(folder)  # it was new or empty
        raise


def load_model(model_uri: str, dst_path: str | None = None) -> Detector:
    """The detector of a logged model, with its model.

    Args:
        model_uri: As ``models:/name/1``, ``runs:/<id>/name``, or a folder.
        dst_path: Where to download it to.

    Raises:
        ValueError: A damaged file, or a function that builds another model.
        TypeError: The function gives no adapter, or does not say that it does.
    """
    text("model_uri", model_uri)
    if dst_path is not None:
        path_of("dst_path", dst_path)
    folder = _download_artifact_from_uri(artifact_uri=model_uri, output_path=dst_path)
    _add_code_from_conf_to_system_path(folder, _get_flavor_configuration(folder, FLAVOR_NAME))
    return Recipe.of(Path(folder)).detector(Path(folder))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> "_PyfuncDetector":
    """What MLflow calls with the model's folder, and ``device`` and ``batch_size`` if given."""
    options = _OPTIONS | dict(model_config or {})
    piece = whole("batch_size", options["batch_size"], 1)
    recipe = Recipe.of(Path(path))
    detector = recipe.detector(Path(path))
    if options["device"] is not None:
        detector.adapter.module.to(options["device"])
    samples = tuple(map(sample_of, detector.fitted.samples))
    inputs = Inputs(cast(Any, recipe.structure), tuple(recipe.names), samples)
    return _PyfuncDetector(detector, inputs, piece)


class _PyfuncDetector:
    """What MLflow's servers and Spark call; scores are the same in pieces and in any thread."""

    def __init__(self, detector: Detector, inputs: Inputs, piece: int) -> None:
        self._detector, self._inputs, self._piece = detector, inputs, piece

    def get_raw_model(self) -> Detector:
        return self._detector

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """A row for each sample: its score, p-value and log-likelihood, and whether it has any.

        A sample that cannot be scored is not valid, and its numbers are nan.
        """
        batch = self._inputs.batch(model_input)
        found = [scored(self._detector, piece) for piece in pieces(batch, self._piece)]
        columns = {name: [getattr(scores, name) for scores in found] for name in COLUMNS}
        types = {"valid": bool}
        return pd.DataFrame(
            {
                name: np.concatenate(parts) if parts else np.empty(0, types.get(name, float))
                for name, parts in columns.items()
            }
        )


def _write_model(model: Model, folder: Path, recipe: Recipe, code_paths: list[str] | None) -> None:
    code = _validate_and_copy_code_paths(code_paths, str(folder))
    version = ood_monitor.__version__
    model.add_flavor(FLAVOR_NAME, ood_monitor_version=version, code=code, **asdict(recipe))
    pyfunc.add_to_model(
        model,
        loader_module=__name__,
        conda_env=_CONDA,
        python_env=_PYTHON,
        code=code,
        model_config=_OPTIONS,
    )
    model.model_size_bytes = get_total_file_size(folder)
    model.save(str(folder / MLMODEL_FILE_NAME))


def _write_detector(
    detector: Detector, folder: Path, recipe: Recipe, files: Mapping[str, Any] | None
) -> None:
    detector.save_pretrained(folder / DETECTOR)
    for name, source in (files or {}).items():
        target = folder / recipe.files[name]
        target.parent.mkdir(exist_ok=True)
        copy = shutil.copytree if Path(source).is_dir() else shutil.copyfile
        copy(source, target)
    if recipe.weights is not None:
        save_weights(detector.adapter.module, folder / recipe.weights)


def _write_environment(
    folder: Path, fitted: Fitted, requirements: list[str] | None, extra: list[str] | None
) -> None:
    default = None if requirements is not None else _requirements(fitted)
    conda, pip, constraints = _process_pip_requirements(default, requirements, extra)
    if constraints:
        (folder / "constraints.txt").write_text("\n".join(constraints))
    (folder / _CONDA).write_text(yaml.safe_dump(conda, default_flow_style=False))
    (folder / _REQUIREMENTS).write_text("\n".join(pip))
    _PythonEnv.current().to_yaml(str(folder / _PYTHON))


def _requirements(fitted: Fitted) -> list[str]:
    versions = dict(fitted.provenance.libraries)
    versions.setdefault("torch", torch.__version__)
    versions |= {"ood-monitor[mlflow]": versions.pop("ood-monitor", ood_monitor.__version__)}
    # A local version such as +cpu names a build that an index need not have.
    return [f"{name}=={version.split('+')[0]}" for name, version in versions.items()]


def _check_loads(folder: Path, detector: Detector) -> None:
    """Refuse what would fail when it is served, or say something else."""
    built = Recipe.of(folder).detector(folder)
    if built.fitted.fingerprint != detector.fitted.fingerprint or built.is_stale:
        raise ValueError(
            "Expected the factory to build the model that the detector was fitted on, got other "
            "weights: pass weights=True, or a detector that is not stale."
        )
