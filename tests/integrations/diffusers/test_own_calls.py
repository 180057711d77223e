"""What a pipeline's own last steps show, at no pass of its denoiser more."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, replayed_bound
from ood_monitor_integrations.diffusers.capture import Capture, Step
from ood_monitor_integrations.diffusers.own_calls import columns_of
from scipy.fft import dctn
from support.pipeline_cases import case_of, seeded_call
from torch import Tensor, nn

import ood_monitor as om

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIXELS, TEXT, IMAGE = case_of("ddim"), case_of("stable-diffusion"), case_of("img2img")
STEPS: dict[str, Any] = {"num_inference_steps": 5}


def fitted(pipe: Any, *parts: Any, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"call": STEPS, "samples": 160, "progress": False, "explain": 0}
    return fit_pipeline(pipe, parts=parts or ["own_calls"], **settings | options)


@pytest.fixture(scope="module")
def usual() -> tuple[Any, om.Detector]:
    """A pipeline with a detector of this part alone."""
    pipe = PIXELS()
    return pipe, fitted(pipe)


def watched(pipe: Any, detector: om.Detector, **options: Any) -> Any:
    return monitor_pipeline(
        pipe, om.Monitor(detector, fpr=0.05), **{"raise_on_error": True} | options
    )


def drawn(seed: int = 0, **more: Any) -> dict[str, Any]:
    return seeded_call({"batch_size": 4} | STEPS | more, seed)


class Passes:
    """Counts those of a denoiser."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


# The columns.


def updates(*shape: int, channels: int | None = None) -> list[Step]:
    told = (shape[0], channels or shape[1], *shape[2:])
    return [
        Step((), None, torch.randn(told), 0, torch.randn(shape), torch.randn(shape))
        for _ in range(3)
    ]


def energies(image: Tensor, edges: list[float]) -> list[float]:
    """Of the cosine transform, by its radius; float64, by another library."""
    squares = dctn(image.double().numpy(), norm="ortho", axes=(-2, -1)) ** 2
    height, width = image.shape[-2:]
    radius = np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None] / width)
    bands = np.digitize(radius, edges[1:-1])
    return [float(squares[..., bands == band].sum()) for band in range(len(edges) - 1)]


@pytest.mark.parametrize(
    "shape", [(2, 4, 8, 8), (2, 3, 2, 8, 8)], ids=["images", "videos, whose frames are channels"]
)
def test_an_image_s_columns_are_those_of_its_cosine_transform(shape: tuple[int, ...]) -> None:
    given = updates(*shape)
    found = columns_of(given, 2)
    edges = [edge / 8 for edge in (0, 0.5, 1.5, 2.5, 4, 6, 12)]
    for step, update in enumerate(given, -3):
        for name, tensor in (("prediction", update.prediction), ("sample", update.sample)):
            own = np.log([energies(each.flatten(0, -3), edges) for each in tensor])
            assert found[f"own_calls/{step}.{name}.energy"].numpy() == pytest.approx(own, rel=1e-5)
            images = tensor.flatten(1, -3).double()
            by_one = [(a * b).sum() / (a.norm() * b.norm()) for a, b in _neighbours(images)]
            lags = found[f"own_calls/{step}.{name}.lag"][:, 0].tolist()
            assert lags == pytest.approx([float(each) for each in by_one], abs=1e-6)
        a, b = (each.flatten(1).double() for each in (update.stepped, update.prediction))
        cosine = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).tolist()
        assert found[f"own_calls/{step}.cosine"][:, 0].tolist() == pytest.approx(cosine, abs=1e-6)


def _neighbours(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(each[..., 1:], each[..., :-1]) for each in images]


@pytest.mark.parametrize("shape", [(2, 16, 4), (2, 4, 2, 2)], ids=["tokens", "few pixels"])
def test_what_is_no_image_has_an_energy(shape: tuple[int, ...]) -> None:
    given = updates(*shape)
    found = columns_of(given, 2)
    norm = given[-1].sample.double().flatten(1).square().sum(1).log()
    assert found["own_calls/-1.sample.energy"][:, 0].tolist() == pytest.approx(norm.tolist())
    assert not any("lag" in name for name in found)


