"""A training with the callback is the training without it, to the bit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.transformers_cases import (
    Texts,
    callback,
    gpt2,
    llama,
    lora,
    outcome,
    same,
    trainer,
)
from support.transformers_processes import STREAM
from support.two_processes import reports
from torch import nn
from transformers import EarlyStoppingCallback, Trainer

SUPPORT = Path(__file__).parents[2] / "support"


def train(run: Trainer) -> list[Any]:
    return [run.train().training_loss]


def predict(run: Trainer) -> list[Any]:
    run.train()
    found = run.predict(Texts(40, 7))
    return [torch.from_numpy(found.predictions), found.metrics["test_loss"]]


@dataclass(frozen=True)
class Situation:
    """How a model is trained.

    Attributes:
        options: The Trainer's arguments.
        model: Makes the model.
        act: What is done with the Trainer, and what it gives.
        others: Other callbacks.
        resumes: Whether it goes on from the checkpoint of a training that was stopped.
        is_saved_first: Whether a checkpoint comes before the first evaluation, so that data to
            calibrate on must be given.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = llama
    act: Callable[[Trainer], list[Any]] = train
    others: tuple[Callable[[], Any], ...] = ()
    resumes: bool = False
    is_saved_first: bool = False


#: The loss falls, so that the first is the best.
BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}
SITUATIONS: dict[str, Situation] = {
    "epochs": Situation(model=gpt2),
    "max_steps": Situation(
        {"max_steps": 5, "save_steps": 2, "save_strategy": "steps"}, is_saved_first=True
    ),
    "resume": Situation(
        {"save_strategy": "steps", "save_steps": 4}, gpt2, resumes=True, is_saved_first=True
    ),
    "best model at end": Situation({**BEST, "save_total_limit": 1}),
    "LoRA": Situation({**BEST, "activation_checkpointing": True}, lora),
    "accumulation": Situation({"gradient_accumulation_steps": 4}, gpt2),
    "evaluation every k steps": Situation(
        {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    ),
    "early stopping": Situation(
        {**BEST, "num_train_epochs": 4},
        others=(lambda: EarlyStoppingCallback(1),),
    ),
    "predict": Situation(act=predict),
    "bf16": Situation({"bf16": True, "max_grad_norm": 0.0}, gpt2),
}


def done(situation: Situation, folder: Path, *callbacks: Callable[[], Any]) -> dict[str, Any]:
    """What a training leaves behind, and what it gives."""

    def made() -> Trainer:
        every = [make() for make in (*callbacks, *situation.others)]
        return trainer(situation.model(), folder, *every, **situation.options)

    if situation.resumes:
        stopped = made()
        stopped.args.max_steps = 6
        stopped.train()
    run = made()
    if situation.resumes:
        given = [run.train(resume_from_checkpoint=str(folder / "checkpoint-4")).training_loss]
    else:
        given = situation.act(run)
    return {"given": given, **outcome(run)}


#: Those that take the least; `make test-slow` runs the others.
QUICK = ("max_steps", "resume")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SITUATIONS],
)
def test_training_is_bit_identical_with_and_without_the_callback(name: str, tmp_path: Path) -> None:
    situation, made = SITUATIONS[name], []

    def watcher() -> Any:
        options = {"held_out": Texts(64, 6)} if situation.is_saved_first else {}
        made.append(callback(watch=["train", "predict"], calibrate="every checkpoint", **options))
        return made[-1]

    def online() -> Any:
        options: dict[str, Any] = {"watch": ["eval"], "held_out": Texts(64, 5), "name": "online"}
        made.append(callback(calibrate_every_n_evaluations=1, **options))
        return made[-1]

    plain = done(situation, tmp_path / "plain")
    watched = done(situation, tmp_path / "watched", watcher, online)
    for what, values in plain.items():
        for with_it, without in zip(watched[what], values, strict=True):
            assert same(with_it, without), what
    assert [each._failures.counts for each in made] == [{}] * len(made)
    first, second = made[-2:]
    assert first.detector is not None
    assert first._training.state_dict()
    assert second.recorded("eval").scores.valid.all()


@pytest.mark.slow
def test_two_processes_train_as_without_the_callback(tmp_path: Path) -> None:
    first, second = reports(SUPPORT / "transformers_processes.py", tmp_path)
    for told in (first, second):
        assert told["watched"] == told["plain"]
        assert told["failures"] == {}
    assert (first["predict"].pop("heard") > 0, second["predict"].pop("heard")) == (True, 0)
    assert first["predict"] == second["predict"]
    assert first["predict"]["indices"] == [*range(STREAM)]
    assert "drift" in [kind for kind, _ in first["predict"]["alerts"]]
