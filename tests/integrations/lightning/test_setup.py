"""How a Trainer gets the callback: by hand, by YAML, by entry point; and where it is refused."""

import os
import subprocess
import sys
import tomllib
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import yaml
from ood_monitor_integrations.autoload import VARIABLE, callbacks
from ood_monitor_integrations.lightning import OODMonitor
from ood_monitor_integrations.lightning.sharding import refuse_strategy
from ood_monitor_integrations.training.sharding import refuse_shards_of_others
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from support.lightning_cases import QUIET, Flow, images, loader, trainer, watcher
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ood_monitor as om

pytestmark = QUIET

ROOT = Path(__file__).parents[3]


def test_a_module_without_likelihood_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="Expected a module with `log_prob`"):
        trainer(watcher()).fit(BoringModel())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"watch": ["fit"]},
            r"Expected stages of train, val, test, predict to watch, got \['fit'\]",
        ),
        ({"watch": ["prediction"]}, r"got \['prediction'\]. Did you mean 'predict'\?"),
        ({"every_n_batches": 0}, "Expected every_n_batches of at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        OODMonitor(**options)


def test_one_batch_in_the_place_of_a_loader_is_refused() -> None:
    told = (
        r"Expected {} as an iterable of batches, got a Tensor, which is one batch: give \[batch\]"
    )
    with pytest.raises(TypeError, match=told.format("held_out")):
        OODMonitor(held_out=images(64))
    callback = watcher()
    with pytest.raises(TypeError, match=told.format("loader")):
        callback.calibrate(trainer(callback), Flow(), images(64))


def test_a_folder_without_a_detector_is_refused_at_setup(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a saved detector there or in .*, got no"):
        trainer(watcher(detector=tmp_path)).predict(Flow(), loader(images(8)))


class ZeRO3(DeepSpeedStrategy):
    """As DeepSpeed's strategy says that parameters are sharded, without DeepSpeed."""

    def __init__(self, stage: int) -> None:
        self.config = {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ZeRO3(3)])
def test_a_strategy_that_shards_otherwise_is_refused_with_the_remedy(strategy: object) -> None:
    with pytest.raises(ValueError, match=r"which shards them.*Score the consolidated checkpoint"):
        refuse_strategy(strategy, watches_training=False)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy("cpu"), DDPStrategy(), ZeRO3(2)])
def test_a_strategy_that_keeps_parameters_whole_is_taken(strategy: object) -> None:
    refuse_strategy(strategy, watches_training=True)


def test_training_is_not_watched_where_gradients_are_sharded() -> None:
    refuse_strategy(ModelParallelStrategy(), watches_training=False)
    with pytest.raises(ValueError, match=r"`watch=` without 'train'.*got ModelParallelStrategy"):
        refuse_strategy(ModelParallelStrategy(), watches_training=True)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_the_refusal_comes_at_setup() -> None:
    run = trainer(callback := watcher())
    run.strategy.__class__ = type("FSDPStrategy", (type(run.strategy),), {})
    with pytest.raises(ValueError, match="got FSDPStrategy"):
        run.fit(Flow(), loader(images(32)))
    assert callback.detector is None


def test_shards_of_deepspeed_are_told_at_use() -> None:
    module = Flow()
    module.shard = nn.Parameter(torch.zeros(0))
    module.shard.ds_id = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"got 'shard', a shard \(Tensor\) of another kind"):
        refuse_shards_of_others(module)


