"""Fine-tune a tiny language model by shards; a foreign one is caught before it is trained on.

Prompts and completions of a made-up language come in shards. The model is trained on the first, and
its checkpoint has a detector of its weights. Each further shard is looked at before it is trained
on: one forward pass, on the completions alone. The third is in another language.

    python examples/transformers_sft.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ood_monitor_integrations.transformers import OODCallback
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

WORDS, PROMPT = 60, 4


class Shard(Dataset[dict[str, list[int]]]):
    """Prompts of random words, whose completion goes on from the last by a rule."""

    def __init__(self, size: int, seed: int, step: int = 7) -> None:
        draw = np.random.default_rng(seed)
        self.texts = [self._text(draw, step) for _ in range(size)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        text = self.texts[index]
        return {"input_ids": text, "labels": [-100] * PROMPT + text[PROMPT:]}

    def _text(self, draw: np.random.Generator, step: int) -> list[int]:
        text = [int(word) for word in draw.integers(1, WORDS, PROMPT)]
        for _ in range(int(draw.integers(8, 16))):
            is_odd = draw.random() < 0.1
            following = (text[-1] * step + 3) % (WORDS - 1) + 1
            text.append(int(draw.integers(1, WORDS)) if is_odd else following)
        return text


def collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = [[int(i < len(row["input_ids"])) for i in range(longest)] for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def trainer_of(model: torch.nn.Module, shard: Shard, folder: str, *callbacks: Any) -> Trainer:
    args = TrainingArguments(
        folder,
        num_train_epochs=2,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    held_out = Shard(400, seed=100)
    return Trainer(
        model, args, collated, train_dataset=shard, eval_dataset=held_out, callbacks=[*callbacks]
    )


def main() -> None:
    """Train on shards as long as they are like the first."""
    set_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    shards = {
        "first": Shard(1200, seed=1),
        "second": Shard(300, seed=2),
        "third": Shard(300, seed=3, step=11),
    }
    with TemporaryDirectory() as folder:
        watch = OODCallback(watch=["predict"], progress=False)
        trainer = trainer_of(LlamaForCausalLM(config), shards["first"], folder, watch)
        trainer.train()
        best = Path(str(trainer.state.best_model_checkpoint))
        print(f"{best.name} has {sorted(path.name for path in best.iterdir())}.")
        trainer.args.prediction_loss_only = True  # nobody needs the logits
        trained = ["first"]
        for name in ("second", "third"):
            metrics = trainer.predict(shards[name], metric_key_prefix=name).metrics or {}
            rate, status = (metrics[f"{name}_ood_{key}"] for key in ("flagged_rate", "status"))
            print(f"The {name} shard: {100 * rate:.0f} % flagged, status {int(status)} of 2.")
            if status == 2:
                print(f"The {name} shard is not trained on: {watch.alerts[-1].message}")
                continue
            trained.append(name)  # and here it would be trained on
    assert trained == ["first", "second"], trained
    assert [alert.kind for alert in watch.alerts][-1] == "drift"


if __name__ == "__main__":
    main()
