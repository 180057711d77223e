import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ood_monitor as om
from ood_monitor.cli import app


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    flow = om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
    om.Detector(om.LogLikelihood(flow)).fit([torch.rand(60, 1, 4, 4)]).save_pretrained(folder)
    return folder


def test_show_says_what_a_detector_was_fitted_on(saved: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(saved), "--json"])
    facts = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["fit samples"] == facts["calibration samples"] == 30
    assert facts["samples"] == "(1, 4, 4) torch.float32"


def test_show_is_readable(saved: Path) -> None:
    assert "calibration samples     30" in CliRunner().invoke(app, ["show", str(saved)]).stdout


def test_a_folder_without_a_detector_is_a_clear_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 1
    assert "config.json" in result.output


def test_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["version"]).stdout.strip() == om.__version__
