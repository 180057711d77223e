"""Why samples are unusual: by place and by layer, from held-out samples that were kept."""

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fitted_cases import ADAPTERS, adapter_of, batch_of
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import Batch, checked_elements, map_tensors, pieces
from ood_monitor.adapters.elements import Elements, counted_of, resolved
from ood_monitor.densities.measurements import Measurements
from ood_monitor.detector.summed import norms_of
from ood_monitor.statistics import surprise_by_place

HELD_OUT = 60


@functools.cache
def detector(name: str, **options: Any) -> om.Detector:
    """One for all tests, which leave it as it is."""
    held_out = pieces(batch_of(name, HELD_OUT, seed=1), 25)
    return om.Detector(adapter_of(name), **options).fit(held_out, progress=False)


def first(batch: Batch, count: int) -> Batch:
    return map_tensors(lambda tensor: tensor[:count], batch)


def norms_by(made: om.Detector, batch: Batch) -> dict[str, Tensor]:
    return norms_of(made._differentiated, batch, layers=None, chunk_size=None).norms


# By place


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_surprise_is_what_came_less_what_was_expected(name: str, chunk_size: int | None) -> None:
    adapter, batch = adapter_of(name), batch_of(name, 3, seed=2)
    found = surprise_by_place(adapter, batch, chunk_size=chunk_size)
    with torch.no_grad():
        terms = dict(checked_elements(adapter, batch))
    by_element = {k: v for k, v in terms.items() if isinstance(v, Elements) and not v.apart}
    assert found.keys() == by_element.keys()
    for term, elements in by_element.items():
        expected = 0.0 if elements.expected is None else resolved(elements.expected)
        left = counted_of(elements, elements.log_prob - expected).flatten(1).double().sum(1)
        torch.testing.assert_close(found[term].flatten(1).sum(1), left, rtol=1e-4, atol=1e-4)
        shape = elements.log_prob.shape
        assert found[term].shape[1:] == tuple(
            shape[d] for d in elements.axes or range(1, len(shape))
        )


def test_the_place_that_is_unusual_is_found() -> None:
    """A column of a table, of a model that knows each by its own law."""

    class Independent(om.Adapter):
        sample = "row"

        def __init__(self) -> None:
            torch.manual_seed(0)
            self.module = nn.Linear(5, 5).double()

        def log_likelihood(self, batch: Tensor) -> Any:
            sd = nn.functional.softplus(self.module(torch.zeros_like(batch)))
            log_prob = torch.distributions.Normal(0.0, sd).log_prob(batch)
            yield "columns", om.Elements(log_prob, (-sd.log() - 1.4189).expand_as(batch))

    torch.manual_seed(0)
    made = om.Detector(Independent(), method="gradient_norms")
    made.fit([torch.randn(400, 5, dtype=torch.float64)], progress=False)
    strange = torch.randn(50, 5, dtype=torch.float64)
    usual = made.explain(strange).surprise_z["columns"]
    assert usual.mean(0).abs().max() < 0.6
    strange[:, 3] += 5
    why = made.explain(strange)
    assert (why.surprise_z["columns"].argmin(1) == 3).all()
    torch.testing.assert_close(why.surprise_z["columns"][:, :3], usual[:, :3])


def test_texts_have_no_usual_places() -> None:
    why = detector("gpt2", method="forward").explain(batch_of("gpt2", 3, seed=2))
    assert why.surprise_z == {}
    assert why.surprise["log_likelihood"].shape == (3, 6)


# By layer


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "forward") for name in ADAPTERS),
        *((name, method) for name in ("glow", "gpt2") for method in ("gradient_norms", "both")),
        pytest.param("ddpm", "both", marks=pytest.mark.slow),
    ],
)
def test_layers_are_in_deviations_of_held_out_norms(name: str, method: Any) -> None:
    made, batch = detector(name, method=method), batch_of(name, 4, seed=2)
    why = made.explain(batch, layers=True)
    norms, new = (norms_by(made, each) for each in (batch_of(name, HELD_OUT, seed=1), batch))
    assert why.z.keys() == why.shares.keys() <= new.keys()
    assert len(why.z) > len(new) / 2
    for layer, z in why.z.items():
        usual = norms[layer].double().log()
        wanted = (new[layer].double().log() - usual.mean()) / usual.std()
        torch.testing.assert_close(z, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sum(why.shares.values()), torch.ones(4, dtype=torch.float64))
    squares = torch.stack([*why.z.values()]).square()
    torch.testing.assert_close(torch.stack([*why.shares.values()]), squares / squares.sum(0))


def test_layers_are_explained_on_demand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made = detector("vae", method="forward")
    monkeypatch.setattr("ood_monitor.detector.explaining.norms_of", None)
    why = made.explain(batch_of("vae", 3, seed=2))
    assert (why.z, why.shares) == ({}, {})
    with pytest.raises(TypeError):
        made.explain(batch_of("vae", 3, seed=2), layers=True)


@pytest.mark.parametrize(("explain", "count"), [(100, 60), (40, 40), (7, 7), (0, 0)])
def test_the_first_held_out_samples_are_kept(explain: int, count: int) -> None:
    usual = detector("vae", method="forward", explain=explain).fitted.usual
    assert (usual.count if usual else 0) == count
    if usual:
        norms = norms_by(om.Detector(adapter_of("vae")), first(batch_of("vae", 60, seed=1), count))
        logs = torch.stack([norms[layer].double().log() for layer in usual.layers], 1)
        torch.testing.assert_close(torch.from_numpy(usual.mean), logs.mean(0), rtol=1e-3, atol=1e-3)


