"""What the Trainer's callback adds to a training step and to an evaluation of a language model.

The training stream is on in every other step of one run, so that both kinds of step see the same
machine: the ratio of their medians is what it adds, and the time in its hooks is told beside it.
Evaluations with and without scoring alternate. Times are the processor's, which with one thread are
the clock's where nothing else runs. Networks have random weights.
"""

import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from ood_monitor_integrations.transformers import OODCallback
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import ood_monitor as om
from benchmarks.harness.measurement import (
    Run,
    claim,
    conclude,
    machine,
    processor_seconds,
    ratios,
)

#: What a step may cost with the training stream, and an evaluation that is scored by one forward
#: pass, which it makes anyway.
TRAINING, EVALUATION = 1.02, 1.25

#: Steps before those that count: the first allocate, and the stream warms up.
WARM_UP = 10

#: Samples that detectors are fitted on, texts of a batch, and tokens of one.
HELD_OUT, BATCH, LENGTH = 160, 8, 128

#: Width, layers and vocabulary of the models.
SIZES: dict[str, tuple[int, int, int]] = {
    "Llama of 1.8 M weights": (128, 4, 4_000),
    "Llama of 18 M weights": (384, 6, 8_000),
}


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, whose first quarter is a prompt."""

    def __init__(self, count: int, vocabulary: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(2, vocabulary, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.tokens[index].clone()
        labels[: LENGTH // 4] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


class Alternating(OODCallback):
    """Looks at every other step, and times itself."""

    def __init__(self) -> None:
        super().__init__(watch=["train"], training=om.TrainingStream(warm_up=2, threshold=1e9))
        self.starts: list[float] = []
        self.spent: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.starts.append(time.process_time())
        super().on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.starts) % 2:
            start = time.process_time()
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            self.spent.append(time.process_time() - start)


def model_of(size: tuple[int, int, int]) -> transformers.PreTrainedModel:
    width, layers, vocabulary = size
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def trainer_of(
    model: Any, vocabulary: int, folder: str, *callbacks: Any, **options: Any
) -> Trainer:
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        save_strategy="no",
        logging_steps=10**6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        learning_rate=1e-6,
        **options,
    )
    data = Texts(2 * BATCH, vocabulary, 1)
    run = Trainer(model, args, train_dataset=data, callbacks=[*callbacks])
    run.remove_callback(transformers.PrinterCallback)
    return run


def step_times(size: tuple[int, int, int], pairs: int) -> dict[str, Any]:
    callback = Alternating()
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 * pairs + WARM_UP + 1
        trainer_of(model_of(size), size[2], folder, callback, max_steps=steps).train()
    times = [b - a for a, b in zip(callback.starts, callback.starts[1:], strict=False)][WARM_UP:]
    watched, plain = (statistics.median(times[start::2]) for start in (0, 1))
    spent = statistics.median(callback.spent[WARM_UP // 2 :])
    return {
        "plain step, seconds": round(plain, 4),
        "step with the training stream": round(watched / plain, 4),
        "its hook, share of a step": round(spent / plain, 4),
    }


def batch_of(texts: Texts, at: int) -> dict[str, torch.Tensor]:
    rows = [texts[index] for index in range(at, at + BATCH)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def evaluation_times(size: tuple[int, int, int], batches: int, rounds: int) -> dict[str, float]:
    model, vocabulary = model_of(size).eval(), size[2]
    adapter = om.SequenceLikelihood(model, ignore_index=-100)
    held_out, data = Texts(HELD_OUT, vocabulary, 2), Texts(batches * BATCH, vocabulary, 3)
    parts = [batch_of(held_out, at) for at in range(0, HELD_OUT, BATCH)]
    detector = om.Detector(adapter, method="forward").fit(parts, progress=False)
    # No alarm, whose delivery takes its own time.
    options: dict[str, Any] = {"fpr": 0.1, "ert": 1e12, "calibrate": "never", "console": False}

    with tempfile.TemporaryDirectory() as folder:

        def evaluated(*callbacks: Any) -> None:
            trainer_of(model, vocabulary, folder, *callbacks).evaluate(data)

        def scored(every: int) -> None:
            more = {"detector": detector, "every_n_batches": every}
            evaluated(OODCallback(watch=["eval"], **options, **more))

        def a_pass_more() -> None:
            evaluated()
            for at in range(0, len(data), BATCH):
                detector.score(batch_of(data, at))

        runs: dict[str, Run] = {
            "evaluation, every batch scored": partial(scored, 1),
            "evaluation, one batch in ten scored": partial(scored, 10),
            "evaluation, scored by a pass of its own": a_pass_more,
        }
        evaluated()
        scored(1)
        found = ratios(evaluated, runs, rounds, processor_seconds)
        return {name: round(ratio, 3) for name, ratio in found.items()}


def main(
    quick: Annotated[bool, typer.Option(help="One model and few rounds.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Measure, print and check the claims."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    sizes = dict(list(SIZES.items())[:1]) if quick else SIZES
    pairs, batches, rounds = (3, 2, 1) if quick else (60, 20, 3)
    rows: list[dict[str, Any]] = []
    for name, size in sizes.items():
        row = {"model": name, **step_times(size, pairs), **evaluation_times(size, batches, rounds)}
        print(row, flush=True)
        rows.append(row)
    conclude({"machine": machine(), "rows": rows, "claims": claims(rows)}, json_path)


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    training = max(row["step with the training stream"] for row in rows)
    scored = max(row["evaluation, every batch scored"] for row in rows)
    return [
        claim("a training step with the training stream", training, TRAINING),
        claim("an evaluation whose every batch is scored", scored, EVALUATION),
    ]


if __name__ == "__main__":
    typer.run(main)
