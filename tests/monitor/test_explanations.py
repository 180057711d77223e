"""After a drift alert, which layers are not as usual: by gradient norms of a few of its samples."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fitted_cases import adapter_of, batch_of
from torch import Tensor

import ood_monitor as om
from ood_monitor.adapters.base import map_tensors
from ood_monitor.alerts import Alert, Summary
from ood_monitor.detector.explaining import Explanation

FLOW = om.models.Glow(channels=1, size=8, levels=2, steps=1, hidden=8)
LONG = 30.0


def images(n: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def fitted(**options: Any) -> om.Detector:
    detector = om.Detector(om.LogLikelihood(FLOW), **options)
    return detector.fit(images(500, 0).split(50), progress=False)


DETECTOR = fitted()


class Recorder:
    """Alerts and figures, in the order in which they came."""

    name = "recorder"

    def __init__(self) -> None:
        self.said: list[Alert | Summary] = []

    def __call__(self, alert: Alert, /) -> None:
        self.said.append(alert)

    def summarise(self, summary: Summary, /) -> None:
        self.said.append(summary)

    def alerts(self, *kinds: str) -> list[Alert]:
        return [it for it in self.said if isinstance(it, Alert) and it.kind in kinds]


def watched(detector: om.Detector = DETECTOR, **options: Any) -> tuple[om.Monitor, Recorder]:
    sink = Recorder()
    return om.Monitor(detector, sinks=[sink], **{"ert": 1000, **options}), sink


def drift(watch: om.Monitor) -> Alert:
    """Of the stream's samples from the 101st on."""
    watch.update(images(100, 1))
    [alert] = [it for it in watch.update(images(60, 2, 0.85)) if it.kind == "drift"]
    return alert


def test_the_alert_goes_first_and_its_explanation_with_the_next_call() -> None:
    watch, sink = watched()
    alert = drift(watch)
    assert watch.dispatcher.flush(LONG)
    assert sink.alerts("explanation") == []
    watch.update(images(1, 3))
    assert watch.dispatcher.flush(LONG)
    [found] = sink.alerts("explanation")
    assert (found.explains, found.severity, found.status) == (alert.id, "info", "ALERT")
    assert found.evidence == alert.evidence
    assert found.number > alert.number
    count = len(found.samples)
    assert f"gradient norms by layer of the {count} most anomalous samples since" in found.message
    watch.close()


def test_it_is_what_the_detector_says_of_these_samples() -> None:
    watch, sink = watched()
    alert = drift(watch)
    watch.close()
    [found] = sink.alerts("explanation")
    stream = torch.cat([images(100, 1), images(60, 2, 0.85)])
    positions = [sample.position for sample in found.samples]
    assert 2 <= len(positions) <= 8
    assert positions == sorted(positions)
    assert alert.evidence.since is not None
    assert min(positions) >= alert.evidence.since
    why = DETECTOR.explain(stream[[at - 1 for at in positions]], layers=True)
    z = {layer: values.mean().item() for layer, values in why.z.items()}
    furthest = max(z, key=lambda layer: abs(z[layer]))
    assert found.top_layers[0].layer == furthest
    assert found.top_layers[0].z == pytest.approx(z[furthest], rel=1e-3)
    assert found.top_layers[0].share == pytest.approx(why.shares[furthest].mean().item(), rel=1e-3)
    p_values = DETECTOR.score(stream).p_value
    for sample in found.samples:
        assert sample.p_value == p_values[sample.position - 1]


@pytest.mark.parametrize(
    ("options", "count"),
    [({"explain_keep": 3}, 3), ({"explain_budget": 1e-9}, 1)],
    ids=["few are kept", "the time is up"],
)
def test_it_says_of_how_many(options: dict[str, Any], count: int) -> None:
    watch, sink = watched(**options)
    drift(watch)
    watch.close()
    [found] = sink.alerts("explanation")
    assert len(found.samples) == count
    assert f"of the {count} most" in found.message or "of 1 sample" in found.message


@pytest.mark.parametrize("how", ["explain_budget", "gradient norms"])
def test_there_is_none_where_nobody_asks(how: str) -> None:
    """Of gradient norms, the alert itself names the layers."""
    detector = fitted(method="gradient_norms") if how == "gradient norms" else DETECTOR
    watch, sink = watched(detector, **({} if how == "gradient norms" else {how: 0}))
    assert drift(watch).top_layers
    watch.close()
    assert sink.alerts("explanation") == []


