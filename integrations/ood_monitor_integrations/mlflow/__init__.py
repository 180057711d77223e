"""Alerts and detectors in MLflow."""

from ood_monitor_integrations.mlflow.sink import MLflowSink

__all__ = ["MLflowSink"]
