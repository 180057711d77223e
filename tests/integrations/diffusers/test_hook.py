"""The hook itself: what it gives, what it leaves alone, what it costs, and what it never breaks."""

import copy
import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, replayed_bound, wrap
from ood_monitor_integrations.diffusers.watching import hooked
from support.pipeline_cases import FEW, case_of, known, seeded_call
from torch import Tensor

import ood_monitor as om

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEXT, PIXELS, IMAGE = case_of("stable-diffusion"), case_of("ddim"), case_of("img2img")


#: Of the denoiser: what a score of these costs is enough here.
END = ("up_blocks.1.*", "conv_norm_out.*", "conv_out.*")


def fitted(pipe: Any, case: Any = TEXT, **options: Any) -> om.Detector:
    settings: dict[str, Any] = {"layers": END} | options
    return known(pipe, case, **settings)


def monitor_of(detector: om.Detector) -> om.Monitor:
    return om.Monitor(detector, fpr=0.05)


@pytest.fixture
def pipe() -> Any:
    return TEXT()


def call(pipe: Any, seed: int = 0, **more: Any) -> Any:
    return pipe(**seeded_call(TEXT.arguments() | more, seed))


def per_request(pipe: Any, kind: Any = diffusers.StableDiffusionPipeline) -> Any:
    """As diffusers' server makes it: a scheduler of its own, everything else shared."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made = kind.from_pipe(pipe, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def bits(output: Any) -> bytes:
    return np.asarray(output[0]).tobytes()


# What a call gives.


def test_a_tuple_stays_a_tuple_and_the_scores_are_the_monitors_last(pipe: Any) -> None:
    plain = call(pipe, return_dict=False)
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    output = call(watched, return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == len(plain)
    assert bits(output) == bits(plain)
    assert watched.ood_monitor.monitor.last.score.shape == (2,)


def test_an_output_has_the_scores_beside_its_items(pipe: Any) -> None:
    plain = call(pipe)
    output = call(monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True))
    assert output.ood.p_value.shape == (2,)
    assert list(output.keys()) == list(plain.keys())
    assert len(output.to_tuple()) == len(plain.to_tuple())


def test_both_outputs_and_inputs_are_scored_each_by_a_monitor() -> None:
    pipe = IMAGE()
    watched = monitor_pipeline(pipe, fitted_of(IMAGE, pipe), what="both", raise_on_error=True)
    output = watched(**seeded_call(IMAGE.arguments()))
    assert not torch.equal(output.ood.score, output.ood_inputs.score)
    assert watched.ood_monitor.monitors.keys() == {"outputs", "inputs"}
    assert watched.ood_monitor.monitors["inputs"].samples_seen == 2


def fitted_of(case: Any, pipe: Any) -> om.Detector:
    # Enough calibration samples for the default fpr of a monitor that is made from a detector.
    call = case.call_of_one()
    options: dict[str, Any] = {"levels": (500,), "explain": FEW, "progress": False}
    options["watches"] = "both"
    return fit_pipeline(pipe, [case.images(220)], call=call, **options)


@pytest.mark.filterwarnings("ignore:You have passed:FutureWarning")  # of the images that it copies
def test_an_image_that_makes_several_samples_is_scored_once() -> None:
    pipe = IMAGE()
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe, IMAGE)), what="inputs")
    output = watched(**seeded_call(IMAGE.arguments()), num_images_per_prompt=2)
    assert len(output[0]) == 4
    assert output.ood.p_value.shape == (2,)


def test_without_guidance_the_same_sample_has_the_same_score(pipe: Any) -> None:
    # Guidance by 0 of an equal condition changes nothing: only which half is taken could.
    same = {"negative_prompt_embeds": TEXT.arguments()["prompt_embeds"]}
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    guided = call(watched, guidance_scale=3.0, **same).ood
    unguided = call(watched, guidance_scale=1.0, **same).ood
    torch.testing.assert_close(guided.score, unguided.score, rtol=1e-3, atol=0)


def test_the_noise_of_the_bound_is_of_no_seed_that_users_pick(pipe: Any) -> None:
    # It would be the noise that the sample was made from, at the level that it is tested at.
    def first(seed: int) -> float:
        return float(torch.randn(1, generator=torch.Generator().manual_seed(seed)))

    adapter = replayed_bound(pipe, call=TEXT.call_of_one(), levels=(0, 50, 500, 999))
    used = {first(1000 * adapter.seed + level) for level in adapter.levels}
    assert not used & {first(seed) for seed in range(10_000)}


def test_calls_are_alerted_of(pipe: Any) -> None:
    heard: list[om.Alert] = []
    monitor = om.Monitor(fitted(pipe), fpr=0.05, ert=20, sinks=[heard.append])
    watched = monitor_pipeline(pipe, monitor, raise_on_error=True)
    for seed in range(10):  # an untrained model's samples are nothing like the held-out images
        call(watched, seed)
    assert watched.ood_monitor.flush()
    assert [alert.kind for alert in watched.ood_monitor.alerts] == [alert.kind for alert in heard]
    assert "drift" in {alert.kind for alert in heard}


# What is left alone.


def test_detach_gives_everything_back(pipe: Any) -> None:
    parts = [pipe, pipe.unet, pipe.scheduler]
    detector, kind = fitted(pipe), type(pipe)
    call(pipe)
    before = [dict(part.__dict__) for part in parts]
    hooks = dict(pipe.unet._forward_pre_hooks)
    with monitor_pipeline(pipe, monitor_of(detector)) as watched:
        assert isinstance(watched, kind)
        call(watched)
    assert type(pipe) is kind
    assert dict(pipe.unet._forward_pre_hooks) == hooks == {}
    for part, was in zip(parts, before, strict=True):
        assert part.__dict__.keys() == was.keys()
        assert all(same(part.__dict__[name], value) for name, value in was.items()), type(part)


def same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


def test_the_scheduler_is_left_as_an_unwatched_call_leaves_it(pipe: Any) -> None:
    other = TEXT()
    call(other)
    call(monitor_pipeline(pipe, monitor_of(fitted(pipe))))
    assert "step" not in pipe.scheduler.__dict__
    assert pipe.scheduler.__dict__.keys() == other.scheduler.__dict__.keys()
    assert torch.equal(pipe.scheduler.timesteps, other.scheduler.timesteps)
    assert torch.equal(pipe.scheduler.alphas_cumprod, other.scheduler.alphas_cumprod)


def test_save_pretrained_writes_what_it_always_did(tmp_path: Path) -> None:
    pipe = PIXELS()
    pipe.save_pretrained(tmp_path / "plain")
    monitor_pipeline(pipe, monitor_of(fitted(pipe, PIXELS))).save_pretrained(tmp_path / "watched")
    files = [file for file in (tmp_path / "plain").rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"model_index.json"}
    for file in files:
        other = tmp_path / "watched" / file.relative_to(tmp_path / "plain")
        assert other.read_bytes() == file.read_bytes(), file
    assert len(files) == sum(file.is_file() for file in (tmp_path / "watched").rglob("*"))


def test_what_a_user_changes_afterwards_changes_no_score(pipe: Any) -> None:
    arguments = TEXT.arguments()
    expected = call(monitor_pipeline(pipe, monitor_of(fitted(pipe)))).ood.score
    pipe.ood_monitor.detach()
    slow = monitor_pipeline(pipe, monitor_of(fitted(pipe)), mode="background")
    with held(slow):
        slow(**seeded_call(arguments))
        arguments["prompt_embeds"].zero_()
    assert slow.ood_monitor.flush(30)
    assert torch.equal(slow.ood_monitor.monitor.last.score, expected)


def test_an_image_that_a_user_writes_over_afterwards_changes_no_score() -> None:
    pipe, arguments = IMAGE(), IMAGE.arguments()
    detector, found = fitted(pipe, IMAGE), []
    for overwritten in (False, True):
        monitor = monitor_of(detector)
        watched = monitor_pipeline(pipe, monitor, what="inputs", mode="background")
        with held(watched):
            watched(**seeded_call(arguments))  # the worker is busy with this one
            watched(**seeded_call(arguments))
            if overwritten:
                arguments["image"].zero_()
        watched.ood_monitor.detach(30)
        found.append(monitor.last.score)
    assert torch.equal(*found)


# Threads, and pipelines that share a denoiser.


class held:
    """The monitor's scoring waits within the block."""

    def __init__(self, pipe: Any) -> None:
        self._lock = threading.Lock()
        monitor = pipe.ood_monitor.monitor
        score = monitor.score

        def waiting(batch: Any) -> Any:
            with self._lock:
                return score(batch)

        monitor.score = waiting

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def test_a_pipeline_per_request_is_watched_within_wrap_alone(pipe: Any) -> None:
    monitor = monitor_of(fitted(pipe))
    request = per_request(pipe)
    with wrap(request, monitor, raise_on_error=True) as watched:
        assert call(watched).ood.valid.all()
    assert monitor.samples_seen == 2
    call(request)
    call(pipe)
    assert monitor.samples_seen == 2
    assert not pipe.unet._forward_pre_hooks