def test_scores_without_their_samples_explain_nothing() -> None:
    watch, sink = watched()
    watch.observe(watch.score(images(60, 2, 0.5)))
    watch.close()
    assert [it.kind for it in sink.alerts("drift", "explanation")] == ["drift"]


def raising(error: BaseException) -> Any:
    def explain(self: om.Detector, *args: Any, **options: Any) -> Explanation:
        raise error

    return explain


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("no room"), "none, because OutOfMemoryError: no room"),
        (RuntimeError("no\ngradient"), "none, because RuntimeError: no gradient"),
    ],
    ids=["memory", "gradient"],
)
def test_what_fails_is_said_and_disturbs_nobody(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, sink = watched()
    drift(watch)
    monkeypatch.setattr(om.Detector, "explain", raising(error))
    watch.update(images(10, 3))
    assert watch.samples_seen == 170
    watch.close()
    [found] = sink.alerts("explanation")
    assert why in found.message
    assert found.top_layers == ()


def test_an_interrupt_is_said_and_raised_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, sink = watched()
    drift(watch)
    with monkeypatch.context() as patch:
        patch.setattr(om.Detector, "explain", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            watch.update(images(1, 3))
    watch.close()
    [found] = sink.alerts("explanation")
    assert "none, because it was interrupted" in found.message


def test_a_detector_without_norms_says_so() -> None:
    watch, sink = watched(fitted(explain=0))
    drift(watch)
    watch.close()
    [found] = sink.alerts("explanation")
    assert "none, because ValueError: Expected a detector that was fitted with" in found.message


def test_a_muted_monitor_explains_when_it_may_speak() -> None:
    watch, sink = watched()
    drift(watch)
    watch.mute(samples=5)
    watch.update(images(4, 3))
    assert watch.dispatcher.flush(LONG)
    assert sink.alerts("explanation") == []
    watch.update(images(1, 4))
    watch.close()
    assert len(sink.alerts("explanation")) == 1


def test_a_child_leaves_the_explanation_to_its_parent() -> None:
    watch, sink = watched()
    drift(watch)

    def work() -> None:
        watch.update(images(1, 3))
        watch.close()
        assert sink.alerts("explanation") == []

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
    watch.close()
    assert len(sink.alerts("explanation")) == 1


def test_what_is_kept_is_few_and_never_saved() -> None:
    watch, _ = watched()
    for seed in range(5):
        watch.update(images(40, seed))
    kept = watch._explanations._kept
    assert len(kept) == 8
    assert all(each.batch.untyped_storage().nbytes() == 64 * 4 for each in kept)
    watch.close()


@pytest.mark.parametrize("name", ["vae", "gpt2"])
def test_the_model_and_the_random_state_are_left_as_they_are(name: str) -> None:
    adapter = adapter_of(name)
    held_out = batch_of(name, 120, seed=1)
    detector = om.Detector(adapter, method="forward").fit([held_out], progress=False)
    watch, sink = watched(detector, fpr=0.5)
    watch.update(batch_of(name, 40, seed=2))
    [*_, alert] = watch.update(map_tensors(torch.ones_like, batch_of(name, 40, seed=3)))
    weights = {k: v.clone() for k, v in adapter.module.state_dict().items()}
    state = torch.get_rng_state()
    assert alert.severity == "critical"
    watch.close()
    assert sink.alerts("explanation")[-1].top_layers
    assert torch.equal(state, torch.get_rng_state())
    for key, value in adapter.module.state_dict().items():
        assert torch.equal(value, weights[key])
    assert all(weight.grad is None for weight in adapter.module.parameters())


# Numbers


def numbers(sink: Recorder) -> list[int]:
    return sorted(it.number for it in sink.said)


def test_all_that_is_said_is_numbered_in_the_order_of_the_stream() -> None:
    watch, sink = watched(summary_every=10)
    drift(watch)
    watch.close()
    assert len({it.number for it in sink.said}) == len(sink.said) > 10
    in_order = sorted(sink.said, key=lambda it: it.number)
    seen = [it.samples_seen for it in in_order if not isinstance(it, Alert) or it.kind == "drift"]
    assert seen == sorted(seen)


def test_numbers_grow_over_restarts_whatever_the_clock_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, sink = watched()
    drift(watch)
    state = watch.state_dict()
    watch.close()
    before = numbers(sink)
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)  # in 2001
    again, later = watched()
    again.load_state_dict(state)
    again.accept("as before")
    again.close()
    assert numbers(later)[0] > before[-2]  # the last is the explanation, said after the state


def test_without_a_state_they_begin_above_those_of_before() -> None:
    watch, sink = watched()
    drift(watch)
    watch.close()
    again, later = watched()
    again.accept("anew")
    again.close()
    assert numbers(later)[0] > numbers(sink)[-1]


def test_a_change_of_the_status_comes_with_its_figures() -> None:
    watch, sink = watched(summary_every=10_000)
    alert = drift(watch)
    watch.accept("as it is")
    watch.close()
    found = [it for it in sink.said if isinstance(it, Summary)]
    assert [it.status for it in found][-2:] == ["ALERT", "OK"]
    assert found[-2].samples_seen == alert.samples_seen


def test_a_spool_remembers_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, sink = watched(spool=tmp_path)
    drift(watch)
    watch.close()
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)  # in 2001
    again, later = watched(spool=tmp_path)
    again.accept("anew")
    again.close()
    assert numbers(later)[0] > max(alert.number for alert in sink.alerts("drift", "explanation"))


