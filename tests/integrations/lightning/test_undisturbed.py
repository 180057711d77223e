"""A run with the callback is the run without it, to the bit."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support.averaging import EMAWeightAveraging
from support.lightning_cases import QUIET, Flow, images, loader, trained, trainer, watcher
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

pytestmark = QUIET


class Normalised(Flow):
    """Batch norm's statistics move when a model in train mode is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.frozen = nn.Dropout(0.5).eval()

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(self.frozen(self.norm(x)))

    def training_step(self, x: Tensor, index: int) -> Any:
        return -self.log_prob(self.dropout(x)).mean()


class Manual(Flow):
    """Two optimisers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, x: Tensor, index: int) -> Any:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(-self.log_prob(self.dropout(x)).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.Adam(parameters[:5]), torch.optim.SGD(parameters[5:], lr=0.01)]


class Augmented(Flow):
    """Draws in the hooks that bring a batch to the device."""

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + 1e-3 * torch.rand_like(batch)


#: How it is trained: the module, other callbacks, the Trainer's options.
RUNS: dict[str, tuple[Callable[[], Flow], list[Callable[[], Any]], dict[str, Any]]] = {
    "dropout": (Flow, [], {}),
    "batch norm": (Normalised, [], {}),
    "accumulation": (Flow, [], {"accumulate_grad_batches": 2}),
    "clipping": (Flow, [], {"gradient_clip_val": 0.1}),
    "manual optimisation": (Manual, [], {}),
    "bf16-mixed": (Flow, [], {"precision": "bf16-mixed"}),
    "averaged weights": (Flow, [lambda: EMAWeightAveraging(decay=0.5)], {}),
    "augmentation": (Augmented, [], {}),
    "early stopping": (Flow, [], {"max_steps": 3, "max_epochs": -1}),
    "sanity check": (Flow, [], {"num_sanity_val_steps": 2}),
    "no sanity check": (Flow, [], {"num_sanity_val_steps": 0}),
}


def outcome(make: Callable[[], Flow], *callbacks: Any, **options: Any) -> dict[str, Any]:
    """All that training leaves behind."""
    pl.seed_everything(0, verbose=False)
    module, run = make(), trainer(*callbacks, **options)
    run.fit(module, loader(images(64), shuffle=True), loader(images(128, seed=1)))
    states = [optimizer.state_dict()["state"] for optimizer in run.optimizers]
    metrics = {k: v for k, v in run.callback_metrics.items() if not k.startswith("ood/")}
    return {
        "weights": list(module.state_dict().values()),
        "gradients": [p.grad for p in module.parameters()],
        "optimisers": [v for s in states for slots in s.values() for v in slots.values()],
        "metrics": list(metrics.values()),
        "random state": [torch.get_rng_state()],
        "modes": [submodule.training for submodule in module.modules()],
        "trainable": [p.requires_grad for p in module.parameters()],
    }


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode:UserWarning")
@pytest.mark.parametrize("name", RUNS)
def test_training_is_bit_identical_with_and_without_the_callback(name: str) -> None:
    make, others, options = RUNS[name]
    callback = watcher(watch=["train", "test"], calibrate="every checkpoint")
    held_out: dict[str, Any] = {"held_out": [images(64, seed=5)], "calibrate_every_n_epochs": 1}
    online = watcher(name="online", watch=["train", "val"], **held_out)
    plain = outcome(make, *(other() for other in others), **options)
    watched = outcome(make, callback, *(other() for other in others), online, **options)
    assert callback.detector is not None
    assert online.monitor is not None
    assert (callback.failures, online.failures) == (0, 0)
    for what, values in plain.items():
        for with_it, without in zip(watched[what], values, strict=True):
            assert same(with_it, without), what


class Drawing(Dataset[Tensor]):
    """Noise of a generator of its own on each sample."""

    def __init__(self, count: int, seed: int) -> None:
        self.images, self.noise = images(count, seed), np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index] + 1e-3 * float(self.noise.random())


def of_one_generator(*, shuffle: bool = False) -> tuple[Any, Any]:
    own = torch.Generator().manual_seed(1)
    validation = loader(images(96, seed=1), shuffle=shuffle, generator=own)
    return loader(images(64), shuffle=True, generator=own), validation


def of_drawing_data() -> tuple[Any, Any]:
    return loader(images(64)), DataLoader(Drawing(96, 1), batch_size=32)


def of_lasting_workers() -> tuple[Any, Any]:
    lasting = {"num_workers": 1, "persistent_workers": True}
    return loader(images(64), shuffle=True, **lasting), loader(images(96, seed=1), **lasting)


#: Loaders that remember, and the Trainer's options.
LOADERS: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any]]] = {
    "one generator": (of_one_generator, {}),
    "one generator, validation shuffled": (
        partial(of_one_generator, shuffle=True),
        {"limit_val_batches": 2},
    ),
    "data that draw": (of_drawing_data, {}),
    "lasting workers": (of_lasting_workers, {"num_sanity_val_steps": 0}),
    "lasting workers, sanity check": (of_lasting_workers, {"num_sanity_val_steps": -1}),
}


@pytest.mark.slow
@pytest.mark.both_methods
@pytest.mark.filterwarnings("ignore:.*shuffling enabled, it is strongly:UserWarning")
@pytest.mark.parametrize("name", LOADERS)
def test_loaders_go_on_as_without_the_callback(name: str, tmp_path: Path) -> None:
    """Weights alone are saved in mid-epoch, so that calibrations come wherever they can."""
    make, options = LOADERS[name]
    found = []
    for callbacks in ((), (watcher(calibrate="every checkpoint"),)):
        pl.seed_everything(0, verbose=False)
        folder = tmp_path / str(len(found))
        keeper = ModelCheckpoint(folder, every_n_train_steps=1, save_weights_only=True)
        module, run = Seeing(), trainer(*callbacks, keeper, **options)
        run.fit(module, *make())
        found.append([module.seen, *module.state_dict().values(), torch.get_rng_state()])
    for with_it, without in zip(*found, strict=True):
        assert same(with_it, without)


class Seeing(Flow):
    """Notes what it is fed, training, validation and sanity check."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, x: Tensor, index: int) -> Any:
        self.seen.append(float(x.sum()))
        return super().training_step(x, index)

    def validation_step(self, x: Tensor, index: int, dataloader_idx: int = 0) -> None:
        self.seen.append(float(x.sum()))


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_leaves_the_model_as_it_was(stage: str) -> None:
    module, callback = Normalised(), watcher(watch=[stage])
    callback.calibrate(run := trainer(callback), module, [images(64)])
    module.norm.eval()
    before = copy.deepcopy(module.state_dict())
    modes = [submodule.training for submodule in module.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    options = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(module, loader(images(64, seed=2)), **options)
    assert callback.failures == 0
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert modes == [submodule.training for submodule in module.modules()]
    plain = trainer()
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    getattr(plain, stage)(module, loader(images(64, seed=2)), **options)
    assert torch.equal(torch.get_rng_state(), now)


def test_mixed_precision_changes_no_score() -> None:
    callback, module = watcher(), trained()
    callback.calibrate(trainer(callback), module, [images(64)])
    found = []
    for precision in ("32-true", "bf16-mixed"):
        trainer(callback, precision=precision).predict(module, loader(images(32, seed=2)))
        found.append(callback.scores("predict").score)
    assert torch.equal(*found)
