"""Two methods by one word, and what joins them."""

import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from support.fitted_cases import ADAPTERS, adapter_of, batch_of
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, SampleKind, map_tensors, pieces
from ood_monitor.cli.showing import facts_of
from ood_monitor.densities.parts import Method

METHODS: tuple[Method, ...] = get_args(Method)
EVERY = [(name, method) for name in ("glow", "vae", "gpt2", "ddpm") for method in METHODS]

every_case = pytest.mark.parametrize(("name", "method"), EVERY)


@functools.cache
def detector(name: str, method: Method) -> om.Detector:
    """One for all tests, which leave it as it is."""
    held_out = pieces(batch_of(name, 60, seed=1), 30)
    made = om.Detector(adapter_of(name), method=method, explain=8)
    return made.fit(held_out, progress=False)


def first(batch: Batch, count: int) -> Batch:
    return map_tensors(lambda tensor: tensor[:count], batch)


@every_case
def test_parts_of_the_score_add_up_and_a_sample_has_one_score(name: str, method: Method) -> None:
    fitted, new = detector(name, method), batch_of(name, 5, seed=2)
    scores, alone = fitted.score(new), fitted.score(first(new, 1))
    torch.testing.assert_close(sum(scores.layers.values()), scores.score)
    torch.testing.assert_close(alone.score, scores.score[:1], rtol=1e-3, atol=1e-3)
    assert torch.equal(alone.p_value, scores.p_value[:1])
    assert scores.layers.keys() == scores.z.keys() == set(fitted.fitted.layers)
    assert fitted.fitted.method == method


@every_case
def test_a_saved_detector_comes_back_and_fits_the_same(
    name: str, method: Method, tmp_path: Path
) -> None:
    fitted, new = detector(name, method), batch_of(name, 5, seed=2)
    fitted.save_pretrained(tmp_path, card=False)
    loaded = om.Detector.from_pretrained(tmp_path, fitted.adapter)
    assert torch.equal(loaded.score(new).score, fitted.score(new).score)
    assert loaded.fitted.fingerprint == fitted.fitted.fingerprint
    again = loaded.fit(pieces(batch_of(name, 60, seed=1), 30), progress=False)
    assert again.fitted.fingerprint == fitted.fitted.fingerprint
    assert again.fitted.method == method


@pytest.mark.parametrize("name", ["glow", "vae", "gpt2", "ddpm"])
def test_forward_leaves_the_model_as_it_was(name: str) -> None:
    adapter = adapter_of(name)
    before = {key: value.clone() for key, value in adapter.module.state_dict().items()}
    hooks = [dict(module._forward_pre_hooks) for module in adapter.module.modules()]
    made = om.Detector(adapter, method="forward", explain=8)
    made.fit([batch_of(name, 40, seed=1)], progress=False)
    after = adapter.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [dict(module._forward_pre_hooks) for module in adapter.module.modules()] == hooks
    assert all(p.grad is None for p in adapter.module.parameters())


def test_both_joins_the_parts_of_the_two() -> None:
    kinds = {
        method: [part.kind for part in detector("glow", method).fitted.joined.parts]
        for method in METHODS
    }
    assert kinds["gradient_norms"] == ["gradient_norms"]
    assert kinds["both"] == [*kinds["forward"], "gradient_norms"]


def test_parts_are_chosen_one_by_one(tmp_path: Path) -> None:
    parts = ["log_likelihood", om.Part("expected_norms", om.DiagonalGaussian(), floor="mean")]
    made = om.Detector(adapter_of("vae"), parts=parts)
    fitted = made.fit([batch_of("vae", 60, seed=1)], progress=False)
    fitted.save_pretrained(tmp_path, card=False)
    loaded = om.Detector.from_pretrained(tmp_path, fitted.adapter)
    again = loaded.fit([batch_of("vae", 60, seed=1)], progress=False).fitted
    assert again.fingerprint == fitted.fitted.fingerprint
    assert again.method == "parts"
    assert [part.floor for part in again.joined.parts] == [None, "mean"]


