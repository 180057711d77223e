"""A logged detector on Spark: the same scores as in one process, sample by sample."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's own, about its type hints
    import mlflow.pyfunc

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from ood_monitor_integrations.mlflow import flavour
from support import flavour_cases as cases

pytest.importorskip("pyspark")

SAMPLES = 20_000

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Spark's own are many


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYSPARK_DRIVER_PYTHON", sys.executable)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        cores = os.environ.get("OOD_MONITOR_SPARK_CORES", "2")
        session = (
            SparkSession.builder.master(f"local[{cores}]")
            .config("spark.ui.enabled", "false")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.sql.execution.arrow.maxRecordsPerBatch", "2000")
            .getOrCreate()
        )
        yield session
        session.stop()


def test_spark_scores_as_one_process(spark: Any, tmp_path: Path) -> None:
    detector = cases.fitted()
    flavour.save_model(detector, tmp_path / "model", factory=cases.FACTORY)
    x = cases.images(SAMPLES, seed=5)
    x[7, 0, 0, 0] = float("nan")
    rows = pd.DataFrame({"id": np.arange(SAMPLES), "x": x.flatten(1).double().numpy().tolist()})
    score = mlflow.pyfunc.spark_udf(spark, str(tmp_path / "model"), env_manager="local")
    frame = spark.createDataFrame(rows).repartition(8)
    found = frame.select("id", score("x").alias("s")).select("id", "s.*").toPandas()
    found = found.sort_values("id").reset_index(drop=True)
    kept = [i for i in range(SAMPLES) if i != 7]
    scores = detector.score(x[torch.tensor(kept)])
    assert len(found) == SAMPLES
    assert not found["valid"][7]
    assert found["valid"][kept].all()
    for name in ("score", "p_value", "log_likelihood"):
        expected = getattr(scores, name).numpy()
        np.testing.assert_allclose(found[name][kept], expected, rtol=1e-6, atol=1e-6)
