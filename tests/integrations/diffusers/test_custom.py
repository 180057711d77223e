"""Pipelines of users' own: whatever a call returns, and whatever it names of what it takes."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, replayed_bound
from ood_monitor_integrations.diffusers.calls import samples_of
from ood_monitor_integrations.diffusers.inputs import encoded
from support.pipeline_cases import FEW, case_of, seeded_call
from support.read_pipeline_cases import READ
from torch import Tensor

import ood_monitor as om

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PIXELS, TEXT = case_of("ddim"), case_of("stable-diffusion")
LEVEL = 500


def made_of(kind: Any, case: Any = PIXELS) -> Any:
    made = case()
    pipe = kind(**made.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fitted(pipe: Any, data: Any = None, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"levels": (LEVEL,), "explain": FEW, "progress": False}
    return fit_pipeline(pipe, data, **({"watches": "outputs"} | settings | options))


def watch(pipe: Any, detector: om.Detector, **options: Any) -> Any:
    monitor = om.Monitor(detector, fpr=0.05)
    return monitor_pipeline(pipe, monitor, **({"raise_on_error": True} | options))


# What a call returns.


class Returning(diffusers.DDIMPipeline):
    """Gives its images in the way that is asked for."""

    returned: ClassVar[Callable[[Any], Any]] = staticmethod(lambda images: images)

    def __call__(self, batch_size: int = 1, **options: Any) -> Any:
        options = {"batch_size": batch_size, "output_type": "np"} | options
        return self.returned(super().__call__(**options).images)


def pictures(images: Any) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray((255 * each).round().astype(np.uint8)) for each in images]


class Slotted:
    """Holds nothing that can be added to."""

    __slots__ = ("images",)

    def __init__(self, images: Any) -> None:
        self.images = images


#: What is made of the images of a call, and of how many samples it can be told.
RETURNED: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "array": (lambda images: images, (1, 2)),
    "tensor": (lambda images: torch.from_numpy(images).permute(0, 3, 1, 2), (1, 2)),
    "list of arrays": (list, (1, 2)),
    "list of images": (pictures, (1, 2)),
    "tuple of images": (lambda images: tuple(pictures(images)), (1, 2)),
    "tuple of batches": (lambda images: (images, None, "more"), (1, 2)),
    "dict": (lambda images: {"seed": 3, "images": pictures(images)}, (1, 2)),
    "dict of images": (lambda images: dict(enumerate(pictures(images))), (1, 2)),
    "own object": (lambda images: SimpleNamespace(images=images, seed=3), (1, 2)),
    "slots": (lambda images: Slotted(images), (1, 2)),
    "nothing": (lambda images: None, (1, 2)),
    "a path": (lambda images: "written to a file", (1, 2)),
    "one image": (lambda images: pictures(images)[0], (1,)),
    "one array": (lambda images: images[0], (1,)),
    "one tensor": (lambda images: torch.from_numpy(images[0]).permute(2, 0, 1), (1,)),
}


def returning(name: str) -> Any:
    returned, _ = RETURNED[name]
    return type("Returning", (Returning,), {"returned": staticmethod(returned)})


def bits(value: Any) -> Any:
    """What a value shows, whatever its type, and whether anything was put on it."""
    if isinstance(value, list | tuple):
        return type(value), [bits(each) for each in value]
    if isinstance(value, dict):
        return type(value), {key: bits(each) for key, each in value.items()}
    if isinstance(value, PIL.Image.Image):
        return type(value), value.mode, value.tobytes(), hasattr(value, "ood")
    if isinstance(value, Tensor | np.ndarray):
        return type(value), np.asarray(value).tobytes(), hasattr(value, "ood")
    images = getattr(value, "images", None)
    return (type(value), bits(images)) if images is not None else value


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """Of a detector for all pipelines of these components."""
    pipe = made_of(Returning)
    return fitted(pipe, [PIXELS.images(44)], method="gradient_norms").state_dict()


@pytest.mark.parametrize(
    ("name", "count"), [(name, count) for name, (_, counts) in RETURNED.items() for count in counts]
)
def test_whatever_a_call_returns_is_returned_and_its_samples_are_scored(
    name: str, count: int, state: dict[str, Any]
) -> None:
    pipe = made_of(returning(name))
    call = {"batch_size": count, "num_inference_steps": 3, "output_type": "np"}
    plain, shown = pipe(**seeded_call(call)), made_of(Returning)(**seeded_call(call))
    adapter = replayed_bound(pipe, call={"batch_size": 1}, levels=(LEVEL,))
    watched = watch(pipe, om.Detector.from_state_dict(state, adapter))
    assert not watched.ood_monitor.last
    output = watched(**seeded_call(call))
    assert bits(output) == bits(plain)
    scores = watched.ood_monitor.last["outputs"]
    assert getattr(output, "ood", scores) is scores
    assert hasattr(output, "ood") == (name == "own object")
    latents = torch.from_numpy(2 * shown - 1).permute(0, 3, 1, 2)
    expected = PIXELS.loss(pipe, latents, LEVEL, call, seed=adapter.seed)
    torch.testing.assert_close(scores.log_likelihood.float(), expected, rtol=1e-3, atol=0)


def test_a_call_of_which_none_is_chosen_shows_that_in_the_last_scores(state: Any) -> None:
    pipe = made_of(returning("list of arrays"))
    adapter = replayed_bound(pipe, call={"batch_size": 1}, levels=(LEVEL,))
    detector = om.Detector.from_state_dict(state, adapter)
    watched = watch(pipe, detector, sample_rate=1e-9)
    watched(batch_size=3, num_inference_steps=3, output_type="np")
    assert watched.ood_monitor.last["outputs"].score.isnan().tolist() == [True] * 3


#: What is returned of samples, the samples, and what is said.
OTHERS: dict[str, tuple[Any, int, str]] = {
    "one of four": (PIL.Image.new("RGB", (8, 8)), 4, "got 1 of 4"),
    "one array of four": (np.zeros((8, 8, 3)), 4, "of 4, which are not copies"),
    "three of four": ([0, 0, 0], 4, "got 3 of 4, .* in a list"),
    "two of four": (np.zeros((2, 8, 8, 3)), 4, "got 2 of 4"),
    "two runs": ({"images": [0, 0]}, 1, "got 2 of 1"),
    "none": ([], 2, "got 0 of 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_samples_that_are_not_those_denoised_are_refused_with_what_settles_it(name: str) -> None:
    output, rows, message = OTHERS[name]
    stepped = torch.randn(rows, 3, 8, 8)
    with pytest.raises(ValueError, match=rf"{message}.*batch=\.\.\."):
        samples_of(output, stepped)


#: What is returned of samples of a shape, how often each was denoised, and how many there are.
COUNTED: dict[str, tuple[Any, tuple[int, ...], int, int]] = {
    "tokens": (torch.zeros(2, 16, 4), (2, 16, 4), 1, 2),
    "guidance by copies": ([0, 0], (2, 3, 8, 8), 2, 2),
    "guidance by copies, unseen": (None, (2, 3, 8, 8), 2, 2),
    "one image by copies": (PIL.Image.new("RGB", (8, 8)), (1, 3, 8, 8), 2, 1),
    "grey images": (np.zeros((2, 8, 8)), (2, 1, 8, 8), 1, 2),
    "sounds": (np.zeros((2, 100)), (2, 8, 4, 4), 1, 2),
    "a list of frames": ([0] * 5, (1, 4, 5, 8, 8), 1, 1),
    "videos": ([[0] * 5] * 2, (2, 4, 5, 8, 8), 1, 2),
}


@pytest.mark.parametrize("name", COUNTED)
def test_samples_are_counted_by_what_was_denoised(name: str) -> None:
    output, shape, copies, count = COUNTED[name]
    stepped = torch.cat([torch.randn(shape)] * copies)
    assert samples_of(output, stepped) == count


def test_a_batch_of_one_s_own_settles_which_samples_are_scored() -> None:
    class Best(diffusers.DDIMPipeline):
        """Denoises two, and returns the second."""

        def __call__(self, **options: Any) -> Any:
            images = super().__call__(batch_size=2, output_type="np", **options).images
            return pictures(images)[1]

    pipe = made_of(Best)
    bound = om.DenoisingBound(pipe.unet, pipe.scheduler, levels=(LEVEL,))
    detector = om.Detector(bound).fit([2 * PIXELS.images(44) - 1], progress=False)
    watched = watch(pipe, detector, batch=lambda call, count: call.sample[-count:])
    watched(num_inference_steps=3)
    assert len(watched.ood_monitor.last["outputs"].score) == 1
    watched.ood_monitor.detach()
    with pytest.raises(ValueError, match="got 1 of 2"):
        watch(pipe, detector)(num_inference_steps=3)


# What a call takes.


class Loop(diffusers.DiffusionPipeline):
    """A loop of one's own."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def denoised(self, x: Tensor, steps: int) -> list[Tensor]:
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return list(x)


