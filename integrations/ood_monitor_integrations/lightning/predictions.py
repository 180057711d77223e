"""Scores in what `trainer.predict` returns and in what prediction writers write."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ood_monitor import Scores
from ood_monitor.adapters.base import batch_size
from ood_monitor_integrations.training.failures import Failures

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["Predictions"]

_STEP, _OUTPUT = "predict_step", "prediction"


class Predictions:
    """Puts the scores of each batch beside what `predict_step` makes of it, for one stage.

    The step's output is what the Trainer hands to its callbacks and returns, so that all of them
    see the same, in whatever order they are. Until :meth:`end` the module's step is wrapped.

    Args:
        prefix: Of the keys ``<prefix>/score`` and ``<prefix>/p_value``.
        failures: Told of failures; the step's output is then what it was.
    """

    def __init__(self, prefix: str, failures: Failures) -> None:
        self._keys = f"{prefix}/score", f"{prefix}/p_value"
        self._failures = failures
        self._module: LightningModule | None = None
        self._step: _Step | None = None
        self._scores: Scores | None = None

    @property
    def is_on(self) -> bool:
        """Whether a step is wrapped, which is to be told of scores."""
        return self._step is not None

    def begin(self, pl_module: "LightningModule") -> None:
        """Wrap the module's step.

        Raises:
            ValueError: It takes no batch but an iterator, of which nothing is known before.
        """
        self.end()
        step = getattr(pl_module, _STEP)
        if "dataloader_iter" in inspect.signature(step).parameters:
            raise ValueError(
                "Expected a `predict_step` that takes a batch, got one that takes `dataloader_iter`"
                ": leave `with_scores=` out, `scores_dir=` writes the scores to a file."
            )
        self._module, self._scores = pl_module, None
        self._step = _Step(step, vars(pl_module).get(_STEP), self._with_scores)
        setattr(pl_module, _STEP, self._step)

    def scored(self, scores: Scores | None) -> None:
        """Take the scores of the batch that the next step gets; None if it was not scored."""
        self._scores = scores

    def end(self) -> None:
        """Give the module its own step back; a second call does nothing."""
        step, module = self._step, self._module
        self._step = self._module = self._scores = None
        if step is not None and module is not None:
            step.add = None
            _unwrap(module)

    def _with_scores(self, output: Any, batch: Any) -> Any:
        """A new mapping, of the step's output and the scores."""
        scores, self._scores = self._scores, None
        found = output
        with self._failures.contained("could not put scores beside a prediction"):
            items = dict(output) if isinstance(output, Mapping) else {_OUTPUT: output}
            found = items | dict(zip(self._keys, _values(scores, batch), strict=True))
        return found


class _Step:
    """A step, and what is made of its output.

    Attributes:
        add: Makes the new output of the old one and the batch; None for nothing any more.
        before: What the module itself had in the step's place; None for its class's method.
    """

    def __init__(
        self, step: Callable[..., Any], before: Any, add: Callable[[Any, Any], Any] | None
    ) -> None:
        self._step, self.before, self.add = step, before, add
        # Lightning asks what arguments a step takes, and looks through one wrapper only.
        self.__wrapped__ = getattr(step, "__wrapped__", step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._step(*args, **kwargs)
        batch = next(iter([*args, *kwargs.values()]), None)
        return output if self.add is None else self.add(output, batch)


def _unwrap(module: "LightningModule") -> None:
    """Take off wrappers that have ended, which another monitor's may have hidden till now."""
    own = vars(module)
    while isinstance(step := own.get(_STEP), _Step) and step.add is None:
        if step.before is None:
            delattr(module, _STEP)
        else:
            setattr(module, _STEP, step.before)


def _values(scores: Scores | None, batch: Any) -> tuple[Tensor, Tensor]:
    """Scores and p-values (B,) of the user's own; of shape () where B is not known either."""
    with torch.inference_mode(False):
        if scores is not None:
            return scores.score.clone(), scores.p_value.clone()
        try:
            shape: tuple[int, ...] = (batch_size(batch),)
        except ValueError:
            shape = ()
        nothing = torch.full(shape, torch.nan, dtype=torch.float64)
        return nothing, nothing.clone()