# Torch 2.6 warns of draws, of which there is none.
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_real_dtensors_are_told_at_use(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        module, mesh = Flow(), init_device_mesh("cpu", (1,))
        module.shard = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        callback = watcher(held_out=[images(64)])
        with pytest.raises(ValueError, match=r"got 'shard', a shard \(DTensor\)"):
            callback.calibrate(trainer(callback), module, [images(64)])
    finally:
        dist.destroy_process_group()


LIGHTNINGS_OWN = (
    *("does not have many workers", "LeafSpec", "smaller than the logging interval"),
    *("tensorboardX", "self.log.* but .*barebones"),
)


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"fast_dev_run": True},
        {"barebones": True},
        {"num_sanity_val_steps": 2},
    ],
)
def test_a_bare_trainer_is_quiet(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where a default logger writes
    callback = OODMonitor(watch=["train", "test"], progress=False, fpr=0.05, ert=1000)
    base: dict[str, Any] = {"accelerator": "cpu"} | options
    if "barebones" not in options:
        base |= {"enable_progress_bar": False, "enable_model_summary": False}
        base |= {"enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for told in LIGHTNINGS_OWN:
            warnings.filterwarnings("ignore", f".*{told}")
        run = pl.Trainer(callbacks=callback, max_epochs=2, **base)
        module = Flow()
        run.fit(module, loader(images(64)), loader(images(128, seed=1)))
        if "fast_dev_run" not in options:
            run.test(module, loader(images(64)), verbose=False)
            assert len(callback.scores("test").score) == 64


def test_a_single_callback_needs_no_list() -> None:
    run = pl.Trainer(callbacks=OODMonitor(), accelerator="cpu", logger=False)
    assert any(isinstance(callback, OODMonitor) for callback in run.callbacks)  # type: ignore[attr-defined]


CONFIG: dict[str, Any] = {
    "class_path": "ood_monitor_integrations.lightning.OODMonitor",
    "init_args": {
        "watch": ["train", "test"],
        "inputs": "support.lightning_cases.whole",
        "layers": ["*coupling*"],
        "ert": 500.0,
        "fpr": 0.05,
        "progress": False,
        "sinks": [{"class_path": "ood_monitor.LoggingSink"}],
        "training": {"class_path": "ood_monitor.TrainingStream", "init_args": {"warm_up": 10}},
    },
}


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(images(64))

    def val_dataloader(self) -> Any:
        return loader(images(128, seed=1))


def test_the_command_line_takes_it_from_yaml_and_writes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    # Lightning calls what jsonargparse has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["main.py"])
    quiet = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path)}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}}
    (tmp_path / "given.yaml").write_text(
        yaml.safe_dump({"trainer": quiet | {"callbacks": [CONFIG]}})
    )
    arguments = ["fit", "--config", str(tmp_path / "given.yaml")]
    cli = LightningCLI(Flow, Data, args=arguments, seed_everything_default=0)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, OODMonitor)]  # type: ignore[attr-defined]
    assert callback.detector is not None
    layers = [n for n in callback.detector.fitted.layers if "/" in n and "values/" not in n]
    assert layers
    assert all("coupling" in name for name in layers)
    (config,) = tmp_path.glob("**/config.yaml")
    written = yaml.safe_load(config.read_text())
    found = written["trainer"]["callbacks"][0]
    assert found["class_path"] == CONFIG["class_path"]
    assert found["init_args"].items() >= {"watch": ["train", "test"], "fpr": 0.05}.items()


def test_without_the_variable_no_callback_comes_and_nothing_is_imported() -> None:
    code = (
        "import sys; from ood_monitor_integrations.autoload import callbacks; "
        "assert callbacks() == []; heavy = {'torch', 'pytorch_lightning', 'ood_monitor'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment | paths, check=True)


def test_a_variable_that_names_no_detector_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.warns(UserWarning, match=f"Expected {VARIABLE} to name a saved detector"):
        assert callbacks() == []


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of this checkout, in the place of what is installed under its name."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "site" / "ood_monitor-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ood-monitor\nVersion: 0\n")
    lines = [f"[{group}]\n{k} = {v}\n" for group, e in groups.items() for k, v in e.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def test_the_entry_point_watches_a_trainer_that_knows_of_nothing(
    installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = Flow()
    detector = om.Detector(om.LogLikelihood(module)).fit([images(200)], progress=False)
    detector.save_pretrained(tmp_path / "detector")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "detector"))
    run = trainer()
    run.predict(module, loader(images(64) / 4))
    found = [c for c in run.callbacks if isinstance(c, OODMonitor)]  # type: ignore[attr-defined]
    assert {alert.kind for c in found for alert in c.alerts} >= {"drift"}


def test_the_entry_point_leaves_other_models_alone(
    installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = om.LogLikelihood(Flow())
    om.Detector(adapter).fit([images(64)], progress=False).save_pretrained(tmp_path / "detector")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "detector"))
    with pytest.warns(UserWarning, match="autoload will not watch: Expected a module with"):
        trainer(fast_dev_run=True).fit(BoringModel())


NAMESPACES = """
import warnings
warnings.simplefilter("ignore")
import lightning.pytorch as L
import pytorch_lightning as pl
import torch
from ood_monitor_integrations.lightning import OODMonitor
from ood_monitor.models import Glow

def module(base):
    class Flow(base):
        def __init__(self):
            super().__init__()
            self.flow = Glow(channels=1, size=4, levels=1, steps=1, hidden=4)
        def log_prob(self, x):
            return self.flow.log_prob(x)
        def training_step(self, x, index):
            return -self.log_prob(x).mean()
        def validation_step(self, x, index):
            pass
        def predict_step(self, x, index):
            return x
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())
    return Flow()

def loader(n):
    return torch.utils.data.DataLoader(torch.rand(n, 1, 4, 4), batch_size=32)

for space in (L, pl):
    for form in (lambda c: c, lambda c: [c]):
        callback = OODMonitor(progress=False, fpr=0.05, ert=1000)
        trainer = space.Trainer(
            callbacks=form(callback), max_epochs=1, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )
        model = module(space.LightningModule)
        trainer.fit(model, loader(64), loader(64))
        trainer.predict(model, loader(32))
        assert len(callback.scores("predict").score) == 32
        assert callback.failures == 0
"""


@pytest.mark.skipif(find_spec("lightning") is None, reason="`lightning` is not installed")
def test_both_namespaces_take_it_alone_and_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(NAMESPACES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, tmp_path / "run.py"], env=environment, check=True, cwd=tmp_path)
