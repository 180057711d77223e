"""Where the callback finds the model, and which options say so."""

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.training.adapters import WatchedModel
from pytorch_lightning.demos.boring_classes import BoringModel
from support.lightning_cases import QUIET, Flow, images
from torch import Tensor, nn

import ood_monitor as om

pytestmark = QUIET

X, Y = images(4), torch.arange(4)


class Labelled(Flow):
    """With a label that may be given."""

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        value = self.flow.log_prob(x)
        return value if y is None else value + y


class Terms(Flow):
    def log_prob_terms(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
        return {"log_likelihood": self.flow.log_prob(x) + y}


class Factory(Flow):
    """A LightningModule that makes its own adapter."""

    made: Any = None

    def adapter(self) -> Any:
        return self.made(self) if self.made else om.LogLikelihood(self.flow)


def function(module: Any, x: Tensor) -> Tensor:
    return module.flow.log_prob(x) + 1  # type: ignore[no-any-return]


def conditional(module: Any, x: Tensor, label: Tensor | None = None) -> Tensor:
    return module.flow.log_prob(x)  # type: ignore[no-any-return]


def first(batch: Any) -> Tensor:
    return batch[0]  # type: ignore[no-any-return]


def label(batch: Any) -> dict[str, Tensor]:
    return {"y": batch[1]}


def values(adapter: om.Adapter, batch: Any) -> Tensor:
    (value,) = dict(adapter.log_likelihood(batch)).values()
    return value.total() if isinstance(value, om.Elements) else value


def test_the_modules_own_likelihood_is_taken() -> None:
    module = Flow()
    adapter = WatchedModel().adapter_for(module)
    assert adapter.module is module
    assert torch.equal(values(adapter, X), module.log_prob(X))


def test_a_function_and_its_inputs_and_condition_are_taken() -> None:
    module = Labelled()
    plain, given = module.flow.log_prob(X), WatchedModel(function)
    assert torch.equal(values(given.adapter_for(module), (X, Y)), plain + 1)
    swapped = WatchedModel(inputs=lambda batch: batch[1], condition=lambda b: {"y": b[0]})
    assert torch.equal(values(swapped.adapter_for(module), (Y, X)), plain + Y)


def test_an_adapter_is_taken_as_it_is() -> None:
    adapter = om.LogLikelihood(Flow())
    assert WatchedModel(adapter).adapter_for(Flow()) is adapter
    assert WatchedModel(detector=om.Detector(adapter)).adapter_for(Flow()) is adapter


def test_the_module_makes_its_own_adapter() -> None:
    module = Factory()
    assert WatchedModel().adapter_for(module).module is module.flow
    module.adapter = lambda: om.LogLikelihood(module)  # type: ignore[method-assign]
    assert WatchedModel().adapter_for(module).module is module
    assert WatchedModel(function).adapter_for(module).module is module


class Callable_(om.Adapter):
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> "Callable_":
        raise AssertionError

    def log_likelihood(self, batch: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    "part",
    [nn.Linear(4, 4), nn.Identity(), "name", {"a": 1}, Callable_(nn.Linear(1, 1))],
    ids=lambda part: type(part).__name__,
)
def test_what_is_called_adapter_and_is_no_function_makes_none(part: Any) -> None:
    module = Flow()
    module.adapter = part
    assert WatchedModel().adapter_for(module).module is module


def test_a_property_called_adapter_makes_none() -> None:
    class Other(Flow):
        @property
        def adapter(self) -> Any:
            raise RuntimeError("not yet")

    assert isinstance(WatchedModel().adapter_for(Other()), om.LogLikelihood)


def broken(module: nn.Module) -> Any:
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda module: module.flow, r"`ood_monitor.Adapter`, got Glow\."),
        (lambda module: None, "got NoneType"),
        (lambda module: om.LogLikelihood, "got the class LogLikelihood"),
        (broken, "got KeyError: 'weights'"),
        (lambda module: om.ELBO(module), r"got ValueError: Expected Factory to have \['encode'"),
        (lambda module: module.absent, "got AttributeError: 'Factory' object has no .* 'absent'"),
    ],
)
def test_an_adapter_method_that_makes_none_is_refused_with_the_cause(made: Any, told: str) -> None:
    module = Factory()
    module.made = made
    with pytest.raises(
        ValueError, match=rf"Expected Factory.adapter\(\) to give an adapter.*{told}"
    ):
        WatchedModel().adapter_for(module)


def test_an_adapter_method_with_parameters_of_its_own_is_refused() -> None:
    class Tuned(Flow):
        def adapter(self, name: str) -> None:
            pass

    with pytest.raises(ValueError, match=r"Tuned.adapter\(\) .* got TypeError: .*'name'"):
        WatchedModel().adapter_for(Tuned())


