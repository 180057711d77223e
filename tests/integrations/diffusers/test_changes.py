"""The life of a service: what changes a denoiser after the fit is scored, and told of once a state.

The reference of a LoRA is a pipeline without one, into whose weights its product was added by hand.
"""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from ood_monitor_integrations.diffusers import fit_pipeline, monitor_pipeline, wrap
from ood_monitor_integrations.diffusers.denoisers import denoiser_of
from support.further_pipeline_cases import FURTHER
from support.pipeline_cases import FEW, case_of, known, seeded_call
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.densities.parts import Method
from ood_monitor.saving import states
from ood_monitor.saving.states import KnownWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # as we mean
    # PyTorch's, of a network that it compiles in part.
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

peft = pytest.importorskip("peft")

TEXT = case_of("stable-diffusion")

#: Layers that a LoRA is put around: attention, and the last convolution or linear map.
TARGETS = ["to_q", "to_v", "conv_out", "proj_out", "conv1"]


def add(pipe: Any, name: str = "a", seed: int = 1) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
        denoiser_of(pipe).add_adapter(config, adapter_name=name)


def scale(pipe: Any) -> None:
    denoiser_of(pipe).set_adapters("a", 0.3)


def to_nothing(pipe: Any) -> None:
    denoiser_of(pipe).set_adapters("a", 0.0)


def mix(pipe: Any) -> None:
    add(pipe, "b", seed=2)
    denoiser_of(pipe).set_adapters(["a", "b"], [0.5, 0.2])


def disable(pipe: Any) -> None:
    denoiser_of(pipe).disable_lora()


def enable(pipe: Any) -> None:
    denoiser_of(pipe).enable_lora()


def delete(pipe: Any) -> None:
    denoiser_of(pipe).delete_adapters("a")


def unload(pipe: Any) -> None:
    denoiser_of(pipe).unload_lora()


def swap(pipe: Any) -> None:
    delete(pipe)
    add(pipe, "b", seed=2)


def fuse(pipe: Any) -> None:
    denoiser_of(pipe).fuse_lora()


def unfuse(pipe: Any) -> None:
    denoiser_of(pipe).unfuse_lora()


def fuse_projections(pipe: Any) -> None:
    denoiser_of(pipe).fuse_qkv_projections()


def unfuse_projections(pipe: Any) -> None:
    denoiser_of(pipe).unfuse_qkv_projections()


def freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def without_freeu(pipe: Any) -> None:
    pipe.disable_freeu()


def compiled(pipe: Any) -> None:
    denoiser_of(pipe).compile(backend="eager")


def in_sixteen_bits(pipe: Any) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.bfloat16)


def written(pipe: Any) -> None:
    with torch.no_grad():
        next(denoiser_of(pipe).parameters()).mul_(1.1)


Step = tuple[Callable[[Any], None], bool, int]

#: Of each step: what is done, whether the denoiser is then another than at the fit, and how many
#: states of it were told of so far.
CHANGES: dict[str, list[Step]] = {
    "lora": [(add, True, 1), (scale, True, 2), (to_nothing, False, 2), (scale, True, 2)],
    "two": [(add, True, 1), (mix, True, 2)],
    "off": [(add, True, 1), (disable, False, 1), (enable, True, 1)],
    "deleted": [(add, True, 1), (delete, False, 1), (add, True, 1)],
    "swapped": [(add, True, 1), (swap, True, 2)],
    "fused": [(add, True, 1), (fuse, True, 2), (unload, True, 2)],
    "fused-projections": [(fuse_projections, True, 1), (unfuse_projections, False, 1)],
    "freeu": [(freeu, True, 1), (without_freeu, False, 1), (freeu, True, 1)],
    "compiled": [(compiled, False, 0)],
    "sixteen-bits": [(in_sixteen_bits, True, 1)],
    "written": [(written, True, 1)],
}

#: One for each way in which weights are read.
FIRST = ("lora", "fused", "written")
#: Those that are tried with the other method, and of other families: each reads weights otherwise.
TELLING = ("lora", "fused", "fused-projections", "sixteen-bits")