class Unseeded(Loop):
    """Takes no generator: its noise is PyTorch's."""

    def __call__(self, num_inference_steps: int = 3) -> Any:
        return self.denoised(torch.randn(4, 3, 8, 8), num_inference_steps)


class OfNumpy(Loop):
    """Its noise is NumPy's, and Python's."""

    def __call__(self, num_inference_steps: int = 3) -> Any:
        noise = torch.from_numpy(
            np.random.standard_normal((4, 3, 8, 8)).astype(np.float32)
        )  # the state that is looked at
        return self.denoised(noise + random.random(), num_inference_steps)


class Anything(Loop):
    """Names none of its arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        noise = torch.randn(4, 3, 8, 8, generator=kwargs.get("generator"))
        return self.denoised(noise, kwargs.get("num_inference_steps", 3))


class Refusing(Loop):
    """Names none of its arguments, and takes no other than it knows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)

    def own(self, count: int = 4) -> Any:
        return self.denoised(torch.randn(count, 3, 8, 8), 3)


class Handing(diffusers.DDIMPipeline):
    """Hands on what it is given, but for what it sets itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, batch_size=4, num_inference_steps=3, **kwargs)


UNNAMED = (Unseeded, OfNumpy, Anything, Refusing, Handing)


@pytest.mark.parametrize("kind", UNNAMED)
def test_own_samples_differ_are_the_same_again_and_change_no_random_state(kind: Any) -> None:
    pipe = made_of(kind)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, again = (fitted(pipe, samples=44, method="forward") for _ in range(2))
    other = fitted(pipe, samples=44, method="forward", seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    scores = first.fitted.calibration.scores
    assert len(np.unique(scores.round(6))) == len(scores)
    assert np.array_equal(scores, again.fitted.calibration.scores)
    assert not np.array_equal(scores, other.fitted.calibration.scores)
    watched = watch(pipe, first)
    assert len(watched()) in (1, 4)
    assert watched.ood_monitor.last["outputs"].valid.tolist() == [True] * 4


class Fixed(Loop):
    """Begins with the same noise each time."""

    def __call__(self, num_inference_steps: int = 3) -> Any:
        noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return self.denoised(noise, num_inference_steps)


def test_own_samples_that_are_the_same_are_refused_with_what_settles_it() -> None:
    with pytest.raises(ValueError, match=r"differ from call to call, got the same.*`generator`"):
        fitted(made_of(Fixed), samples=44)


def test_latents_that_are_given_for_own_samples_are_refused() -> None:
    call = TEXT.call_of_one() | {"latents": torch.randn(1, 4, 8, 8)}
    with pytest.raises(ValueError, match=r"fixed by the call's arguments, such as `latents`"):
        fitted(TEXT(), call=call, samples=44)
    calls = [call | {"latents": torch.randn(1, 4, 8, 8)} for _ in range(2)]
    with pytest.raises(ValueError, match="got the same with seeds 0 and 2"):
        fitted(TEXT(), call=calls, samples=44, seed=0)


def test_an_error_of_the_call_s_own_is_raised_as_it_is() -> None:
    class Broken(Loop):
        def __call__(self, **kwargs: Any) -> Any:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        replayed_bound(made_of(Broken))


# A callback among the keywords that a call hands on.


class HandingText(diffusers.StableDiffusionPipeline):
    """Hands on what it is given."""

    def __call__(self, **kwargs: Any) -> Any:
        return super().__call__(**kwargs)


def halved(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 0.5 * tensors["latents"]}


@pytest.fixture(scope="module")
def text() -> tuple[Any, om.Detector]:
    made = TEXT()
    pipe = HandingText(**made.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"call": TEXT.call_of_one(), "method": "gradient_norms"}
    return pipe, fitted(pipe, [TEXT.images(44)], **options)


def test_latents_that_a_handed_on_callback_changes_are_scored(text: tuple[Any, Any]) -> None:
    pipe, detector = text
    arguments = TEXT.arguments() | {"callback_on_step_end": halved}
    latents = pipe(**seeded_call(arguments | {"output_type": "latent"})).images
    watched = watch(pipe, detector)
    found = watched(**seeded_call(arguments)).ood.log_likelihood
    expected = TEXT.loss(pipe, latents, LEVEL, TEXT.arguments(), seed=detector.adapter.seed)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=0)
    watched.ood_monitor.detach()


def test_a_handed_on_callback_that_says_what_it_needs_is_refused(text: tuple[Any, Any]) -> None:
    pipe, detector = text
    arguments = TEXT.arguments() | {
        "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=1.0)
    }
    plain = pipe(**seeded_call(arguments)).images
    watched = watch(pipe, detector, raise_on_error=False)
    assert torch.equal(watched(**seeded_call(arguments)).images, plain)
    [kind] = watched.ood_monitor.failures
    assert "name both, or give a function" in kind
    watched.ood_monitor.detach()


# Held-out images, in the layout and units of what is denoised.


def decoded_alone(pipe: Any, pixels: Tensor) -> Tensor:
    """What the autoencoder makes of images, without the pipeline."""
    is_of_videos = "Qwen" in type(pipe.vae).__name__
    given = pixels.unsqueeze(2) if is_of_videos else pixels
    found = pipe.vae.decode(pipe.vae.encode(given).latent_dist.mean).sample
    return found.squeeze(2) if is_of_videos else found


class Undenoised(diffusers.FlowMatchEulerDiscreteScheduler):
    """Leaves samples as they are, so that a call decodes the latents that it is given."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **more: Any) -> Any:
        return (sample,)


@pytest.mark.parametrize("name", ["flux2", "flux2-klein", "qwen-image"])
@torch.no_grad()
def test_images_are_encoded_to_what_the_pipeline_decodes(name: str) -> None:
    case = next(case for case in READ if case.name == name)
    pipe, images = case(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    like = torch.zeros(1, *(case.latents or (16, 8)))
    latents = encoded(pipe, images, like, (16, 16))
    pipe.scheduler = Undenoised.from_config(pipe.scheduler.config)
    # Flux2's pipelines pack those that they are given.
    given = latents.mT.unflatten(2, (4, 4)) if name.startswith("flux2") else latents
    found = pipe(**case.arguments() | {"latents": given, "output_type": "pt"})[0]
    expected = (decoded_alone(pipe, 2 * images - 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    detector = fitted(
        case(), [torch.rand(44, 3, 16, 16)], call=case.call_of_one(), method="forward"
    )
    assert detector.source == "held-out images"