def test_rows_of_a_table_have_one_sided_likelihood_and_a_floor_by_the_mean() -> None:
    adapter = adapter_of("vae")
    adapter.sample = "row"
    made = om.Detector(adapter, method="forward")
    found = made.fit([batch_of("vae", 60, seed=1)], progress=False).fitted.joined.parts
    assert [(part.kind, part.floor) for part in found] == [
        ("log_likelihood", None),
        ("expected_norms", "mean"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "norms"}, "Expected method of .*'gradient_norms'.*, got 'norms'"),
        ({"method": "forward", "density": om.Maximum()}, "Expected no `density=`.*'forward'"),
        ({"parts": ["values"], "density": om.Maximum()}, "Expected no `density=`.*with parts"),
        ({"parts": ["values"], "method": "both"}, "no `method=` beside them"),
        ({"parts": ["values", "values"]}, "Expected parts of different kinds"),
        ({"parts": []}, "Expected parts of different kinds"),
        ({"parts": ["norms"]}, "Expected a part of .*, got 'norms'"),
        ({"method": "forward", "granularity": "row"}, "no granularity .*'row' with 'forward'"),
        ({"parts": ["map"], "granularity": "row"}, "no granularity .*'row' with parts"),
    ],
)
def test_choices_that_speak_of_one_thing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        om.Detector(adapter_of("vae"), **options)


def untold(name: str) -> om.Adapter:
    """An adapter that does not say what a sample is."""

    class Untold(om.Adapter):
        def __init__(self, told: om.Adapter) -> None:
            self.module, self._told = told.module, told

        def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor | om.Elements]]:
            return self._told.log_likelihood(batch)

    return Untold(adapter_of(name))


def said(name: str, kind: SampleKind) -> om.Adapter:
    adapter = adapter_of(name)
    adapter.sample = kind
    return adapter


UNKNOWN = "default where the adapter does not say what a sample is"

#: The adapter, whose samples it takes, options, and what is to come of them.
DEFAULTS: dict[str, tuple[om.Adapter, str, dict[str, Any], str, str]] = {
    "image": (adapter_of("glow"), "glow", {}, "forward", "default where samples are images"),
    "sequence": (adapter_of("gpt2"), "gpt2", {}, "forward", "default where samples are sequences"),
    "row": (
        said("vae", "row"),
        "vae",
        {},
        "forward",
        "default where samples are rows of a table",
    ),
    "denoiser": (
        adapter_of("ddpm"),
        "ddpm",
        {},
        "forward",
        "default where samples are a diffusion model's",
    ),
    "one's own": (untold("glow"), "glow", {}, "gradient_norms", UNKNOWN),
    "a word": (adapter_of("glow"), "glow", {"method": "both"}, "both", "chosen"),
    "a density": (
        adapter_of("glow"),
        "glow",
        {"density": om.Maximum()},
        "gradient_norms",
        "chosen",
    ),
    "a granularity": (
        adapter_of("glow"),
        "glow",
        {"granularity": "row"},
        "gradient_norms",
        "chosen",
    ),
    "parts": (adapter_of("glow"), "glow", {"parts": ["values"]}, "parts", "chosen"),
}


def test_a_model_without_layers_keeps_gradient_norms() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1, 4, 4))

        def log_prob(self, x: Tensor) -> Tensor:
            return -0.5 * (x - self.shift).square().flatten(1).sum(1)

    images = batch_of("glow", 60, seed=1)
    fitted = om.Detector(om.LogLikelihood(Shift())).fit(images.split(20), progress=False).fitted
    assert fitted.method == "gradient_norms"
    assert fitted.reason == "default where no convolution or linear map is called as a module"
    with pytest.raises(ValueError, match="or use gradient norms"):
        om.Detector(om.LogLikelihood(Shift()), method="forward").fit([images], progress=False)


def test_a_batch_that_is_refused_says_nothing_of_layers() -> None:
    made = om.Detector(adapter_of("glow"))
    with pytest.raises(ValueError, match="Expected"):
        made.measure(torch.full((3, 1, 4, 4), 7.0))  # beyond the range of its bins
    fitted = made.fit([batch_of("glow", 60, seed=1)], progress=False).fitted
    assert fitted.method == "forward"


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_method_and_its_reason_are_said(name: str, tmp_path: Path) -> None:
    adapter, of, options, method, reason = DEFAULTS[name]
    held_out = [batch_of(of, 60, seed=1)]
    made = om.Detector(adapter, explain=8, **options).fit(held_out, progress=False)
    assert (made.fitted.method, made.fitted.reason) == (method, reason)
    made.save_pretrained(tmp_path)
    assert f"{method} ({reason})" in (tmp_path / "README.md").read_text()
    assert facts_of(made.fitted)["method"] == f"{method} ({reason})"
    again = om.Detector.from_pretrained(tmp_path, adapter).fit(held_out, progress=False).fitted
    assert (again.method, again.fingerprint) == (method, made.fitted.fingerprint)