# Which samples


def test_a_drift_within_a_batch_is_explained_by_samples_up_to_it() -> None:
    watch, sink = watched()
    stream = torch.cat([images(50, 1), images(40, 2, 0.5), images(400, 3)])
    [alert] = [it for it in watch.update(stream) if it.kind == "drift"]
    watch.close()
    [found] = sink.alerts("explanation")
    positions = [sample.position for sample in found.samples]
    assert alert.evidence.since is not None
    expected = range(alert.evidence.since, alert.samples_seen + 1)
    assert set(positions) <= set(expected)
    assert len(positions) == min(8, len(expected))


def test_flags_are_explained_by_the_samples_that_the_alert_names() -> None:
    watch, sink = watched(fpr=0.02, cooldown=0, ert=1e9)
    for i, x in enumerate(images(12, 2, 0.3).split(1)):
        watch.update(torch.cat([images(4, 10 + i), x]))
    watch.close()
    explained = {it.explains: it for it in sink.alerts("explanation")}
    flags = [it for it in sink.alerts("sample") if it.id in explained]
    assert flags
    for alert in flags:
        named = {sample.position for sample in alert.samples}
        assert {sample.position for sample in explained[alert.id].samples} <= named


@pytest.mark.parametrize("how", ["another state", "accepted"])
def test_what_came_before_explains_nothing_of_another_stream(how: str) -> None:
    watch, sink = watched()
    state = watch.state_dict()
    for seed in range(4):
        watch.update(images(50, seed))
    if how == "accepted":
        watch.accept("as it is")
    else:
        watch.load_state_dict(state)
    before = watch.samples_seen
    watch.update(images(60, 9, 0.5))
    watch.close()
    found = sink.alerts("explanation")[-1]
    assert found.samples
    assert all(before < sample.position <= found.samples_seen for sample in found.samples)


# Names


@pytest.mark.parametrize("kind", ["keys", "generator", "array"])
def test_ids_of_any_kind_that_has_an_order_are_taken(kind: str) -> None:
    names = [f"name-{i}" for i in range(60)]
    ids: dict[str, Any] = {
        "keys": dict.fromkeys(names).keys(),
        "generator": iter(names),
        "array": np.array(names),
    }
    watch, sink = watched()
    watch.update(images(60, 2, 0.5), ids=ids[kind])
    watch.close()
    [found] = sink.alerts("explanation")
    assert all(sample.id == f"name-{sample.position - 1}" for sample in found.samples)


def test_ids_without_an_order_are_refused_before_anything_is_taken_in() -> None:
    watch, _ = watched()
    with pytest.raises(TypeError, match="ids in the order of the samples, got a set"):
        watch.update(images(2, 2), ids={"a", "b"})
    assert watch.samples_seen == 0
    watch.close()