def test_of_a_learned_variance_the_prediction_counts_alone() -> None:
    given = updates(2, 4, 8, 8, channels=8)
    halved = [replace(each, prediction=each.prediction[:, :4]) for each in given]
    pairs = zip(columns_of(given, 2).values(), columns_of(halved, 2).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_a_pipeline_writes_into_afterwards_is_copied() -> None:
    network, capture = nn.Identity(), Capture(nn.Identity(), kept=2)
    for number in range(3):
        told, given, made = (torch.full((2, 4, 8, 8), float(number)) for _ in range(3))
        capture.begin(capture.denoiser, (given,), {})
        capture.end(capture.denoiser, network(told))
        capture.step(None, number, told, given, made)
        for tensor in (told, given, made):
            tensor.fill_(-1.0)
    capture.after(torch.zeros(2, 4, 8, 8))
    kept = capture.call().updates
    assert [float(step.prediction.max()) for step in kept] == [1.0, 2.0]
    assert all(step.stepped.min() >= 0 and step.sample.min() >= 0 for step in kept)
    assert all(step.calls == () for step in kept)


# Watching.


def test_no_pass_is_made_and_the_images_are_the_same(
    usual: tuple[Any, om.Detector],
) -> None:
    pipe, detector = usual
    plain = pipe(**drawn())
    passes = Passes(pipe.unet)
    with watched(pipe, detector) as pipe:
        passes.count = 0
        output = pipe(**drawn())
        assert passes.count == STEPS["num_inference_steps"]
        assert output.ood.valid.all()
    assert np.array_equal(output.images, plain.images)


def test_other_numbers_of_steps_are_told_from_the_usual(
    usual: tuple[Any, om.Detector],
) -> None:
    pipe, detector = usual
    with watched(pipe, detector) as pipe:
        often = torch.cat([pipe(**drawn(seed)).ood.p_value for seed in range(100, 108)])
        few = pipe(**drawn(num_inference_steps=3)).ood.p_value
    assert few.max() <= 0.05
    # Valid p-values: 32 of them are below .05 nine times by a chance of 1e-5.
    assert (often <= 0.05).sum() < 9


def test_it_is_a_part_beside_others() -> None:
    pipe = PIXELS()
    detector = fitted(pipe, "output_layer", "energies", "own_calls")
    with watched(pipe, detector) as pipe:
        output = pipe(**drawn())
    told = {name.split("/")[0] for name in output.ood.z}
    assert told == {"output_layer", "energies", "own_calls"}


def test_a_loaded_detector_watches_on(usual: tuple[Any, om.Detector], tmp_path: Any) -> None:
    pipe, detector = usual
    detector.save_pretrained(tmp_path / "saved", card=False)
    adapter = replayed_bound(pipe, call=STEPS)
    loaded = om.Detector.from_pretrained(tmp_path / "saved", adapter)
    found = []
    for each in (detector, loaded):
        with watched(pipe, each) as pipe:
            found.append(pipe(**drawn()).ood.score)
    assert torch.equal(*found)


def test_it_is_scored_in_the_background(
    usual: tuple[Any, om.Detector],
) -> None:
    pipe, detector = usual
    with watched(pipe, detector, mode="background") as pipe:
        pipe(**drawn())
        assert pipe.ood_monitor.flush(30)
        assert pipe.ood_monitor.counts.scored == 4


def test_of_a_chosen_share_its_own_rows_are_scored(
    usual: tuple[Any, om.Detector],
) -> None:
    pipe, detector = usual
    with watched(pipe, detector) as pipe:
        every = pipe(**drawn()).ood.score
    with watched(pipe, detector, sample_rate=0.5, seed=3) as pipe:
        some = pipe(**drawn()).ood.score
    chosen = ~some.isnan()
    assert 0 < chosen.sum() < 4
    assert torch.equal(some[chosen], every[chosen])


def test_a_guided_call_is_watched() -> None:
    pipe, arguments = TEXT(), TEXT.arguments() | STEPS
    with watched(pipe, fitted(pipe, call=TEXT.call_of_one() | STEPS, samples=44)) as pipe:
        assert pipe(**seeded_call(arguments)).ood.valid.all()


def test_a_call_of_fewer_steps_than_are_looked_at_is_a_failure(
    usual: tuple[Any, om.Detector],
) -> None:
    pipe, detector = usual
    with watched(pipe, detector, raise_on_error=False) as pipe:
        assert pipe(**drawn(num_inference_steps=2)).images is not None
        [(told, count)] = pipe.ood_monitor.failures.items()
    assert count == 1
    assert "a call of 3 steps at least, which the part 'own_calls' looks at, got one of 2" in told


def test_of_calls_of_fewer_steps_these_are_looked_at() -> None:
    pipe = PIXELS()
    with watched(pipe, fitted(pipe, call={"num_inference_steps": 2})) as pipe:
        assert pipe(**drawn(num_inference_steps=2)).ood.valid.all()
        assert pipe(**drawn()).ood.valid.all()


# What it cannot be of.


@pytest.mark.parametrize(
    "options",
    [{"data": [IMAGE.images(44)]}, {"watches": "inputs"}],
    ids=["images", "for inputs"],
)
def test_images_have_no_calls_that_made_them(options: dict[str, Any]) -> None:
    pipe = IMAGE()
    with pytest.raises(ValueError, match="which no call of it made: fit without images"):
        fitted(pipe, call=IMAGE.call_of_one(), **options)


def test_a_batch_without_calls_is_refused(
    usual: tuple[Any, om.Detector],
) -> None:
    _, detector = usual
    with pytest.raises(ValueError, match="samples with what was seen of the calls"):
        detector.score({"sample": torch.zeros(2, 3, 8, 8)})