class Exploding(nn.Module):
    """An autoencoder whose pass is not finite for a marked sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(torch.where(x > 50, torch.nan, x)).chunk(2, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)  # type: ignore[no-any-return]


def exploding(**options: Any) -> tuple[om.Detector, Tensor]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    return (
        om.Detector(om.ELBO(Exploding()), method="forward", **options),
        torch.randn(80, 6, generator=generator),
    )


def test_a_held_out_sample_whose_pass_is_not_finite_is_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, x = exploding()
    broken = x.clone()
    broken[17] = 100.0
    with caplog.at_level(logging.WARNING):
        found = made.fit([broken], progress=False)
    assert "1 of 80, at [17]" in caplog.text
    without = exploding()[0].fit([torch.cat([x[:17], x[18:]])], progress=False)
    assert found.fitted.fit_count + len(found.fitted.calibration.scores) == 79
    np.testing.assert_allclose(found.score(x[:5]).score, without.score(x[:5]).score, rtol=1e-4)


def test_a_sample_whose_pass_is_not_finite_is_invalid_and_others_are_as_they_were() -> None:
    made, x = exploding()
    fitted = made.fit([x], progress=False)
    broken = torch.cat([x[:4], torch.full((1, 6), 100.0)])
    scores = fitted.score(broken)
    assert scores.valid.tolist() == [True, True, True, True, False]
    assert scores.p_value[4].isnan()
    torch.testing.assert_close(scores.score[:4], fitted.score(x[:4]).score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_forward_is_fitted_on_every_kind_of_model(name: str) -> None:
    scores = detector(name, "forward").score(batch_of(name, 4, seed=2))
    assert scores.valid.all()


def test_bits_of_images_outside_their_range_are_left_out_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def named(images: Tensor) -> tuple[str, ...]:
        made = om.Detector(om.LogLikelihood(adapter_of("glow").module), method="forward")
        return made.fit([images], progress=False).fitted.joined.names

    images = batch_of("glow", 60, seed=1)
    assert "values/png_bits" in named(images)
    assert not caplog.records
    images[3, 0, 0, 0] = 1.5
    with caplog.at_level(logging.WARNING):
        names = named(images)
    assert "values/png_bits" not in names
    assert "1 of 60 held-out images have values outside the range" in caplog.text


INT8 = "fbgemm" in torch.backends.quantized.supported_engines or (
    "x86" in torch.backends.quantized.supported_engines
)


@pytest.mark.skipif(not INT8, reason="PyTorch is built without int8")
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_an_int8_model_is_watched_forward_and_refused_by_name_for_gradient_norms() -> None:
    torch.manual_seed(0)
    quantised = torch.ao.quantization.quantize_dynamic(Exploding().eval(), {nn.Linear}, torch.qint8)
    adapter, x = om.ELBO(quantised), torch.randn(80, 6)
    fitted = om.Detector(adapter, method="forward").fit([x], progress=False)
    assert {part.kind for part in fitted.fitted.joined.parts} == {"values", "expected_norms"}
    scores = fitted.score(torch.cat([x[:4], 5 * x[:4]]))
    assert (scores.score[4:] > scores.score[:4].max()).all()
    torch.testing.assert_close(fitted.score(x[:1]).score, scores.score[:1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="Expected"):
        om.Detector(adapter, method="gradient_norms").fit([x], progress=False)


def sequential(module: nn.Module) -> None:
    cpu_offload(module, execution_device=torch.device("cpu"))


def grouped(module: nn.Module) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(module, cpu, cpu, offload_type="leaf_level")


OFFLOADED: dict[str, Callable[[nn.Module], None]] = {"sequential": sequential, "group": grouped}


@pytest.mark.parametrize("name", ["glow", "vae", "gpt2", "ddpm"])
@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_models_are_watched_forward(name: str, how: str, tmp_path: Path) -> None:
    held_out, new = [batch_of(name, 60, seed=1)], batch_of(name, 5, seed=2)
    whole, adapter = detector(name, "forward"), adapter_of(name)
    OFFLOADED[how](adapter.module)
    made = om.Detector(adapter, method="forward", explain=8)
    fitted = made.fit(held_out, progress=False)
    torch.testing.assert_close(fitted.score(new).score, whole.score(new).score, rtol=1e-4, atol=0)
    assert torch.equal(fitted.score(new).p_value, whole.score(new).p_value)
    assert fitted.fitted.model == whole.fitted.model
    assert not fitted.is_stale
    whole.save_pretrained(tmp_path, card=False)
    loaded = om.Detector.from_pretrained(tmp_path, adapter)  # without a warning of other weights
    assert torch.equal(loaded.score(new).p_value, whole.score(new).p_value)
    if how == "sequential":
        assert all(p.is_meta for p in adapter.module.parameters())
        with pytest.raises(ValueError, match="without values: freed after its layer"):
            om.Detector(adapter, method="gradient_norms").fit(held_out, progress=False)


def test_offloaded_weights_that_change_are_stale() -> None:
    adapter = adapter_of("vae")
    sequential(adapter.module)
    fitted = om.Detector(adapter, method="forward").fit([batch_of("vae", 60, seed=1)])
    weights = adapter.module.encoder._hf_hook.weights_map  # type: ignore[union-attr]
    weights["weight"].add_(1)
    assert fitted.is_stale


def test_a_denoiser_is_watched_without_noise() -> None:
    """By passes that are of no likelihood, so that it is not a number."""
    made = om.Detector(adapter_of("ddpm"), explain=8)
    fitted = made.fit([batch_of("ddpm", 60, seed=1)], progress=False)
    assert [part.kind for part in fitted.fitted.joined.parts] == ["output_layer", "energies"]
    new = batch_of("ddpm", 3, seed=2)
    assert fitted.score(new).log_likelihood.isnan().all()
    assert fitted.score(new).valid.all()


def test_a_denoiser_that_cannot_be_measured_so_keeps_gradient_norms(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Twice(nn.Module):
        """Calls its last layer twice."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            found: Tensor = self.last(self.last(x))
            return found

    bound = om.DenoisingBound(Twice(), torch.linspace(0.99, 0.01, 1000))
    held_out = torch.rand(60, 1, 8, 8)
    with caplog.at_level(logging.WARNING):
        fitted = om.Detector(bound, explain=8).fit([held_out], progress=False)
    assert fitted.fitted.method == "gradient_norms"
    assert fitted.fitted.reason == "default where passes without noise cannot be measured"
    assert "to be called once" in caplog.text
    assert fitted.score(held_out).log_likelihood.isfinite().all()
    with pytest.raises(ValueError, match="to be called once"):
        om.Detector(bound, method="forward").fit([held_out], progress=False)


