"""The training stream: a corrupt shard is flagged, whatever optimises and in which precision."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from ood_monitor_integrations.training.gradients import squared_norms
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from support.lightning_cases import QUIET, Flow, images, loader, trainer
from torch import Tensor, nn

import ood_monitor as om

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
]

#: Batches of the run, and those that a corrupt shard is in.
BATCHES, CORRUPT = 120, (80, 81, 82)


def shards() -> Tensor:
    data = images(8 * BATCHES).split(8)
    return torch.cat([x * 10 if i in CORRUPT else x for i, x in enumerate(data)])


def watching(**options: Any) -> OODMonitor:
    stream = om.TrainingStream(half_life=30.0, threshold=6.0, warm_up=30)
    return OODMonitor(watch=["train"], training=stream, **options)


class Plain(Flow):
    """Without dropout and with small steps: a corrupt batch does not spoil what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Identity()  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-7)


class Manual(Plain):
    """Each half of the parameters has an optimiser; the second steps every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, x: Tensor, index: int) -> Any:
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer in (first, second) if index % 2 == 0 else (first,):
            optimizer.zero_grad()
            self.manual_backward(-self.flow.log_prob(x).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.SGD(part, lr=1e-7) for part in (parameters[:5], parameters[5:])]


class Unlikely(Plain):
    """A model that no likelihood is known of."""

    log_prob = None  # type: ignore[assignment]


#: The module, and the Trainer's options.
RUNS: dict[str, tuple[type[Plain], dict[str, Any]]] = {
    "plain": (Plain, {}),
    "clipping": (Plain, {"gradient_clip_val": 1e-3}),
    "bf16-mixed": (Plain, {"precision": "bf16-mixed"}),
    "64-true": (Plain, {"precision": "64-true"}),
    "two optimisers": (Manual, {}),
    "no likelihood": (Unlikely, {}),
}


def fed(make: type[Plain], callback: OODMonitor, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    run = trainer(callback, max_epochs=1, limit_val_batches=0, **options)
    run.fit(make(), loader(shards(), batch_size=8))
    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_corrupt_shard_is_flagged_and_little_else(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, options = RUNS[name]
    with caplog.at_level(logging.WARNING, logger="ood_monitor_integrations.lightning"):
        fed(make, callback := watching(), **options)
    flagged = {batch.batch_idx for batch in callback.flagged_batches}
    assert set(CORRUPT) <= flagged
    assert len(flagged) <= len(CORRUPT) + 3
    assert "unusual gradient of training batch 80 in epoch 0" in caplog.text
    assert all(len(batch.layers) == 5 for batch in callback.flagged_batches)


def test_each_optimiser_has_a_past_of_its_own() -> None:
    fed(Manual, callback := watching())
    batches = {k: s["batches"] for k, s in callback.state_dict()["training"].items()}
    assert batches == {"0": BATCHES, "1": BATCHES // 2}


def test_the_loggers_have_its_figures(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run = fed(Plain, callback := watching(), logger=logger, log_every_n_steps=10)
    rate = len(callback.flagged_batches) / (BATCHES - 30)  # those after the warm-up
    assert float(run.callback_metrics["ood/train/flagged_rate"]) == pytest.approx(rate)
    written = (Path(logger.log_dir) / "metrics.csv").read_text()
    rows = csv.DictReader(written.splitlines())
    steps = [int(row["step"]) for row in rows if row["ood/train/score"]]
    assert steps == list(range(39, BATCHES, 10))


def test_layers_restrict_it() -> None:
    fed(Plain, callback := watching(layers="*coupling*"))
    named = {name for batch in callback.flagged_batches for name, _ in batch.layers}
    assert named
    assert all("coupling" in name for name in named)


def test_gradients_are_unscaled_under_a_gradient_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    scaled = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fed(Plain, callback := watching(), plugins=[scaled])
    fed(Plain, reference := watching())
    # Logarithms of squared norms: the scale would add 13.9. The smallest are below half precision.
    found, exact = (c.state_dict()["training"]["0"]["location"] for c in (callback, reference))
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b > -5]
    assert len(pairs) >= 5
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], abs=0.2)


def test_a_gradient_that_is_not_finite_is_flagged_and_leaves_the_baseline() -> None:
    class Broken(Plain):
        def training_step(self, x: Tensor, index: int) -> Any:
            return super().training_step(x, index) * (torch.nan if index == 90 else 1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if any(p.grad is not None and p.grad.isnan().any() for p in self.parameters()):
                optimizer.zero_grad()

    fed(Broken, callback := watching())
    flagged = {batch.batch_idx: batch for batch in callback.flagged_batches}
    assert flagged[90].score == float("inf")
    assert len(flagged) <= len(CORRUPT) + 4


def test_parameters_that_thaw_begin_a_new_baseline() -> None:
    class Thawing(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            frozen = next(self.parameters())
            frozen.requires_grad_(batch_idx >= 40)

    fed(Thawing, callback := watching())
    assert set(CORRUPT) <= {batch.batch_idx for batch in callback.flagged_batches}
    assert callback.state_dict()["training"]["0"]["batches"] == BATCHES - 40


@pytest.mark.parametrize(
    "types",
    [
        (torch.float64,),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128),
    ],
    ids=str,
)
def test_one_optimiser_may_have_parameters_of_several_types(types: tuple[torch.dtype, ...]) -> None:
    """Half precision would overflow: its largest number is the square of 256."""
    named = [(str(kind), nn.Parameter(torch.zeros(3, dtype=kind))) for kind in types]
    for index, (_, parameter) in enumerate(named):
        parameter.grad = torch.full((3,), 1024.0 * (index + 1), dtype=parameter.dtype)
    norms = squared_norms(named)
    assert list(norms) == [name for name, _ in named]
    exact = [3 * (1024.0 * (index + 1)) ** 2 for index in range(len(types))]
    assert list(norms.values()) == pytest.approx(exact, rel=1e-6)
