"""The model card: what it says is so, its code runs, and a README of the user's stays."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import yaml
from support.small_cases import SMALL
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.saving.card import is_own, model_card

BRANCHES = SMALL["branches"]


def saved(directory: Path, adapter: om.Adapter, x: Any, **options: Any) -> om.Detector:
    detector = om.Detector(adapter, **options).fit([x], progress=False)
    detector.save_pretrained(directory)
    return detector


def readme(directory: Path) -> str:
    return (directory / "README.md").read_text()


def code(text: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(found)


def loader(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., om.Detector]:
    """What the card's code defines, run in the card's folder."""
    monkeypatch.chdir(directory)
    space: dict[str, Any] = {}
    exec(code(readme(directory)), space)
    return space["load_detector"]  # type: ignore[no-any-return]


# Its code


def test_code_of_a_flow_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = BRANCHES.data(100)
    detector = saved(tmp_path, BRANCHES(), x)
    found = loader(tmp_path, monkeypatch)(BRANCHES.model())
    assert torch.equal(found.score(x).score, detector.score(x).score)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


def test_code_of_a_bound_has_its_levels_loss_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, schedule = Network(), torch.linspace(0.99, 0.01, 1000)
    adapter = om.DenoisingBound(network, schedule, levels=[3, 700], loss="l1", draws=2, seed=5)
    x = torch.rand(80, 1, 8, 8)
    detector = saved(tmp_path, adapter, x)
    said = 'levels=[3, 700], prediction_type="epsilon", loss="l1", draws=2, seed=5'
    assert said in readme(tmp_path)
    found = loader(tmp_path, monkeypatch)(network, schedule)
    assert torch.equal(found.score(x).score, detector.score(x).score)


def test_code_asks_for_the_functions_and_groups_that_no_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves(batch: Tensor) -> list[str]:
        return [str(bool(value > 0)) for value in batch[:, 0]]

    def doubled(batch: Tensor) -> Tensor:
        return 2 * batch

    x = BRANCHES.data(100)
    adapter = om.LogLikelihood(BRANCHES.model(), inputs=doubled)
    detector = saved(tmp_path, adapter, x, groups=halves, minimum_group=20)
    found = loader(tmp_path, monkeypatch)(BRANCHES.model(), doubled, halves)
    assert torch.equal(found.score(x).p_value, detector.score(x).p_value)


class Own(om.Adapter):
    """An adapter of the user's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def log_likelihood(self, batch: Tensor) -> Any:
        yield "log_likelihood", self.module.log_prob(batch)  # type: ignore[operator]


def test_code_asks_for_an_adapter_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = BRANCHES.data(100)
    detector = saved(tmp_path, Own(BRANCHES.model()), x)
    found = loader(tmp_path, monkeypatch)(Own(BRANCHES.model()))
    assert torch.equal(found.score(x).score, detector.score(x).score)


# What it says


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    detector = om.Detector(BRANCHES()).fit([BRANCHES.data(100)], progress=False)
    detector.save_pretrained(tmp_path, base_model="me/flow", base_model_revision="abc")
    text = readme(tmp_path)
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["library_name"] == "ood-monitor"
    assert data["base_model"] == "me/flow"
    assert "out-of-distribution-detection" in data["tags"]
    assert "[me/flow](https://huggingface.co/me/flow) at `abc`" in text


def test_it_counts_and_names_what_was_left_out(tmp_path: Path) -> None:
    detector = saved(tmp_path, SMALL["glow"](), SMALL["glow"].data(120), calibration_fraction=0.25)
    text, fitted = readme(tmp_path), detector.fitted
    assert "| fit samples | 90 |" in text
    assert "| calibration samples | 30 |" in text
    total, dropped = len(fitted.joined.all_names), len(fitted.joined.dropped)
    left_out = re.search(r"\| features \| (\d+), of which left out: (.*) \|", text)
    assert left_out is not None
    assert int(left_out[1]) == total
    assert sum(map(int, re.findall(r"\d+", left_out[2]))) == dropped
    assert f"| smallest p-value | {1 / 31:.3g} |" in text


def test_a_diagnosis_is_told_with_its_problems(tmp_path: Path) -> None:
    flow = om.models.Glow(channels=1, size=4, steps=1, hidden=4)
    adapter, x = om.LogLikelihood(flow), torch.rand(200, 1, 4, 4).split(50)
    diagnosis = om.diagnose(adapter, x)
    detector = om.Detector(adapter).fit(x, progress=False)
    text = model_card(detector.fitted, {}, diagnosis=diagnosis)
    assert f"| mean absolute correlation of features | {diagnosis.mean_correlation:.2f} |" in text
    assert diagnosis.problems
    assert all(f"- {problem}" in text for problem in diagnosis.problems)


def test_the_figure_is_an_image_that_the_card_shows(tmp_path: Path) -> None:
    saved(tmp_path, BRANCHES(), BRANCHES.data(100))
    assert "](calibration.png)" in readme(tmp_path)
    assert matplotlib.image.imread(tmp_path / "calibration.png").std() > 0.05


# Whose it is


def test_a_card_is_renewed_with_its_detector(tmp_path: Path) -> None:
    saved(tmp_path, BRANCHES(), BRANCHES.data(100))
    other = saved(tmp_path, BRANCHES(), BRANCHES.data(100), seed=1)
    assert other.fitted.fingerprint in readme(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "See also our wiki.\n",
        lambda text: text.replace("# Out-of-distribution", "# Our out-of-distribution"),
        lambda text: "# Project\n",
        lambda text: "",
    ],
    ids=["appended", "edited", "other", "empty"],
)
def test_a_readme_of_the_users_is_left_alone(change: Callable[[str], str], tmp_path: Path) -> None:
    saved(tmp_path, BRANCHES(), BRANCHES.data(100))
    (tmp_path / "README.md").write_text(change(readme(tmp_path)))
    mine = readme(tmp_path)
    saved(tmp_path, BRANCHES(), BRANCHES.data(100), seed=1)
    assert readme(tmp_path) == mine


def test_a_card_knows_itself(tmp_path: Path) -> None:
    saved(tmp_path, BRANCHES(), BRANCHES.data(100))
    assert is_own(readme(tmp_path))
    assert not is_own("# Mine\n")
