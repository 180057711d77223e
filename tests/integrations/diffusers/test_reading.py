"""How a pipeline calls its denoiser is read off a call, or the pipeline is refused by name."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import replayed_bound
from ood_monitor_integrations.diffusers.capture import Capture
from ood_monitor_integrations.diffusers.layouts import Layout, layouts_of
from ood_monitor_integrations.diffusers.recorded_call import record_call
from ood_monitor_integrations.diffusers.templates import Rows, filled, template
from ood_monitor_integrations.diffusers.watching import capturing, stepping
from support.further_pipeline_cases import FURTHER
from support.given_pipeline_cases import GIVEN
from support.pipeline_cases import PIPELINES, PipelineCase, seeded_call
from support.read_pipeline_cases import READ
from torch import Tensor

# diffusers' own, of schedulers that hand a tensor to numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

LEVEL = 500


def case_of(name: str) -> PipelineCase:
    return next(case for case in PIPELINES + GIVEN + READ + FURTHER if case.name == name)


TEXT, PIXELS = case_of("stable-diffusion"), case_of("ddim")


@torch.no_grad()
def difference(case: PipelineCase, pipe: Any, arguments: dict[str, Any]) -> float:
    """Of the bound and the training loss, as a share."""
    bound = replayed_bound(pipe, call=arguments, levels=(LEVEL,), seed=0)
    found = record_call(pipe, seeded_call(arguments), 0)
    batch = bound.batch(found.call, found.count)
    [(_, values)] = bound.log_likelihood(batch)
    expected = case.loss(pipe, batch["sample"], LEVEL, arguments)
    return float(((values.float() - expected) / expected).abs().max())


# Schedulers.

#: What schedulers are configured by, where they know it.
CONFIGURED: tuple[dict[str, Any], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True},
)

#: Of those for Stable Diffusion, all that its pipeline runs here: PNDM's needs other steps.
SCHEDULERS = (
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.UniPCMultistepScheduler,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_a_bound_is_the_training_loss_whatever_the_scheduler(kind: Any) -> None:
    pipe = TEXT()
    config = pipe.scheduler.config
    for options in CONFIGURED:
        scheduler = kind.from_config(config, **options)
        if all(scheduler.config.get(name) == value for name, value in options.items()):
            pipe.scheduler = scheduler
            assert difference(TEXT, pipe, TEXT.arguments()) < 1e-4, options


# Guidance.


def test_the_condition_need_not_have_the_largest_weight_of_three() -> None:
    case = case_of("instruct-pix2pix")
    # 1.2 for text and image, 1.8 for the image alone, -2 for neither.
    arguments = case.arguments() | {"guidance_scale": 1.2, "image_guidance_scale": 3.0}
    assert difference(case, case(), arguments) < 1e-4


@pytest.mark.parametrize("name", ["stable-diffusion", "instruct-pix2pix", "lumina2"])
def test_rows_that_hardly_differ_are_told_by_the_call_without_guidance(name: str) -> None:
    case = case_of(name)
    arguments = case.arguments()
    null = arguments["negative_prompt_embeds"]
    arguments["prompt_embeds"] = null + 1e-6 * arguments["prompt_embeds"]
    assert difference(case, case(), arguments) < 1e-4


def test_guidance_that_cannot_be_read_is_refused() -> None:
    arguments = TEXT.arguments()
    arguments["negative_prompt_embeds"] = arguments["prompt_embeds"]
    with pytest.raises(ValueError, match=r"got denoiser calls of \(2,\) times the samples"):
        replayed_bound(TEXT(), call=arguments)


def test_a_call_without_guidance_is_scored_by_a_detector_fitted_with_it() -> None:
    pipe, arguments = TEXT(), TEXT.arguments()
    bound = replayed_bound(pipe, call=arguments, levels=(LEVEL,), seed=0)
    unguided = arguments | {"guidance_scale": 1.0}
    found = record_call(pipe, unguided, 0)
    batch = bound.batch(found.call, found.count)
    assert torch.equal(batch["encoder_hidden_states"], arguments["prompt_embeds"])


# Pipelines of one's own.


class Own(diffusers.DDIMPipeline):
    """DDIM's loop, with a place for what others do around the denoiser."""

    given: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)
    told: Callable[[Any], Any] = staticmethod(lambda t: t)
    taken: Callable[[Tensor], Tensor] = staticmethod(lambda output: output)
    between: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 2, num_inference_steps: int = 3, generator: Any = None
    ) -> Any:
        shape = (batch_size, 3, 8, 8)
        x = torch.randn(shape, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(self.given(x), self.told(t)).sample
            x = self.scheduler.step(self.taken(output), t, x).prev_sample
            x = self.between(x)
        return (x.permute(0, 2, 3, 1).numpy(),)


def own(**ways: Callable[[Any], Any]) -> Any:
    made = PIXELS()
    kind = type("Own", (Own,), {name: staticmethod(way) for name, way in ways.items()})
    pipe = kind(made.unet, made.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected_of(pipe: Any, batch: Any, way: dict[str, Any]) -> Tensor:
    def predict(pipe: Any, x: Tensor, t: Tensor, arguments: Any) -> Tensor:
        told = way.get("told", lambda t: t)(t)
        return way.get("taken", lambda output: output)(pipe.unet(x, told).sample)

    case = PipelineCase("own", lambda: pipe, dict, predict)
    return case.loss(pipe, batch["sample"], LEVEL, {})


#: What a pipeline of one's own may do, and is scored by.
WAYS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "as DDIM": {},
    "the sign turned": {"taken": lambda output: -output},
    "a thousandth": {"told": lambda t: t / 1000},
    "what is left of a thousand": {"told": lambda t: 1000 - t},
    "a map of its own": {"told": lambda t: 0.37 * t + 12.5},
}


@pytest.mark.parametrize("name", WAYS)
def test_a_pipeline_of_one_s_own_is_read(name: str) -> None:
    pipe = own(**WAYS[name])
    bound = replayed_bound(pipe, levels=(LEVEL,), seed=0)
    found = record_call(pipe, {}, 0)
    batch = bound.batch(found.call, found.count)
    [(_, values)] = bound.log_likelihood(batch)
    expected = expected_of(pipe, batch, WAYS[name])
    torch.testing.assert_close(values.float(), expected, rtol=1e-4, atol=0)


def remembering() -> Callable[[Tensor], Tensor]:
    """A denoiser whose input has something of the call before, in a channel's place."""
    before = torch.zeros(3, 8, 8)

    def given(x: Tensor) -> Tensor:
        nonlocal before
        noisy, before = x + 0.5 * before, x[0].clone()
        return noisy

    return given


#: What is refused, and what is said of it.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another scale": (lambda: own(given=lambda x: 0.5 * x), "scaled by 1 or by alpha"),
    "another sample": (lambda: own(given=remembering()), "up to a factor"),
    "no time": (lambda: own(told=lambda t: 0 * t), "to be the scheduler's time"),
    "a time that is bent": (lambda: own(told=lambda t: t**2), "to be the scheduler's time"),
    "a prediction that is bent": (lambda: own(taken=torch.tanh), "not told"),
    "twice the prediction": (lambda: own(taken=lambda output: 2 * output), "not told"),
    "samples changed between": (
        lambda: own(between=lambda x: x.clamp(-0.5, 0.5)),
        "only the scheduler changes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        replayed_bound(make())


def test_a_denoiser_that_takes_more_into_account_is_refused() -> None:
    pipe = own()
    forward, calls = pipe.unet.forward, []

    @functools.wraps(forward)
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        output = forward(*args, **kwargs)
        output.sample.mul_(len(calls))  # as what a cache gives
        return output

    pipe.unet.forward = counting
    with pytest.raises(ValueError, match="replayed, to give the prediction that was recorded"):
        replayed_bound(pipe)


class Guided(diffusers.StableDiffusionPipeline):
    """A loop that guides at any scale but 1, as some text-to-image pipelines do."""

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        guidance_scale: float = 5.0,
        num_inference_steps: int = 3,
        generator: Any = None,
    ) -> Any:
        x = torch.randn(len(prompt_embeds), 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            if guidance_scale == 1:
                output = self.unet(x, t, prompt_embeds).sample
            else:
                rows = torch.cat([negative_prompt_embeds, prompt_embeds])
                null, own = self.unet(torch.cat([x] * 2), t, rows).sample.chunk(2)
                output = null + guidance_scale * (own - null)
            x = self.scheduler.step(output, t, x).prev_sample
        return (x.permute(0, 2, 3, 1).numpy(),)


def guided() -> Any:
    made = TEXT()
    pipe = Guided(**made.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [5.0, 0.5, 0.3, -2.0])
def test_guidance_of_any_scale_is_read(scale: float) -> None:
    arguments = {"guidance_scale": scale}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        arguments[name] = TEXT.arguments()[name]
    assert difference(TEXT, guided(), arguments) < 1e-4


def test_weak_guidance_is_by_the_rows_of_the_fit_and_turned_guidance_refused() -> None:
    pipe, arguments = guided(), {}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        arguments[name] = TEXT.arguments()[name]
    bound = replayed_bound(pipe, call=arguments, levels=(LEVEL,), seed=0)
    weak = record_call(pipe, arguments | {"guidance_scale": 0.3}, 0)
    batch = bound.batch(weak.call, weak.count)
    assert torch.equal(batch["encoder_hidden_states"], arguments["prompt_embeds"])
    turned = record_call(pipe, arguments | {"guidance_scale": -2.0}, 0)
    with pytest.raises(ValueError, match="another has it"):
        bound.batch(turned.call, turned.count)


def test_rows_of_another_meaning_are_refused() -> None:
    # The condition and a perturbed one of it; then the null condition and the condition, whose
    # weights a rescaled sum does not tell.
    case = case_of("stable-diffusion-pag")
    pipe, arguments = case(), case.arguments()
    perturbed = arguments | {"guidance_scale": 1.0, "pag_scale": 3.0}
    bound = replayed_bound(pipe, call=perturbed, levels=(LEVEL,), seed=0)
    rescaled = arguments | {"guidance_scale": 6.0, "pag_scale": 0.0, "guidance_rescale": 0.7}
    found = record_call(pipe, rescaled, 0)
    with pytest.raises(ValueError, match="none has the condition for certain"):
        bound.batch(found.call, found.count)


# What is returned.


class Chosen(Own):
    """Denoises two samples for each, and returns the second."""

    def __call__(self, batch_size: int = 1, **options: Any) -> Any:
        [images] = super().__call__(batch_size=2 * batch_size, **options)
        return (images[batch_size:],)


def test_samples_of_which_some_are_chosen_are_refused() -> None:
    made = PIXELS()
    pipe = Chosen(made.unet, made.scheduler)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="got 1 of 2, which are not copies"):
        replayed_bound(pipe)


def test_several_runs_through_the_times_are_refused() -> None:
    case = case_of("marigold-depth")
    pipe, arguments = case(), case.arguments()
    bound = replayed_bound(pipe, call=case.call_of_one(), levels=(LEVEL,), seed=0)
    found = record_call(pipe, arguments | {"ensemble_size": 3, "batch_size": 2}, 0)
    with pytest.raises(ValueError, match="runs once through the scheduler's times"):
        bound.batch(found.call, found.count)


# Another scheduler than the fit's.

SWAPPED: dict[str, tuple[dict[str, Any], str]] = {
    "another prediction": ({"prediction_type": "v_prediction"}, "prediction_type='epsilon'"),
    "other levels": ({"beta_schedule": "linear"}, "with the noise levels that the detector"),
    "fewer levels": ({"num_train_timesteps": 500}, "got one of 500"),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_a_scheduler_of_other_levels_is_refused(name: str) -> None:
    options, message = SWAPPED[name]
    pipe = TEXT()
    bound = replayed_bound(pipe, call=TEXT.arguments())
    config = pipe.scheduler.config
    bound.check_scheduler(diffusers.EulerDiscreteScheduler.from_config(config))
    with pytest.raises(ValueError, match=message):
        bound.check_scheduler(diffusers.DDIMScheduler.from_config(config, **options))


def test_edm_may_sample_otherwise_but_not_of_another_scale() -> None:
    pipe = case_of("sdxl-edm")()
    bound = replayed_bound(pipe, call=case_of("sdxl-edm").arguments())
    config = dict(pipe.scheduler.config)
    for options in ({"sigma_max": 120.0}, {"rho": 5.0}, {"sigma_schedule": "exponential"}):
        bound.check_scheduler(diffusers.EDMEulerScheduler.from_config(config, **options))
    # The same levels, of data that are twice as large.
    options = {"sigma_min": 0.004, "sigma_max": 160.0, "sigma_data": 1.0}
    with pytest.raises(ValueError, match=r"sigma_data = 0\.5, as the detector was fitted, got 1"):
        bound.check_scheduler(diffusers.EDMEulerScheduler.from_config(config, **options))


class Renamed(diffusers.DDIMScheduler):
    """A scheduler whose step has names of its own."""

    def step(self, noise: Tensor, at: Any, x: Tensor) -> Any:
        return super().step(noise, at, x)


def test_a_scheduler_with_names_of_its_own_is_refused_and_steps_as_it_does() -> None:
    pipe = own()
    pipe.scheduler = Renamed.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="whose step takes timestep, model_output, sample"):
        replayed_bound(pipe)
    with stepping(pipe.scheduler), capturing(Capture(pipe.unet)):
        x = torch.ones(1, 3, 8, 8)
        pipe.scheduler.step(noise=x, at=pipe.scheduler.timesteps[0], x=x)


# Parts.

LAYOUTS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "as it is": (Layout(), (2, 3, 4, 4)),
    "a frame": (Layout(inserted=(2,)), (2, 3, 1, 4, 4)),
    "in a list": (Layout(listed=True, inserted=(2,)), (2, 3, 1, 4, 4)),
    "context behind": (Layout(dim=1), (2, 5, 4, 4)),
    "context before": (Layout(dim=1, is_last=True), (2, 5, 4, 4)),
    "frames before": (Layout(inserted=(1,), dim=2, is_last=True), (2, 1, 5, 4, 4)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_put_in_a_layout_is_taken_from_it(name: str) -> None:
    layout, shape = LAYOUTS[name]
    whole = torch.randn(*shape)
    value = list(whole.unbind()) if layout.listed else whole
    assert layout in list(layouts_of(value, (3, 4, 4)))
    sample, beside = layout.taken(value, (3, 4, 4)), layout.beside(value, (3, 4, 4))
    assert sample.shape == (2, 3, 4, 4)
    put = layout.put(sample, beside)
    assert torch.equal(torch.stack(list(put)), whole)
    assert isinstance(put, list) == layout.listed


ROWS = Rows(total=4, first=2, count=2)
ARGUMENTS: dict[str, Any] = {
    "of rows": torch.arange(8.0).view(4, 2),
    "of layers and rows": torch.arange(24.0).view(3, 4, 2),
    "of the call": torch.arange(3.0),
    "a list of prompts": [torch.full((n, 2), float(n)) for n in (1, 2, 3, 5)],
    "numbers": [4, 3, 2, 1],
    "sizes": [[(1, 4, 4)]] * 4,
    "features": [torch.arange(16.0).view(4, 2, 2)] * 4,
    "rotations": (torch.arange(8.0).view(2, 4), torch.arange(8.0).view(2, 4)),
    "a scale": 0.7,
    "nested": {"a": torch.arange(4.0), "b": None},
}
TAKEN: dict[str, Any] = {
    "of rows": torch.arange(8.0).view(4, 2)[2:],
    "of layers and rows": torch.arange(24.0).view(3, 4, 2)[:, 2:],
    "a list of prompts": [torch.full((n, 2), float(n)) for n in (3, 5)],
    "numbers": [2, 1],
    "sizes": [[(1, 4, 4)]] * 2,
    "features": [torch.arange(16.0).view(4, 2, 2)[2:]] * 4,
    "nested": {"a": torch.arange(4.0)[2:], "b": None},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_rows_of_an_argument_are_taken_and_put_back(name: str) -> None:
    found: dict[str, Tensor] = {}
    made = template(ARGUMENTS[name], ROWS, "x", found)
    assert all(len(tensor) == 2 for tensor in found.values())
    assert equal(filled(made, found, torch.zeros(2, 1)), TAKEN.get(name, ARGUMENTS[name]))
    # Of one of these rows alone, as they are scored.
    one = {key: tensor[1:] for key, tensor in found.items()}
    assert len(one) == len(found)
    filled(made, one, torch.zeros(1, 1))


def test_another_call_s_template_tells_what_belongs_to_rows_where_lengths_do_not() -> None:
    found: dict[str, Tensor] = {}
    of_call, of_rows = torch.arange(8.0).view(2, 4), torch.ones(2, 3)
    first = template({"a": of_call, "b": of_rows}, Rows(2, 0, 2), "x", found, {"a": of_call})
    assert torch.equal(first["a"], of_call)
    # One row for all, which the first call shows to belong to each.
    other = template({"a": of_call, "b": torch.ones(1, 3)}, Rows(4, 0, 4), "x", found, first)
    assert torch.equal(other["a"], of_call)
    assert other["b"] == first["b"]
    assert found["x.b"].shape == (4, 3)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(np.array_equal(a, b))
