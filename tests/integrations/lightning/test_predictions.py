"""Scores in what `trainer.predict` returns, and in what every prediction writer sees."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from ood_monitor_integrations.lightning.predictions import Predictions
from ood_monitor_integrations.training.failures import Failures
from pytorch_lightning.callbacks import BasePredictionWriter
from support import prediction_processes
from support.lightning_cases import QUIET, Flow, images, loader, trainer, watcher
from support.two_processes import reports
from torch import Tensor

import ood_monitor as om

pytestmark = QUIET

SCORES = ("ood/score", "ood/p_value")


@pytest.fixture(scope="module")
def detector() -> om.Detector:
    held_out = [images(128, seed=1)]
    return om.Detector(om.LogLikelihood(Flow())).fit(held_out, progress=False)


def watching(detector: om.Detector, **options: Any) -> OODMonitor:
    settings = {"watch": ["predict"], "with_scores": True, "console": False}
    return watcher(detector=detector, calibrate="never", **(settings | options))


def module_of(detector: om.Detector) -> Flow:
    return detector.adapter.module  # type: ignore[return-value]


class Writer(BasePredictionWriter):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: Sequence[Any] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *at: Any) -> None:
        self.batches.append(prediction)

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, at: Any) -> None:
        self.epoch = list(predictions)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_writers_and_the_trainer_see_the_same_in_any_order(
    order: int, inference_mode: bool, detector: om.Detector
) -> None:
    callback, writer = watching(detector), Writer()
    run = trainer(*[callback, writer][::order], inference_mode=inference_mode)
    found = run.predict(module_of(detector), loader(images(80, seed=2)))
    assert found is not None
    expected = callback.scores("predict")
    for seen in (found, writer.batches, writer.epoch):
        assert [len(batch["ood/score"]) for batch in seen] == [32, 32, 16]
        for key, values in zip(SCORES, (expected.score, expected.p_value), strict=True):
            assert torch.equal(torch.cat([batch[key] for batch in seen]), values)
    plain = trainer(inference_mode=inference_mode).predict(
        module_of(detector), loader(images(80, seed=2))
    )
    assert plain is not None
    for with_scores, output in zip(found, plain, strict=True):
        assert with_scores.keys() == {"prediction", *SCORES}
        assert torch.equal(with_scores["prediction"], output)
    found[0]["ood/score"].zero_()  # the user's own, and no inference tensor
    assert callback.scores("predict").score.all()


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], set[str]]] = {
    "tensor": (lambda x: x, {"prediction"}),
    "none": (lambda x: None, {"prediction"}),
    "text": (lambda x: "text", {"prediction"}),
    "dict": (lambda x: {"x": x, 3: "y"}, {"x", 3}),  # type: ignore[dict-item]
    "mapping": (lambda x: MappingProxyType({"x": x}), {"x"}),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.filterwarnings("ignore:predict returned None:UserWarning")
def test_outputs_of_any_kind_get_the_scores_and_are_not_altered(
    kind: str, detector: om.Detector
) -> None:
    make, keys = OUTPUTS[kind]
    made: list[Any] = []

    class Module(Flow):
        def predict_step(self, x: Tensor) -> Any:  # type: ignore[override]
            made.append(make(x))
            return made[-1]

    (found,) = trainer(watching(detector)).predict(Module(), loader(images(8, seed=2)))  # type: ignore[misc]
    assert found.keys() == keys | {*SCORES}
    if isinstance(made[0], Mapping):
        assert made[0].keys() == keys
        assert found["x"] is made[0]["x"]
    else:
        assert found["prediction"] is made[0]


def test_a_batch_that_was_not_scored_has_nan(detector: om.Detector) -> None:
    callback = watching(detector, every_n_batches=2)
    found = trainer(callback).predict(module_of(detector), loader(images(80, seed=2)))
    assert found is not None
    assert [batch["ood/score"].isnan().tolist() for batch in found] == [
        [False] * 32,
        [True] * 32,
        [False] * 16,
    ]
    for key in SCORES:
        assert {batch[key].dtype for batch in found} == {torch.float64}


def test_without_a_detector_all_is_nan() -> None:
    callback = watcher(watch=["predict"], with_scores=True)
    with pytest.warns(UserWarning, match="will not watch"):
        (found,) = trainer(callback).predict(Flow(), loader(images(8)))  # type: ignore[misc]
    assert found["ood/p_value"].shape == (8,)
    assert found["ood/p_value"].isnan().all()


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        (torch.zeros(5, 2), (5,)),
        ({"a": torch.zeros(3), "b": [torch.zeros(3, 1)]}, (3,)),
        ((torch.zeros(3), torch.zeros(())), ()),
        (["no", "tensor"], ()),
    ],
)
def test_nan_is_of_as_many_samples_as_the_batch_shows(batch: Any, shape: tuple[int, ...]) -> None:
    class Module(Flow):
        def predict_step(self, batch: Any) -> Any:  # type: ignore[override]
            return 1

    module, predictions = Module(), Predictions("ood", Failures("x"))
    predictions.begin(module)
    for output in (module.predict_step(batch), module.predict_step(batch=batch)):  # type: ignore[call-arg]
        assert output["ood/score"].shape == output["ood/p_value"].shape == shape
        assert output["ood/score"].isnan().all()


def test_scores_are_of_one_step_alone(detector: om.Detector) -> None:
    module, predictions = Flow(), Predictions("ood", Failures("x"))
    x = images(4, seed=2)
    predictions.begin(module)
    predictions.scored(detector.score(x))
    assert not module.predict_step(x, 0)["ood/score"].isnan().any()  # type: ignore[call-overload]
    assert module.predict_step(x, 1)["ood/score"].isnan().all()  # type: ignore[call-overload]


@pytest.mark.parametrize("own", [False, True])
def test_the_module_has_its_own_step_again(own: bool, detector: om.Detector) -> None:
    module = copy.deepcopy(module_of(detector))
    if own:
        module.predict_step = functools.partial(Flow.predict_step, module)  # type: ignore[method-assign]
    before, callback = dict(vars(module)), watching(detector)
    run = trainer(callback)
    run.predict(module, loader(images(8)))
    assert vars(module).get("predict_step") is before.get("predict_step")
    assert isinstance(run.predict(module, loader(images(8)))[0], dict)  # type: ignore[index]
    assert isinstance(trainer().predict(module, loader(images(8)))[0], Tensor)  # type: ignore[index]


class Interrupted(pl.Callback):
    def on_predict_batch_end(self, *args: Any) -> None:
        raise KeyError("a user's own mistake")


class Failing(Flow):
    def predict_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> Tensor:
        raise KeyError("a user's own mistake")


@pytest.mark.parametrize(
    ("module", "callbacks"), [(Failing(), []), (Flow(), [Interrupted()])], ids=["step", "callback"]
)
def test_the_module_has_its_own_step_after_an_exception(
    module: Flow, callbacks: list[pl.Callback], detector: om.Detector
) -> None:
    with pytest.raises(KeyError, match="a user's own mistake"):
        trainer(watching(detector), *callbacks).predict(module, loader(images(8)))
    assert "predict_step" not in vars(module)


def test_two_monitors_put_their_scores_side_by_side(detector: om.Detector) -> None:
    one, two = watching(detector, name="one"), watching(detector, name="two", every_n_batches=2)
    module = module_of(detector)
    found = trainer(one, two).predict(module, loader(images(64, seed=2)))
    assert found is not None
    keys = {f"ood/{name}/{figure}" for name in ("one", "two") for figure in ("score", "p_value")}
    assert found[0].keys() == {"prediction", *keys}
    assert torch.equal(found[0]["ood/one/score"], found[0]["ood/two/score"])
    assert found[1]["ood/two/score"].isnan().all()
    assert "predict_step" not in vars(module)


@pytest.mark.parametrize("order", [1, -1])
def test_wrappers_come_off_in_any_order(order: int) -> None:
    module, both = Flow(), [Predictions(f"ood/{name}", Failures("x")) for name in "ab"]
    for predictions in both:
        predictions.begin(module)
    first, second = both[::order]
    first.end()
    (key,) = {"ood/a/score", "ood/b/score"} & module.predict_step(images(2), 0).keys()  # type: ignore[attr-defined]
    assert key == ("ood/b/score" if order == 1 else "ood/a/score")
    second.end()
    second.end()
    assert "predict_step" not in vars(module)


def test_a_step_that_takes_no_index_is_given_none(detector: om.Detector) -> None:
    """Lightning asks for the step's own arguments, through wrappers and decorators."""

    class Module(Flow):
        @torch.inference_mode()
        def predict_step(self, x: Tensor) -> int:  # type: ignore[override]
            return len(x)

    callbacks = [watching(detector, name="one"), watching(detector, name="two")]
    (found,) = trainer(*callbacks).predict(Module(), loader(images(8)))  # type: ignore[misc]
    assert found["prediction"] == 8


@pytest.mark.filterwarnings("ignore:(You are using the|Found) `dataloader_iter`")
def test_a_step_that_takes_an_iterator_is_left_alone(detector: om.Detector) -> None:
    class Module(Flow):
        def predict_step(self, dataloader_iter: Any) -> int:  # type: ignore[override]
            return len(next(dataloader_iter)[0])

    with pytest.warns(UserWarning, match=r"could not put scores .*takes `dataloader_iter`"):
        found = trainer(watching(detector)).predict(Module(), loader(images(8)))
    assert found == [8]


def test_scores_need_a_prediction_that_is_watched() -> None:
    with pytest.raises(ValueError, match=r"Expected 'predict' in watch for with_scores, got \['te"):
        OODMonitor(watch=["test"], with_scores=True)


@pytest.mark.slow
def test_each_process_returns_its_own_scores(tmp_path: Path) -> None:
    program = Path(prediction_processes.__file__)
    for rank in reports(program, tmp_path):
        assert rank == {"is equal": True, "samples": 20, "is restored": True}