def test_a_pipeline_made_of_a_watched_one_is_not_watched_itself(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)))
    made = per_request(watched, type(watched))
    assert not hasattr(call(made), "ood")
    assert watched.ood_monitor.monitor.samples_seen == 0


def test_a_copy_of_a_watched_pipeline_is_watched(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    request = copy.copy(watched)
    request.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    assert call(request).ood.valid.all()


@pytest.mark.slow
@pytest.mark.both_methods
@pytest.mark.parametrize("mode", ["sync", "background"])
def test_threads_with_pipelines_of_their_own_get_their_own_images_and_scores(
    pipe: Any, mode: Any
) -> None:
    seeds = list(range(8))
    plain = [bits(call(per_request(pipe), seed)) for seed in seeds]
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), mode=mode, raise_on_error=True)
    scores = [call(watched, seed) for seed in seeds]

    def serve(seed: int) -> Any:
        return watched.ood_monitor.call(per_request(pipe), (), seeded_call(TEXT.arguments(), seed))

    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(serve, seeds))
    assert [bits(output) for output in outputs] == plain
    assert watched.ood_monitor.flush(30)
    assert watched.ood_monitor.counts.scored + watched.ood_monitor.counts.dropped == 32
    if mode == "sync":
        for output, expected in zip(outputs, scores, strict=True):
            torch.testing.assert_close(output.ood.score, expected.ood.score)