def test_a_pass_explains_many_samples_of_a_small_model_and_few_of_a_large_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def recorded(*given: Any, chunk_size: int, **options: Any) -> Any:
        sizes.append(chunk_size)
        return norms_of(*given, chunk_size=chunk_size, **options)

    monkeypatch.setattr("ood_monitor.detector.measuring.norms_of", recorded)
    batch = batch_of("vae", HELD_OUT, seed=1)
    for options in ({}, {"chunk_size": 20}):
        om.Detector(adapter_of("vae"), method="forward", **options).measure(batch, explain=40)
    # Four linear maps of two to six numbers: 60 numbers or so a sample.
    monkeypatch.setattr("ood_monitor.detector.measuring._NUMBERS", 600)
    om.Detector(adapter_of("vae"), method="forward").measure(batch, explain=40)
    assert sizes[0] > HELD_OUT
    assert sizes[1:] == [20, 8]


def test_none_are_kept_of_a_detector_that_is_not_to_explain() -> None:
    made, batch = detector("vae", method="forward", explain=0), batch_of("vae", 2, seed=2)
    assert made.explain(batch).surprise
    with pytest.raises(ValueError, match="got one without: explain=0"):
        made.explain(batch, layers=True)
    with pytest.raises(ValueError, match="explain of at least 0, got -1"):
        om.Detector(adapter_of("vae"), explain=-1)
    with pytest.raises(RuntimeError, match="call `fit` first"):
        om.Detector(adapter_of("vae")).explain(batch)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        made.explain(torch.rand(2, 7))


class ForwardOnly(om.LogLikelihood):
    """A model whose gradient cannot be had."""

    def log_likelihood(self, batch: Batch) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradient of this kernel")
        yield from super().log_likelihood(batch)


def test_a_model_that_only_runs_forward_is_fitted_and_it_is_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    adapter = ForwardOnly(adapter_of("glow").module, bins=256)
    images = batch_of("glow", HELD_OUT, seed=1)
    with caplog.at_level(logging.WARNING):
        made = om.Detector(adapter).fit(pieces(images, 20), progress=False)
    said = [r.message for r in caplog.records if "without explanation by layer" in r.message]
    told = "Fitted without explanation by layer: RuntimeError: no gradient of this kernel [OOD110]"
    assert said == [told]
    assert made.explain(images[:2]).surprise_z
    made.save_pretrained(tmp_path)
    assert "no gradient of this kernel" in (tmp_path / "README.md").read_text()
    again = om.Detector.from_pretrained(tmp_path, adapter)
    for each in (made, again):
        with pytest.raises(ValueError, match="got one without: RuntimeError: no gradient of this"):
            each.explain(images[:2], layers=True)


# Kept


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_explanation_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    made, batch = detector(name, method="forward"), batch_of(name, 3, seed=2)
    made.save_pretrained(tmp_path)
    again = om.Detector.from_pretrained(tmp_path, made.adapter)
    before, after = (each.explain(batch, layers=True) for each in (made, again))
    for part in ("surprise", "surprise_z", "z", "shares"):
        of, then = getattr(before, part), getattr(after, part)
        assert of.keys() == then.keys()
        assert all(torch.equal(of[key], then[key]) for key in of)


@pytest.mark.parametrize("name", ["glow", "gpt2"])
def test_processes_send_what_explains(name: str) -> None:
    made = om.Detector(adapter_of(name), method="forward")
    parts = [
        made.measure(batch, explain=count)
        for batch, count in zip(pieces(batch_of(name, 60, seed=1), 20), (20, 15, 0), strict=True)
    ]
    sent = [Measurements.parse(part.dump()) for part in parts]
    fitted = made.fit_measured(Measurements.together(sent)).fitted
    wanted = detector(name, method="forward", explain=35).fitted
    assert fitted.usual is not None
    assert wanted.usual is not None
    assert fitted.usual.count == 35
    np.testing.assert_allclose(fitted.usual.mean, wanted.usual.mean, rtol=1e-4)
    assert fitted.usual.places.keys() == wanted.usual.places.keys()


def test_a_broken_held_out_sample_explains_nothing() -> None:
    images = batch_of("glow", HELD_OUT, seed=1)
    sound = detector("glow", method="forward").fitted.usual
    images[3] = 0.0
    adapter = adapter_of("glow")
    made = om.Detector(adapter, method="forward")
    measured = made.measure(images, explain=HELD_OUT)
    assert measured.explaining is not None
    assert measured.explaining.norms is not None
    measured.explaining.norms.values[3] = np.inf
    for values in measured.explaining.places.values():
        values[3] = np.nan
    usual = made.fit_measured(measured).fitted.usual
    assert usual is not None
    assert sound is not None
    assert np.isfinite(usual.mean).all()
    assert all(np.isfinite(mean).all() for mean, _ in usual.places.values())
    np.testing.assert_allclose(usual.mean, sound.mean, atol=0.2)


def test_places_and_layers_of_too_few_finite_samples_are_left_out() -> None:
    made = om.Detector(adapter_of("glow"), method="forward")
    measured = made.measure(batch_of("glow", HELD_OUT, seed=1), explain=3)
    assert measured.explaining is not None
    assert measured.explaining.norms is not None
    measured.explaining.norms.values[1:] = np.inf
    for values in measured.explaining.places.values():
        values[1:] = np.nan
    usual = made.fit_measured(measured).fitted.usual
    assert usual is not None
    assert (usual.layers, usual.places) == ((), {})
    assert usual.without == "finite norms of 1 of 3 samples"
