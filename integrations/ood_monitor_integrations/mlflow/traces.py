"""Scores as MLflow traces: a guardrail's span and its feedback for every scored call.

::

    alerts = traced_update(monitor, batch)  # instead of monitor.update(batch)

    output = pipe(...)  # of a watched diffusers pipeline
    trace_scores(output.ood, fpr=monitor.fpr)

``mlflow.search_traces(filter_string="feedback.is_ood = 'true'")`` then finds the calls.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import mlflow
from mlflow.entities import AssessmentSource, SpanType

from ood_monitor import Alert, Monitor, Scores
from ood_monitor.adapters.base import Batch
from ood_monitor.checks import number

__all__ = ["trace_scores", "traced_update"]

_NAME = "ood_monitor"
_SOURCE = AssessmentSource("CODE", _NAME)

#: P-values that a span shows, the smallest first.
_SHOWN = 100

_log = logging.getLogger(__name__)
_failures = count()


def traced_update(monitor: Monitor, batch: Batch, ids: Sequence[Any] | None = None) -> list[Alert]:
    """:meth:`Monitor.update <ood_monitor.Monitor.update>` in a span of MLflow's.

    The span takes as long as scoring, and is a child of the one that is active, if one is. MLflow
    exports traces in a thread of its own, so that no server is waited for. What tracing raises is
    logged and goes no further.

    Returns:
        The alerts raised.

    Raises:
        ValueError: As ``update``.
    """
    with _span() as span:
        scores = monitor.score(batch)
        ids = monitor.identify(batch, scores) if ids is None else ids
        alerts = monitor.observe(scores, ids, batch=batch)
        with _contained():
            _describe(span, scores, monitor.fpr, stream=monitor.name, status=monitor.status)
    return alerts


def trace_scores(scores: Scores, *, fpr: float) -> None:
    """A span and its feedback for scores that are there already.

    Args:
        scores: Of one call; samples without a score are left out.
        fpr: P-values up to this are flagged.

    Raises:
        TypeError: It is no number.
        ValueError: It is not in (0, 1).
    """
    fpr = number("fpr", fpr, 0, 1, ends="()")
    with _span() as span, _contained():
        _describe(span, scores, fpr)


@contextmanager
def _span() -> Iterator[Any]:
    """A span, that of the guardrail; without the guard's own errors, but for those inside."""
    span, stack = None, ExitStack()
    with _contained():
        span = stack.enter_context(mlflow.start_span(_NAME, span_type=SpanType.GUARDRAIL))
    try:
        yield span
    except Exception:  # the guard's or its user's: the span tells, and it is raised on
        with _contained():
            if span is not None:
                span.set_status("ERROR")
        raise
    finally:
        with _contained():
            stack.close()


def _describe(span: Any, scores: Scores, fpr: float, **attributes: str) -> None:
    """Figures, no data; the feedback joins the trace while it is in memory."""
    if span is None:
        return
    p_values = sorted(scores.p_value[scores.valid].tolist())
    flagged = sum(p_value <= fpr for p_value in p_values)
    invalid = int((~scores.valid).sum())
    span.set_attributes(attributes)
    span.set_inputs({"samples": len(scores.valid)})
    span.set_outputs({"flagged": flagged, "invalid": invalid, "p_values": p_values[:_SHOWN]})
    why = f"{flagged} of {len(p_values)} samples with a p-value of at most {fpr:g}"
    feedback = {"is_ood": flagged > 0} | ({"ood_p_value": p_values[0]} if p_values else {})
    for name, value in feedback.items():
        mlflow.log_feedback(
            trace_id=span.trace_id, name=name, value=value, source=_SOURCE, rationale=why
        )


@contextmanager
def _contained() -> Iterator[None]:
    try:
        yield
    except Exception:  # whatever a tracing backend raises must not reach who is watched
        level = logging.DEBUG if next(_failures) else logging.WARNING
        _log.log(level, "A scored call was not traced. [OOD702]", exc_info=True)