def test_a_call_without_a_generator_gets_the_same_images_while_another_is_scored(pipe: Any) -> None:
    def calls() -> list[bytes]:
        torch.manual_seed(0)
        return [bits(pipe(**TEXT.arguments())) for _ in range(4)]

    plain = calls()
    monitor_pipeline(pipe, monitor_of(fitted(pipe)), mode="background", raise_on_error=True)
    assert calls() == plain


def test_calls_that_share_a_scheduler_leave_it_unpatched(pipe: Any) -> None:
    monitor = monitor_of(fitted(pipe))
    with wrap(pipe, monitor) as first, wrap(pipe, monitor) as second:
        with ThreadPoolExecutor(2) as pool:  # not a safe thing to do, but nothing of ours may break
            list(pool.map(call, (first, second)))
        assert pipe.unet._forward_pre_hooks
    assert "step" not in pipe.scheduler.__dict__
    assert not pipe.unet._forward_pre_hooks


# How much is scored.


def test_a_share_of_the_samples_is_scored_and_the_rest_counted(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), sample_rate=0.3)
    valid = torch.cat([call(watched, seed).ood.valid for seed in range(20)])
    counts = watched.ood_monitor.counts
    assert 4 <= counts.scored <= 20
    assert counts.scored == int(valid.sum()) == watched.ood_monitor.monitor.samples_seen
    assert counts.scored + counts.skipped == 40
    assert not counts.failures


