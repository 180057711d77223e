"""A detector of a diffusers pipeline as an MLflow model: the pipeline's folder travels with it."""

import os
import warnings
from pathlib import Path
from typing import Any

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's own, about its type hints
    import mlflow.pyfunc

import diffusers
import mlflow
import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline
from ood_monitor_integrations.mlflow import flavour
from ood_monitor_integrations.mlflow.pipelines import denoising_bound
from support.diffusers_cases import unet
from support.pickles import pickles_in

import ood_monitor as om

MODULE = "ood_monitor_integrations.mlflow.pipelines"
LAYERS = ["conv_out.*", "conv_norm_out.*"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "ddpm"
    pipe.save_pretrained(path)
    return path


def images(pipe: Any, count: int) -> torch.Tensor:
    config = pipe.unet.config
    generator = torch.Generator().manual_seed(0)
    return torch.rand(
        count, config.in_channels, config.sample_size, config.sample_size, generator=generator
    )


def test_a_bound_of_a_copied_pipeline(pipe: Any, folder: Path, tmp_path: Path) -> None:
    x = images(pipe, 60)
    adapter = om.DenoisingBound(pipe.unet, pipe.scheduler, levels=[10, 500], seed=3)
    detector = om.Detector(adapter, layers=LAYERS).fit([x], progress=False)
    flavour.save_model(
        detector,
        tmp_path / "model",
        factory=f"{MODULE}:denoising_bound",
        files={"folder": folder},
        arguments={"levels": [10, 500], "seed": 3},
        weights=False,
    )
    found = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(x[:4].numpy())
    np.testing.assert_allclose(found["score"], detector.score(x[:4]).score, rtol=1e-6)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert not [path for path in files if pickles_in(path.read_bytes())]


def test_a_fitted_pipeline(pipe: Any, folder: Path, tmp_path: Path) -> None:
    x = images(pipe, 60)
    detector = fit_pipeline(pipe, [x], levels=[10, 500], layers=LAYERS, progress=False)
    flavour.save_model(
        detector,
        tmp_path / "model",
        factory=f"{MODULE}:replayed",
        files={"folder": folder},
        arguments={"levels": [10, 500]},
        weights=False,
        input_example={"sample": 2 * x[:2] - 1},
    )
    loaded = flavour.load_model(str(tmp_path / "model"))
    batch = {"sample": 2 * x[:4] - 1}
    assert torch.equal(loaded.score(batch).score, detector.score(batch).score)


def test_a_folder_or_a_name_is_asked_for() -> None:
    with pytest.raises(ValueError, match="a folder or a name, got None and None"):
        denoising_bound()
