"""Where a detector comes from is in its files, and a model or an adapter that differs is told."""

import json
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from support.small_cases import SMALL
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.cli.showing import facts_of
from ood_monitor.densities.measurements import Measurements
from ood_monitor.saving.provenance import Provenance, differences, recipe

BRANCHES = SMALL["branches"]


def config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


def bound(end: float = 0.01, **options: Any) -> om.Adapter:
    torch.manual_seed(0)
    return om.DenoisingBound(Network(), torch.linspace(0.99, end, 1000), **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    x = torch.rand(80, 1, 8, 8)
    detector = om.Detector(bound(), method="gradient_norms").fit([x], progress=False)
    detector.save_pretrained(tmp_path, card=False)
    return tmp_path


def test_the_recipe_of_a_bound_is_in_the_config(saved: Path) -> None:
    said = config(saved)["adapter"]
    assert said["class"] == "ood_monitor.adapters.denoising.DenoisingBound"
    expected = {"levels": [50, 500], "loss": "l2", "draws": 1, "antithetic": False, "seed": 0}
    expected["ratios"] = 2
    assert said["arguments"].items() >= expected.items()
    assert said["arguments"]["schedule"]["levels"] == 1000
    assert said["terms"] == ["t=50", "t=500"]


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.of_label = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(5, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = self.conv(x) + scale * self.of_label(labels)[..., None, None]
        return result


def test_a_detector_says_which_conditions_it_was_fitted_with(tmp_path: Path) -> None:
    adapter = om.DenoisingBound(
        Labelled(),
        torch.linspace(0.99, 0.01, 1000),
        condition=lambda batch: {"labels": batch[1], "scale": torch.tensor(0.5)},
    )
    x, labels = torch.rand(80, 1, 8, 8), torch.arange(80) % 3
    parts = zip(x.split(40), labels.split(40), strict=True)
    detector = om.Detector(adapter, explain=0)
    measured = [Measurements.parse(detector.measure(part).dump()) for part in parts]
    detector.fit_measured(Measurements.together(measured))
    detector.save_pretrained(tmp_path)
    assert config(tmp_path)["adapter"]["conditions"] == {"labels": 3}
    assert "labels (3 values)" in (tmp_path / "README.md").read_text()
    loaded = om.Detector.from_pretrained(tmp_path, adapter)
    assert facts_of(loaded.fitted)["conditions"] == "labels (3 values)"
    assert "conditions" not in facts_of(om.Detector(bound(), explain=0).fit([x]).fitted)


def test_versions_are_in_the_config(saved: Path) -> None:
    assert config(saved)["libraries"]["torch"] == metadata.version("torch")


def test_a_base_model_is_kept_until_another_is_named(tmp_path: Path) -> None:
    detector = om.Detector(BRANCHES()).fit([BRANCHES.data(100)], progress=False)
    first, second, third = (tmp_path / name for name in "abc")
    detector.save_pretrained(first, base_model="me/flow", base_model_revision="v1", card=False)
    om.Detector.from_pretrained(first, BRANCHES()).save_pretrained(second, card=False)
    assert config(second)["base_model"] == "me/flow"
    assert config(second)["base_model_revision"] == "v1"
    loaded = om.Detector.from_pretrained(first, BRANCHES())
    loaded.save_pretrained(third, base_model="me/other", card=False)
    assert config(third)["base_model"] == "me/other"
    assert "base_model_revision" not in config(third)


SHA = "0123456789" * 4


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"/c/hub/models--google--ddpm/snapshots/{SHA}/unet", ("google/ddpm", SHA)),
        ("google/ddpm", ("google/ddpm", None)),
        ("/home/me/models/ddpm", (None, None)),
        ("here/model", (None, None)),
        ("", (None, None)),
    ],
    ids=["cache", "name", "folder", "folder like a name", "nothing"],
)
def test_a_model_that_says_where_it_is_from_is_believed(
    path: str,
    expected: tuple[str | None, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    adapter = BRANCHES()
    adapter.module.config = SimpleNamespace(_name_or_path=path)  # type: ignore[assignment]
    found = Provenance.of(adapter, ())
    assert (found.base_model, found.base_model_revision) == expected


def test_a_loaded_model_of_diffusers_is_asked_without_a_warning(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=8).save_pretrained(tmp_path)
    adapter = om.ELBO(AutoencoderKL.from_pretrained(tmp_path))
    assert Provenance.of(adapter, ()).base_model is None


def function(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize("sample", [None, "row"])
def test_what_a_sample_is_is_told_and_a_condition_is_named(sample: Any) -> None:
    vae = nn.Module()
    vae.encode = vae.decode = nn.Identity()
    plain = recipe(om.ELBO(vae, sample=sample))
    assert plain["arguments"]["sample"] == sample
    assert "condition" not in plain["arguments"]  # the default
    found = recipe(om.ELBO(vae, condition=function))
    assert found["arguments"]["condition"] == {"object": f"{__name__}.function"}
    older = {**plain, "arguments": {k: v for k, v in plain["arguments"].items() if k != "sample"}}
    assert differences(older, plain) == {}
    told = differences(plain, recipe(om.ELBO(vae, sample="image")))
    assert told == {"sample": (sample, "image")}


def test_functions_and_objects_are_named() -> None:
    adapter = om.LogLikelihood(BRANCHES.model(), inputs=function)
    found = recipe(adapter)["arguments"]
    assert found["inputs"] == {"object": f"{__name__}.function"}
    assert "condition" not in found  # the default
    vae = nn.Module()
    vae.encode = vae.decode = nn.Identity()
    elbo = om.ELBO(vae, observation=om.observations.Gaussian(0.25))
    said = recipe(elbo)["arguments"]["observation"]
    assert said["object"].endswith("observations.Gaussian")
    assert 0.25 in said.values()


class Own(om.Adapter):
    """An adapter of the user's, with more than its files should tell."""

    def __init__(
        self, module: nn.Module, token: str, weights: Any, data: Any, scale: float
    ) -> None:
        self.module, self.token, self.weights = module, token, weights
        self._data, self.scale = data, scale

    def log_likelihood(self, batch: Tensor) -> Any:
        yield "log_likelihood", self.module.log_prob(batch)  # type: ignore[operator]


def test_secrets_data_and_whole_objects_stay_out_of_the_files(tmp_path: Path) -> None:
    held = SimpleNamespace(password="hunter2", more=None)
    held.more = held  # as a pipeline and its parts hold each other
    adapter = Own(BRANCHES.model(), "hf_secret", list(range(5000)), held, float("inf"))
    detector = om.Detector(adapter).fit([BRANCHES.data(100)], progress=False)
    detector.save_pretrained(tmp_path, card=False)
    assert config(tmp_path)["adapter"]["arguments"] == {
        "data": {"object": "types.SimpleNamespace"},
        "scale": "inf",
    }
    assert om.Detector.from_pretrained(tmp_path, adapter).is_fitted


# What differs is told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": 1}, "seed=0, got 1"),
        ({"loss": "l1"}, "loss='l2', got 'l1'"),
        ({"draws": 2}, "draws=1, got 2"),
        ({"levels": [50, 501]}, r"levels=\[50, 500\], got \[50, 501\]"),
        ({"end": 0.02}, "schedule="),
        ({"prediction_type": "sample"}, "prediction_type='epsilon', got 'sample'"),
    ],
    ids=str,
)
def test_another_adapter_of_the_same_model_is_told(
    options: dict[str, Any], told: str, saved: Path
) -> None:
    with pytest.warns(UserWarning, match=f"Another adapter: .*{told}") as caught:
        om.Detector.from_pretrained(saved, bound(**options))
    assert caught[0].filename == __file__


def test_a_schedule_is_told_with_what_its_levels_do_not_show() -> None:
    schedule = om.NoiseSchedule.variance_preserving(torch.linspace(0.9, 0.1, 4))
    kinds = [schedule, replace(schedule, prediction_type="sample"), replace(schedule, sigma_data=2)]
    said = [recipe(om.DenoisingBound(nn.Identity(), each, levels=[1])) for each in kinds]
    assert len({str(each["arguments"]["schedule"]) for each in said}) == len(kinds)


def test_the_same_adapter_is_not_told(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not om.Detector.from_pretrained(saved, bound()).is_stale


def test_recipes_of_other_classes_or_versions_are_not_compared() -> None:
    a = {"class": "A", "arguments": {"seed": 0, "new": 1}}
    assert differences(a, {"class": "B", "arguments": {"seed": 1}}) == {}
    assert differences({}, a) == {}
    assert differences(a, {"class": "A", "arguments": {"seed": 0, "other": 2}}) == {}
    assert differences(a, {"class": "A", "arguments": {"seed": 1}}) == {"seed": (0, 1)}


def test_another_precision_is_told(tmp_path: Path) -> None:
    x = torch.rand(80, 1, 8, 8)
    om.Detector(bound()).fit([x], progress=False).save_pretrained(tmp_path, card=False)
    adapter = bound()
    adapter.module.double()
    with pytest.warns(UserWarning, match=r"in torch.float32, the model has .* in torch.float64"):
        om.Detector.from_pretrained(tmp_path, adapter)


def test_a_detector_knows_when_it_is_stale() -> None:
    detector = om.Detector(bound()).fit([torch.rand(80, 1, 8, 8)], progress=False)
    assert not detector.is_stale
    with torch.no_grad():
        detector.adapter.module.get_parameter("conv.bias").add_(1e-3)
    assert detector.is_stale


def test_an_unfitted_detector_is_not_asked_whether_it_is_stale() -> None:
    with pytest.raises(RuntimeError, match="fitted detector"):
        _ = om.Detector(bound()).is_stale


@pytest.mark.parametrize(
    ("key", "value"),
    [("adapter", []), ("base_model", 3), ("base_model_revision", None), ("libraries", {"a": 1})],
)
def test_a_provenance_of_another_type_is_refused(key: str, value: Any, saved: Path) -> None:
    from ood_monitor.saving.fitted import Fitted, _checksum

    settings, tensors = config(saved), (saved / "detector.safetensors").read_bytes()
    settings = {k: v for k, v in settings.items() if k != "checksum"} | {key: value}
    settings["checksum"] = _checksum(settings, tensors)
    with pytest.raises(ValueError, match=f"Expected '{key}' to be"):
        Fitted.parse(json.dumps(settings), tensors)
