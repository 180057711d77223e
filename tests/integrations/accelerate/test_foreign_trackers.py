"""Alerts in TensorBoard, read from what accelerate's tracker has written."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from ood_monitor_integrations.accelerate import AcceleratorSink
from support.alert_cases import ALERT, summary

pytest.importorskip("tensorboard")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs are many


def test_tensorboard_has_a_text_and_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("test")
    sink = AcceleratorSink(accelerator)
    sink(ALERT)
    sink.summarise(summary(64))
    found = EventAccumulator(str(tmp_path / "test")).Reload()
    (text,) = found.Tensors("ood/alerts/text_summary")
    assert text.step == ALERT.samples_seen
    assert ALERT.id in text.tensor_proto.string_val[0].decode()
    assert [scalar.step for scalar in found.Scalars("ood/status")] == [64]