def test_a_module_without_likelihood_is_refused_in_words_of_both() -> None:
    with pytest.raises(ValueError, match="got BoringModel; give a function, `lambda module, x"):
        WatchedModel().adapter_for(BoringModel())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"adapter": "val"}, "Expected adapter as a function, got 'val'"),
        ({"adapter": om.LogLikelihood}, r"got the class LogLikelihood: make one, `LogLikelihood\("),
        ({"adapter": Flow}, "got the class Flow"),
        ({"adapter": nn.Linear(1, 1)}, "got the module Linear: give an adapter of it"),
        ({"adapter": X}, "Expected adapter as a function, got tensor"),
        ({"inputs": "x"}, "Expected inputs as a function, got 'x'"),
        ({"inputs": 0}, "Expected inputs as a function, got 0"),
        ({"condition": {"y": 1}}, "Expected condition as a function, got {'y': 1}"),
        ({"batch": [X]}, "Expected batch as a function"),
    ],
)
def test_options_that_are_none_are_refused_by_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        WatchedModel(**options)


@pytest.mark.parametrize("name", ["inputs", "condition"])
def test_options_beside_what_has_its_own_are_refused(name: str) -> None:
    adapter, options = om.LogLikelihood(Flow()), {name: first}
    with pytest.raises(ValueError, match=f"Expected `{name}=` or LogLikelihood, got both"):
        WatchedModel(adapter, **options)
    with pytest.raises(ValueError, match=f"Expected `{name}=` or a detector, got both"):
        WatchedModel(detector=om.Detector(adapter), **options)
    with pytest.raises(ValueError, match=rf"Expected `{name}=` or Factory.adapter\(\), got both"):
        WatchedModel(**options).adapter_for(Factory())


def test_an_adapter_beside_a_detector_is_refused() -> None:
    adapter = om.LogLikelihood(Flow())
    with pytest.raises(ValueError, match="Expected `adapter=` and `inputs=` or a detector"):
        WatchedModel(function, inputs=first, detector=om.Detector(adapter))


def test_batches_are_made_before_all_else() -> None:
    model = WatchedModel(batch=lambda given: given.x)
    assert model.prepared(type("Batch", (), {"x": X})()) is X
    assert WatchedModel().prepared(X) is X
    assert WatchedModel(om.LogLikelihood(Flow()), batch=first).prepared((X, Y)) is X


# Labels


SILENT: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "images alone": (Flow, {}, X),
    "labels that no model takes": (Flow, {}, [X, Y]),
    "images alone for a model that takes labels": (Labelled, {}, X),
    "in a list": (Labelled, {}, [X]),
    "x alone is meant": (Labelled, {"inputs": first}, [X, Y]),
    "a condition": (Labelled, {"condition": label}, (X, Y)),
    "names": (Labelled, {}, [X, "name"]),
    "a function of x": (Labelled, {"adapter": function}, [X, Y]),
    "a partial function": (Flow, {"adapter": partial(conditional, label=None)}, [X, Y]),
    "an adapter of its own": (Factory, {}, [X, Y]),
    "an adapter": (Labelled, {"adapter": om.LogLikelihood(Labelled())}, [X, Y]),
    "a mapping, of which inputs= is needed": (Labelled, {}, {"x": X, "y": Y}),
}


@pytest.mark.parametrize(("kind", "options", "batch"), SILENT.values(), ids=SILENT)
def test_batches_of_which_no_label_is_dropped_in_silence(
    kind: type[pl.LightningModule], options: dict[str, Any], batch: Any
) -> None:
    WatchedModel(**options).check_batch(kind(), batch)


class Keywords(Flow):
    def log_prob(self, x: Tensor, **condition: Tensor) -> Tensor:
        return self.flow.log_prob(x)


DROPPED: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "an optional label": (Labelled, {}, [X, Y], r"Labelled.log_prob takes y .*{'y': batch\[1\]}"),
    "a keyword of terms": (Terms, {}, (X, Y), "Terms.log_prob_terms takes y"),
    "of three": (Labelled, {}, (X, Y, Y), "batches have 3 tensors"),
    "in a tuple": (Labelled, {}, (X, {"y": Y}), "batches have 2 tensors"),
    "any keywords": (Keywords, {}, [X, Y], r"takes \*\*condition .*{'y': batch\[1\]}"),
    "of a function": (Flow, {"adapter": conditional}, [X, Y], "conditional takes label .*'label'"),
}


@pytest.mark.parametrize(("kind", "options", "batch", "told"), DROPPED.values(), ids=DROPPED)
def test_labels_that_would_be_dropped_in_silence_are_refused(
    kind: type[pl.LightningModule], options: dict[str, Any], batch: Any, told: str
) -> None:
    with pytest.raises(ValueError, match=rf"Expected `inputs=` or `condition=` .*{told}"):
        WatchedModel(**options).check_batch(kind(), batch)


# YAML


def test_it_is_made_from_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(WatchedModel, "model", skip={"detector"})
    text = "\n".join(
        ["adapter: function", "inputs: first", "condition: label", "batch: first"]
    ).replace(": ", f": {__name__}.")
    config = parser.parse_string("model:\n  " + text.replace("\n", "\n  "))
    model = parser.instantiate_classes(config).model
    module = Labelled()
    assert model.prepared((X, Y)) is X
    assert isinstance(model.adapter_for(module), om.LogLikelihood)
    assert f"adapter: {__name__}.function" in parser.dump(config)