SLOW = [pytest.mark.slow]
CASES = [
    pytest.param(
        name,
        change,
        method,
        marks=[] if (name, method) == (TEXT.name, "forward") and change in FIRST else SLOW,
        id=f"{name}-{change}-{method}",
    )
    for name, method, changes in (
        (TEXT.name, "forward", CHANGES),
        (TEXT.name, "gradient_norms", TELLING),
        ("sdxl", "forward", ("lora", "fused-projections")),
        ("flux", "gradient_norms", TELLING),
    )
    for change in changes
]


def arguments(case: Any, pipe: Any) -> dict[str, Any]:
    dtype = next(denoiser_of(pipe).parameters()).dtype
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in case.arguments().items()
    }


def call(pipe: Any, case: Any = TEXT, seed: int = 0) -> Any:
    return pipe(**seeded_call(arguments(case, pipe), seed))


def bits(output: Any) -> bytes:
    return np.asarray(torch.as_tensor(output[0]).float()).tobytes()


class Reference:
    """A pipeline whose own weights are made those of another, which tuners have changed."""

    #: What is done to both; all else is done to the weights by hand.
    SHARED = (in_sixteen_bits, freeu, without_freeu, written)

    def __init__(self, case: Any, method: Method) -> None:
        self._pipe = case()
        self._detector = known(self._pipe, case, method=method)

    def follow(self, pipe: Any, step: Callable[[Any], None]) -> None:
        if step in self.SHARED:
            step(self._pipe)
        parts = dict(denoiser_of(self._pipe).named_modules())
        for name, part in denoiser_of(pipe).named_modules():
            if name in parts and isinstance(getattr(part, "weight", None), Tensor):
                parts[name].weight.data = weight_of(part)

    def score(self, batch: Any) -> om.Scores:
        return self._detector.score(batch)


def weight_of(part: Any) -> Tensor:
    if not hasattr(part, "base_layer"):
        return part.weight.detach().clone()  # type: ignore[no-any-return]
    weight: Tensor = part.base_layer.weight.detach().clone()
    if not (part.merged or part.disable_adapters):
        for each in part.active_adapters:
            a, b = part.lora_A[each].weight, part.lora_B[each].weight
            product = (b.flatten(1) @ a.flatten(1)).view_as(weight)
            weight += part.scaling[each] * product.detach()
    return weight


