"""Tiny language models and texts, as a Trainer is given them."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from ood_monitor_integrations.transformers import OODCallback
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

__all__ = [
    "PROMPT",
    "VOCABULARY",
    "Texts",
    "callback",
    "collated",
    "gpt2",
    "llama",
    "lora",
    "outcome",
    "same",
    "seeded",
    "trainer",
]

VOCABULARY, PROMPT = 32, 3


class Texts(Dataset[dict[str, Tensor]]):
    """Texts of several lengths in which a token mostly follows from the last; foreign: none does.

    Args:
        count: How many.
        seed: Of the draws.
        foreign: Whether tokens are drawn alone.
    """

    def __init__(self, count: int, seed: int, *, foreign: bool = False) -> None:
        generator = np.random.default_rng(seed)
        self.rows = [_text(generator, 1.0 if foreign else 0.2) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, labels = self.rows[index].clone(), self.rows[index].clone()
        labels[:PROMPT] = -100
        return {"input_ids": tokens, "labels": labels}


def _text(generator: np.random.Generator, noise: float) -> Tensor:
    tokens = [int(generator.integers(1, VOCABULARY))]
    for _ in range(int(generator.integers(9, 14))):
        is_drawn = generator.random() < noise
        following = (5 * tokens[-1] + 3) % (VOCABULARY - 1) + 1
        tokens.append(int(generator.integers(1, VOCABULARY)) if is_drawn else following)
    return torch.tensor(tokens)


def collated(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Filled up on the right, with a mask, as a padding collator does."""

    def padded(values: list[Tensor], fill: int) -> Tensor:
        return pad_sequence(values, batch_first=True, padding_value=fill)

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([torch.ones_like(row["input_ids"]) for row in rows], 0),
    }


def seeded(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def llama(**options: Any) -> transformers.PreTrainedModel:
    seeded()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **{"attention_dropout": 0.1, **options},
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> transformers.PreTrainedModel:
    """With dropout, which draws at each step."""
    seeded()
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        loss_type="ForCausalLM",
    )
    return transformers.GPT2LMHeadModel(config)


def lora(make: Callable[[], Any] = llama) -> nn.Module:
    config = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    return get_peft_model(make(), config)


def callback(**options: Any) -> OODCallback:
    return OODCallback(**{"progress": False, "console": False, "fpr": 0.05, **options})


def trainer(
    model: nn.Module | None, folder: Path, *callbacks: Any, model_init: Any = None, **options: Any
) -> Trainer:
    """48 texts to train on and 96 to evaluate on."""
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(str(folder), **{**usual, **options})
    return Trainer(
        model,
        args,
        data_collator=collated,
        train_dataset=Texts(48, 1),
        eval_dataset=Texts(96, 2),
        callbacks=[*callbacks],
        model_init=model_init,
    )


#: What a clock says.
_TIMES = ("_runtime", "_per_second", "_time")


def outcome(run: Trainer) -> dict[str, Any]:
    """All that training leaves behind."""
    optimizer = run.optimizer.state_dict()["state"]
    model = run.model
    assert model is not None
    return {
        "weights": list(model.state_dict().values()),
        "gradients": [p.grad for p in model.parameters()],
        "optimiser": [value for state in optimizer.values() for value in state.values()],
        "losses": [_without_times(entry) for entry in run.state.log_history],
        "steps": [run.state.global_step, run.state.best_metric, run.state.epoch],
        "random state": [torch.get_rng_state(), random.getstate(), *_numpy_state()],
        "modes": [module.training for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
    }


def _without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith(_TIMES)}


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)