def test_which_samples_are_scored_does_not_depend_on_what_they_show(pipe: Any) -> None:
    def chosen(first: int) -> Tensor:
        watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), sample_rate=0.5)
        valid = [call(watched, first + i).ood.valid for i in range(6)]
        watched.ood_monitor.detach()
        return torch.cat(valid)

    assert torch.equal(chosen(0), chosen(100))


def test_a_budget_too_small_for_more_scores_one_sample_and_then_none(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), max_latency_ms=1e-3)
    valid = [int(call(watched, seed).ood.valid.sum()) for seed in range(2)]
    assert valid == [1, 0]
    assert watched.ood_monitor.counts.skipped == 3


def test_a_large_budget_scores_all_once_the_cost_is_known(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), max_latency_ms=1e6)
    assert [int(call(watched, seed).ood.valid.sum()) for seed in range(2)] == [1, 2]


def test_the_background_drops_and_counts_what_does_not_fit(pipe: Any) -> None:
    plain = [bits(call(pipe, seed)) for seed in range(6)]
    watched = monitor_pipeline(
        pipe, monitor_of(fitted(pipe)), mode="background", queue_size=2, raise_on_error=True
    )
    with held(watched):
        outputs = [call(watched, seed) for seed in range(6)]
        assert not watched.ood_monitor.flush(0.01)
    assert [bits(output) for output in outputs] == plain
    assert not hasattr(outputs[0], "ood")
    assert watched.ood_monitor.flush(30)
    counts = watched.ood_monitor.counts
    assert counts.scored + counts.dropped == 12
    assert counts.dropped >= 6  # one is being scored and two wait
    assert watched.ood_monitor.monitor.samples_seen == counts.scored


def test_detaching_scores_what_is_queued(pipe: Any) -> None:
    monitor = monitor_of(fitted(pipe))
    with monitor_pipeline(pipe, monitor, mode="background") as watched:
        for seed in range(3):
            call(watched, seed)
    assert monitor.samples_seen == 6


def test_background_scores_are_those_of_sync() -> None:
    pipe = IMAGE()
    detector = fitted(pipe, IMAGE)
    found = []
    for mode in ("sync", "background"):
        monitor = monitor_of(detector)
        watched = monitor_pipeline(pipe, monitor, what="inputs", mode=mode, raise_on_error=True)
        watched(**seeded_call(IMAGE.arguments()))
        watched.ood_monitor.detach(30)
        found.append(monitor.last.score)
    assert torch.equal(*found)


# What fails.


def test_a_failing_score_never_breaks_a_call(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = call(pipe, height=32, width=32)
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)))  # of images of another size
    with caplog.at_level(logging.WARNING):
        outputs = [call(watched, height=32, width=32) for _ in range(2)]
    assert bits(outputs[0]) == bits(plain)
    assert watched.ood_monitor.counts.failures == 2
    assert caplog.text.count("was not scored") == 1
    assert not hasattr(outputs[0], "ood")


def test_a_failing_score_is_raised_if_asked_for(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    with pytest.raises(ValueError, match="Expected samples as the detector was fitted on"):
        call(watched, height=32, width=32)
    assert "step" not in pipe.scheduler.__dict__


def test_a_failing_call_raises_what_it_always_did(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)))
    with pytest.raises(ValueError, match="divisible by 8"):
        call(watched, height=13)
    assert "step" not in pipe.scheduler.__dict__
    assert watched.ood_monitor.counts.failures == 0