def check_same(found: om.Scores, expected: om.Scores, tolerance: float) -> None:
    assert found.valid.all()
    assert found.layers.keys() == expected.layers.keys()
    for name, z in expected.z.items():
        torch.testing.assert_close(
            found.z[name], z, rtol=tolerance, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(found.score, expected.score, rtol=tolerance, atol=tolerance)


def told(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.text.count("Stale calibration")


@pytest.mark.parametrize(("name", "change", "method"), CASES)
def test_a_changed_denoiser_is_scored_as_what_it_is_and_told_of_once_a_state(
    name: str, change: str, method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    case = case_of(name)
    pipe, unwatched, reference = case(), case(), Reference(case, method)
    watched = monitor_pipeline(pipe, om.Monitor(known(pipe, case, method=method), fpr=0.05))
    batches = kept(watched.ood_monitor.monitor)
    call(watched, case)
    for step, is_stale, count in CHANGES[change]:
        step(watched)
        step(unwatched)
        outputs = [call(watched, case) for _ in range(2)]
        assert watched.ood_monitor.failures == {}
        assert bits(outputs[1]) == bits(call(unwatched, case)), step
        assert KnownWeights.of(denoiser_of(pipe)).flush(30)
        assert (watched.ood_monitor.stale, told(caplog)) == (is_stale, count), step
        reference.follow(pipe, step)
        tolerance = 0.1 if step is in_sixteen_bits else 2e-3
        check_same(outputs[1].ood, reference.score(batches[-1]), tolerance)


def kept(monitor: om.Monitor) -> list[Any]:
    """The batches that a monitor scores from now on."""
    batches, score = list[Any](), monitor.score

    def kept_score(batch: Any) -> om.Scores:
        batches.append(batch)
        return score(batch)

    monitor.score = kept_score  # type: ignore[method-assign]
    return batches


# Layers that are gone, and another denoiser.


def without_block(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].conv1 = nn.Identity()


def replaced(pipe: Any) -> None:
    pipe.unet = copy.deepcopy(pipe.unet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_block, "Take the change back, or fit the detector again"),
        (replaced, "in its place: detach, and watch the pipeline with a detector of that"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "gradient_norms"])
def test_what_cannot_be_scored_any_more_is_told_of_once_and_counted_as_one_kind(
    change: Callable[[Any], None], message: str, method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, unwatched = TEXT(), TEXT()
    watched = monitor_pipeline(pipe, om.Monitor(known(pipe, TEXT, method=method), fpr=0.05))
    change(watched)
    change(unwatched)
    for seed in range(3):
        assert bits(call(watched, seed=seed)) == bits(call(unwatched, seed=seed))
    [(kind, count)] = watched.ood_monitor.failures.items()
    assert count == 3
    assert message in kind
    assert caplog.text.count("was not scored") == 1


# A LoRA that was there at the fit.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forward", "gradient_norms"])
def test_a_detector_fitted_with_a_lora_scores_without_it(
    method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = TEXT()
    add(pipe)
    detector = fit_pipeline(
        pipe,
        [TEXT.images(44)],
        call=TEXT.call_of_one(),
        levels=(500,),
        method=method,
        explain=FEW,
        progress=False,
        watches="outputs",
    )
    assert not any("lora" in name or "base_layer" in name for name in detector.fitted.layers)
    assert not any("lora" in name for name in detector.fitted.parameters)
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05))
    with_lora = call(watched).ood
    assert not watched.ood_monitor.stale
    unload(pipe)
    without = call(watched).ood
    assert without.valid.all()
    assert any(not torch.equal(with_lora.z[k], without.z[k]) for k in without.z)
    assert (watched.ood_monitor.stale, told(caplog)) == (True, 1)
    assert watched.ood_monitor.failures == {}


# Weights are read off the request's path.


def written_back(module: nn.Module) -> None:
    """Write to a weight what it holds, so that only reading it tells that it is the same."""
    with torch.no_grad():
        weight = next(module.parameters())
        weight.copy_(weight.clone())


class Slowly:
    """The reading of weights waits within the block, as of a large model's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads, self._go = list[str](), threading.Event()
        read = states.digest_of_tensors

        def waiting(named: Any) -> str:
            self.threads.append(threading.current_thread().name)
            assert self._go.wait(30)
            return read(named)

        monkeypatch.setattr(states, "digest_of_tensors", waiting)

    def __enter__(self) -> "Slowly":
        return self

    def __exit__(self, *raised: object) -> None:
        self._go.set()


def watched_at_the_end(method: Method = "forward") -> Any:
    pipe = TEXT()
    detector = known(pipe, TEXT, method=method)
    return monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05, weights_every=1))


def test_a_call_does_not_wait_for_the_weights_to_be_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = watched_at_the_end()
    call(pipe)
    with torch.no_grad():  # elements that no look sees: all are read to know
        weight = pipe.unet.conv_in.weight
        weight.flatten()[1] += 1.0
    with Slowly(monkeypatch) as reading:
        for _ in range(3):
            assert call(pipe).ood.valid.all()
        assert reading.threads == ["ood-monitor-weights"]
        assert told(caplog) == 0
    assert KnownWeights.of(pipe.unet).flush(30)
    assert told(caplog) == 1
    assert pipe.ood_monitor.stale
    call(pipe)
    assert "stale_calibration" in kinds(pipe)
    assert told(caplog) == 1


def kinds(pipe: Any) -> set[str]:
    return {alert.kind for alert in pipe.ood_monitor.alerts}


def test_weights_that_are_written_back_are_no_change(caplog: pytest.LogCaptureFixture) -> None:
    pipe = watched_at_the_end()
    call(pipe)
    written_back(pipe.unet)
    call(pipe)
    assert KnownWeights.of(pipe.unet).flush(30)
    call(pipe)
    assert told(caplog) == 0
    assert not pipe.ood_monitor.stale
    assert "stale_calibration" not in kinds(pipe)


# Copies, and pickles.


def unpickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))  # noqa: S301  # our own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "copied"),
    [
        *((name, copy.deepcopy) for name in ("stable-diffusion", "flux", "controlnet")),
        ("stable-diffusion", unpickled),
    ],
)
def test_a_copy_with_its_own_denoiser_is_unwatched_and_may_be_watched(
    name: str, copied: Callable[[Any], Any]
) -> None:
    case = case_of(name)
    pipe, kind = case(), type(case())
    expected = bits(call(case(), case))
    watched = monitor_pipeline(pipe, om.Monitor(known(pipe, case), fpr=0.05), raise_on_error=True)
    call(watched, case)
    other = copied(watched)
    assert type(other) is kind
    assert bits(call(other, case)) == expected
    assert watched.ood_monitor.counts.scored == 2
    assert call(watched, case).ood.valid.all()
    monitor = om.Monitor(known(other, case), fpr=0.05)
    found = call(monitor_pipeline(other, monitor, raise_on_error=True), case).ood
    assert torch.equal(found.score, watched.ood_monitor.monitor.last.score)
    other.ood_monitor.detach()
    assert not denoiser_of(other)._forward_pre_hooks
    assert not denoiser_of(other)._forward_hooks


def test_a_watched_pipeline_is_not_wrapped() -> None:
    pipe = TEXT()
    monitor = om.Monitor(known(pipe, TEXT), fpr=0.05)
    monitor_pipeline(pipe, monitor)
    with pytest.raises(ValueError, match="its calls are scored already"), wrap(pipe, monitor):
        pass


# A long life, and many threads.

PIXELS = case_of("ddim")


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def of_pixels() -> Any:
    pipe = PIXELS()
    monitor = om.Monitor(known(pipe, PIXELS), fpr=0.05)
    return monitor_pipeline(pipe, monitor, raise_on_error=True)


def few_steps(pipe: Any, seed: int) -> Any:
    return pipe(**seeded_call(PIXELS.arguments() | {"num_inference_steps": 1}, seed))


@pytest.mark.slow
def test_a_hundred_calls_keep_no_tensor() -> None:
    pipe = of_pixels()
    for seed in range(20):
        few_steps(pipe, seed)
    pipe.ood_monitor.alerts.clear()
    before = tensors_alive()
    for seed in range(100):
        few_steps(pipe, seed)
    pipe.ood_monitor.alerts.clear()  # the latest thousand are kept
    assert tensors_alive() <= before
    assert pipe.ood_monitor.counts.scored == 240


@pytest.mark.slow
def test_eight_threads_give_the_images_and_scores_of_serial_calls() -> None:
    pipe, seeds = of_pixels(), range(40)
    serial = [few_steps(pipe, seed) for seed in seeds]
    kind, denoiser = type(PIXELS()), denoiser_of(pipe)

    def serve(seeds: Any) -> list[Any]:
        request = kind(denoiser, type(pipe.scheduler).from_config(pipe.scheduler.config))
        request.set_progress_bar_config(disable=True)
        return [
            pipe.ood_monitor.call(
                request, (), seeded_call(PIXELS.arguments() | {"num_inference_steps": 1}, seed)
            )
            for seed in seeds
        ]

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(serve, [seeds[i::8] for i in range(8)]))
    for i, outputs in enumerate(parts):
        for seed, output in zip(seeds[i::8], outputs, strict=True):
            assert bits(output) == bits(serial[seed])
            assert torch.equal(output.ood.score, serial[seed].ood.score)
            for name, z in serial[seed].ood.z.items():
                torch.testing.assert_close(output.ood.z[name], z)
    assert pipe.ood_monitor.counts.scored == 160
    assert pipe.ood_monitor.failures == {}


@pytest.mark.slow
def test_the_scale_of_an_image_prompt_is_a_state(caplog: pytest.LogCaptureFixture) -> None:
    case = next(each for each in FURTHER if each.name == "ip-adapter")
    pipe, unwatched = case(), case()
    detector = fit_pipeline(
        pipe,
        [case.images(44)],
        call=case.call_of_one(),
        levels=(500,),
        explain=FEW,
        progress=False,
        watches="outputs",
    )
    watched = monitor_pipeline(pipe, om.Monitor(detector, fpr=0.05))
    call(watched, case)
    assert not watched.ood_monitor.stale
    for each in (watched, unwatched):
        each.set_ip_adapter_scale(0.2)
    for _ in range(2):
        output = call(watched, case)
        assert output.ood.valid.all()
    assert bits(output) == bits(call(unwatched, case))
    assert (watched.ood_monitor.stale, told(caplog)) == (True, 1)
    watched.set_ip_adapter_scale(1.0)
    assert not watched.ood_monitor.stale