def test_a_batch_that_is_refused_says_nothing_of_a_denoiser(
    caplog: pytest.LogCaptureFixture,
) -> None:
    adapter, held_out = adapter_of("ddpm"), batch_of("ddpm", 60, seed=1)
    made = om.Detector(adapter, explain=8)
    wrong: list[Callable[[Tensor], Tensor]] = [Tensor.long, lambda x: torch.cat([x, x], 1)]
    for change in wrong:  # of another type, and of more channels than the network takes
        with pytest.raises((ValueError, RuntimeError)):
            made.measure(map_tensors(change, held_out))
    assert made.fit([held_out], progress=False).fitted.method == "forward"
    assert not [record for record in caplog.records if "Gradient norms" in record.message]


def test_what_is_of_denoisers_is_refused_of_others() -> None:
    made = om.Detector(adapter_of("glow"), parts=["output_layer"])
    with pytest.raises(ValueError, match="Expected a denoiser"):
        made.fit([batch_of("glow", 60, seed=1)], progress=False)


def test_energies_are_of_the_chosen_layers() -> None:
    parts: Any = ["output_layer", "energies"]
    made = om.Detector(adapter_of("ddpm"), parts=parts, layers=["up_blocks.*"], explain=8)
    fitted = made.fit([batch_of("ddpm", 60, seed=1)], progress=False).fitted
    columns = [name for part in fitted.joined.parts for name in part.columns.names]
    inputs = {name.split("/input.")[1] for name in columns if "/input." in name}
    assert inputs
    assert all(name.startswith("up_blocks.") for name in inputs)
    assert any("/band" in name for name in columns)


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), om.LogLikelihood, None])
def test_what_is_no_adapter_is_refused_with_one(given: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected an adapter, such as `om\.LogLikelihood"):
        om.Detector(given)