def test_a_sample_that_is_not_finite_is_counted_as_invalid(pipe: Any) -> None:
    watched = monitor_pipeline(pipe, monitor_of(fitted(pipe)), raise_on_error=True)
    embeddings = TEXT.arguments()["prompt_embeds"]
    embeddings[0] = torch.nan
    output = call(watched, prompt_embeds=embeddings, output_type="latent")
    assert output.ood.valid.tolist() == [False, True]
    assert watched.ood_monitor.monitor.invalid == 1


def test_a_detector_of_another_model_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected a detector of .* UNet2DConditionModel"):
        monitor_pipeline(TEXT(), monitor_of(fitted(pipe)))


def test_watching_twice_is_refused(pipe: Any) -> None:
    monitor = monitor_of(fitted(pipe))
    monitor_pipeline(pipe, monitor)
    with pytest.raises(ValueError, match="not watched yet"):
        monitor_pipeline(pipe, monitor)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"what": "images"}, "Expected what of"),
    ({"mode": "async"}, "Expected mode of"),
    ({"sample_rate": 0.0}, "Expected sample_rate in"),
    ({"max_latency_ms": 0.0}, "Expected max_latency_ms in"),
    ({"mode": "background", "queue_size": 0}, "Expected queue_size of"),
    ({"what": "inputs"}, "Expected a pipeline that is given an image"),
    ({"what": "both"}, "Expected a detector, or a monitor for each"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_option_is_refused(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        monitor_pipeline(pipe, monitor_of(fitted(pipe)), **options)
    assert not pipe.unet._forward_pre_hooks


# Adapters of a user's own.


def test_a_plain_bound_watches_an_unconditional_pipeline() -> None:
    pipe = PIXELS()
    bound = om.DenoisingBound(pipe.unet, pipe.scheduler, levels=(500,))
    detector = om.Detector(bound, explain=FEW)
    detector.fit([torch.randn(60, 3, 8, 8)], progress=False)
    watched = monitor_pipeline(pipe, monitor_of(detector), raise_on_error=True)
    assert watched(**seeded_call(PIXELS.arguments())).ood.valid.all()


def own_bound(pipe: Any) -> om.Detector:
    bound = om.DenoisingBound(
        pipe.unet,
        pipe.scheduler,
        levels=(500,),
        condition=lambda batch: {"encoder_hidden_states": batch[1]},
    )
    batch = torch.randn(60, 4, 8, 8), torch.randn(60, 7, 8)
    return om.Detector(bound, explain=FEW).fit([batch], progress=False)


def test_a_bound_of_samples_alone_is_refused_for_a_conditional_denoiser(pipe: Any) -> None:
    with pytest.raises(ValueError, match="needs \\['encoder_hidden_states'\\]"):
        monitor_pipeline(pipe, monitor_of(own_bound(pipe)))


def test_an_adapter_of_ones_own_gets_the_batch_that_is_made_for_it(pipe: Any) -> None:
    def batch(call: Any, count: int) -> Any:
        return call.sample, call.arguments["encoder_hidden_states"][-count:]

    monitor = monitor_of(own_bound(pipe))
    watched = monitor_pipeline(pipe, monitor, batch=batch, raise_on_error=True)
    assert call(watched).ood.valid.all()


class Collecting(torch.nn.Linear):
    """While a hook is put on, the interpreter collects what nobody holds, as it may at any time."""

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        gc.collect()
        return super().register_forward_pre_hook(*args, **kwargs)


@pytest.mark.parametrize("shared", [True, False])
def test_a_watch_that_nobody_ended_may_be_collected_while_another_begins(shared: bool) -> None:
    module = Collecting(1, 1)
    abandoned: list[Any] = [hooked(module if shared else torch.nn.Linear(1, 1))]
    abandoned[0].__enter__()
    abandoned.append(abandoned)  # so that it lives until it is collected
    gc.disable()
    del abandoned
    seen: list[int] = []

    def work() -> None:
        with hooked(module):
            gc.collect()
            seen.append(len(module._forward_pre_hooks))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    gc.enable()
    assert seen == [1]
    assert not module._forward_pre_hooks
