"""A training loop of accelerate in two processes that looks at each shard before it trains on it.

Every process scores its own batches, of which there are not as many for each, and both come to the
same decision. Alerts are files beside the metrics of the loop, written by the main process.

    python examples/accelerate_loop.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator, notebook_launcher
from ood_monitor_integrations.accelerate import AcceleratorMonitor, AcceleratorSink, FileTracker
from torch import Tensor
from torch.utils.data import DataLoader

import ood_monitor as om


def shard(size: int, seed: int, width: float = 1.0) -> DataLoader[Tensor]:
    """Grey images of blurred noise, as they come from a camera; of another width, a broken one."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(size, 1, 10, 10, generator=generator)
    images = torch.nn.functional.avg_pool2d(noise, 3, 1) * width
    return DataLoader(images, batch_size=32)  # type: ignore[arg-type]  # a tensor has samples


def loop(folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, log_with=[FileTracker(folder)])
    accelerator.init_trackers("shards")
    torch.manual_seed(0)
    flow = om.models.Glow(channels=1, size=8, levels=1, steps=2, hidden=8)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    watch = AcceleratorMonitor(
        accelerator,
        flow,
        sinks=[AcceleratorSink(accelerator)],
        progress=False,
    )
    held_out = shard(400, seed=100)
    flow.log_prob(next(iter(held_out)))  # by its first batch it sets its scales: the same in both
    shards = {"first": shard(500, 1), "second": shard(210, 2), "third": shard(210, 3, width=0.5)}
    for step, (name, data) in enumerate(shards.items()):
        data = accelerator.prepare(data)
        if watch.detector is not None and _is_foreign(watch, data, name):
            accelerator.print(f"The {name} shard is not trained on: {watch.alerts[-1].message}")
            continue
        for images in data:
            loss = -flow.log_prob(images).mean() / images[0].numel()
            accelerator.backward(loss)
            for parameter in flow.parameters():  # the mean over the processes
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
            optimizer.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=step)
        watch.calibrate(held_out)  # of the weights that it now has
        accelerator.print(f"The {name} shard was trained on.")
    accelerator.end_training()


def _is_foreign(watch: AcceleratorMonitor, data: DataLoader[Tensor], name: str) -> bool:
    return any(alert.kind == "drift" for alert in watch.watch(data, stage=name))


def main() -> None:
    """Run the loop in two processes, and read what they have left."""
    with TemporaryDirectory() as folder:
        notebook_launcher(loop, (folder,), num_processes=2)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        losses = [line for line in map(json.loads, lines) if "loss" in line]
        alerts = [json.loads(path.read_text()) for path in Path(folder).glob("ood/alerts/*.json")]
    assert len(losses) == 2, losses
    drifts = [alert["stream"] for alert in alerts if alert["kind"] == "drift"]
    print(f"Drifts: {drifts}.")
    assert drifts == ["OODMonitor/third"], drifts


if __name__ == "__main__":
    main()
