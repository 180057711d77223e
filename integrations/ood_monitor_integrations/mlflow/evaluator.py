"""An evaluator for ``mlflow.models.evaluate``: AUROC and false alarms, to gate a model on.

Labels are 1 for samples that are out of distribution and 0 for the others::

    result = mlflow.models.evaluate(
        model_uri, data, targets="label", model_type="out-of-distribution", evaluators="ood_monitor"
    )
    least = MetricThreshold(threshold=0.9, greater_is_better=True)
    mlflow.validate_evaluation_results({"ood/auroc": least}, result)
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.models.evaluation.base import EvaluationResult, ModelEvaluator
from sklearn.metrics import average_precision_score, roc_auc_score

from ood_monitor.calibration import binomial_interval
from ood_monitor.densities.autologging import without_autologging

__all__ = ["MODEL_TYPE", "DetectorEvaluator"]

#: To pass as ``model_type=``.
MODEL_TYPE = "out-of-distribution"

_FPR = 0.01


class DetectorEvaluator(ModelEvaluator):
    """Metrics of a detector on labelled samples.

    ``ood/auroc`` and ``ood/average_precision`` are of the score. A sample is flagged if its p-value
    is at most ``fpr`` (of ``evaluator_config``, 0.01 by default): ``ood/false_alarm_rate`` is the
    share of the in-distribution samples that are, with its exact 95% interval in
    ``ood/false_alarm_rate_low`` and ``_high``, and ``ood/detection_rate`` of the others. A rate
    above ``fpr`` by chance is no fault; one whose ``_low`` is above it is: gate on that.

    ``ood/invalid`` counts samples without a score, which are in no other metric. What labels or
    predictions do not allow is left out.
    """

    @classmethod
    def can_evaluate(
        cls, *, model_type: str | None, evaluator_config: Mapping[str, Any], **kwargs: Any
    ) -> bool:
        """Only what is asked for, by the model's type or by an ``fpr``.

        MLflow asks every evaluator that is installed about every model that anyone evaluates.
        """
        return model_type == MODEL_TYPE or "fpr" in (evaluator_config or {})

    def evaluate(
        self,
        *,
        model_type: str | None,
        dataset: Any,
        run_id: str | None,
        evaluator_config: Mapping[str, Any] | None,
        model: Any = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        predictions: Any = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Score the data, or take what a static data set says, and log the metrics to the run.

        Raises:
            ValueError: No labels, others than 0 and 1, no score, or an fpr outside (0, 1).
        """
        fpr = float((evaluator_config or {}).get("fpr", _FPR))
        if not 0 < fpr < 1:
            raise ValueError(f"Expected fpr in (0, 1), got {fpr}.")
        said = (
            dataset.predictions_data if model is None else model.predict(_features(model, dataset))
        )
        found = _table(said)
        metrics = _metrics(found, _labels(dataset, len(found)), fpr)
        if run_id is not None:
            now = int(time.time() * 1000)
            logged = [Metric(name, value, now, 0) for name, value in metrics.items()]
            MlflowClient().log_batch(run_id, metrics=logged)
        return EvaluationResult(metrics=metrics, artifacts={})


def _features(model: Any, dataset: Any) -> Any:
    """The data as the model takes them: MLflow holds arrays as rows."""
    features = dataset.features_data
    metadata = getattr(model, "metadata", None)
    schema = metadata.get_input_schema() if metadata is not None else None
    if schema is None or not schema.is_tensor_spec() or len(schema.inputs) > 1:
        return features
    (spec,) = schema.inputs
    if isinstance(features, pd.DataFrame):
        column = features.iloc[:, 0]
        is_arrays = features.shape[1] == 1 and column.dtype == object
        features = np.stack(list(map(np.asarray, column))) if is_arrays else features.to_numpy()
    return np.asarray(features).reshape(-1, *spec.shape[1:]).astype(spec.type)


def _table(said: Any) -> pd.DataFrame:
    """Predictions with a column of scores."""
    found = (
        said
        if isinstance(said, pd.DataFrame)
        else pd.DataFrame({"score": np.asarray(said).ravel()})
    )
    if "score" not in found:
        raise ValueError(f"Expected predictions with a 'score', got {list(found.columns)}.")
    return found


def _labels(dataset: Any, count: int) -> np.ndarray:
    if dataset.labels_data is None:
        raise ValueError("Expected labels, 1 for out of distribution, got none: pass `targets`.")
    labels = np.asarray(dataset.labels_data).ravel()
    if len(labels) != count or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"Expected {count} labels of 0 and 1, got {labels[:5].tolist()}...")
    return labels.astype(bool)


def _metrics(found: pd.DataFrame, is_foreign: np.ndarray, fpr: float) -> dict[str, float]:
    scores = found["score"].to_numpy(float)
    valid = ~np.isnan(scores)
    scores, truth = scores[valid].clip(-1e300, 1e300), is_foreign[valid]
    metrics = {"ood/samples": float(len(valid)), "ood/invalid": float((~valid).sum())}
    if 0 < truth.sum() < len(truth):
        with without_autologging():
            metrics["ood/auroc"] = float(roc_auc_score(truth, scores))
            metrics["ood/average_precision"] = float(average_precision_score(truth, scores))
    if "p_value" in found:
        metrics |= _rates(found["p_value"].to_numpy(float)[valid] <= fpr, truth, fpr)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _rates(flagged: np.ndarray, truth: np.ndarray, fpr: float) -> dict[str, float]:
    """Of false alarms and of detections, where there are samples to count."""
    rates = {"ood/fpr": fpr}
    normal = int((~truth).sum())
    if normal:
        alarms = int(flagged[~truth].sum())
        low, high = binomial_interval(alarms, normal)
        rates["ood/false_alarm_rate"] = alarms / normal
        rates["ood/false_alarm_rate_low"], rates["ood/false_alarm_rate_high"] = low, high
    if truth.any():
        rates["ood/detection_rate"] = float(flagged[truth].mean())
    return rates
