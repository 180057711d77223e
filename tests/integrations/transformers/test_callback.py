"""What the callback finds: detectors in checkpoints, scores of completions, foreign texts."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_monitor_integrations.accelerate.forward import plain_forward
from ood_monitor_integrations.transformers import OODCallback, unpacked
from support.transformers_cases import (
    PROMPT,
    Texts,
    callback,
    collated,
    gpt2,
    llama,
    lora,
    trainer,
)
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import (
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    LlamaModel,
    TrainerCallback,
)

import ood_monitor as om
from ood_monitor.saving.checkpoints import folder_inside, states_of
from ood_monitor.saving.fitted import CONFIG, Fitted, digest


def fitted_of(checkpoint: Path, name: str = "OODMonitor") -> Fitted:
    (state,) = states_of(checkpoint, name)
    return Fitted.parse(state["config"], state["tensors"])[0]


def has_detector(checkpoint: Path) -> bool:
    return (folder_inside(checkpoint) / CONFIG).is_file()


def adapter_of(model: nn.Module) -> om.SequenceLikelihood:
    return om.SequenceLikelihood(model, ignore_index=-100)


# Detectors and checkpoints


def test_each_checkpoint_has_the_detector_of_its_weights(tmp_path: Path) -> None:
    run = trainer(llama(), tmp_path, callback(calibrate="every checkpoint"))
    run.train()
    for step in (6, 12):
        folder = tmp_path / f"checkpoint-{step}"
        model = LlamaForCausalLM.from_pretrained(folder)
        assert fitted_of(folder).model == digest(model)
        detector = om.Detector.from_checkpoint(folder, adapter_of(model))
        assert not detector.is_stale


#: The loss falls.
FIRST_IS_BEST: dict[str, Any] = {"metric_for_best_model": "eval_loss", "greater_is_better": True}

#: What is asked for, and which of two checkpoints have a detector; the first is the best.
POLICIES: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "every": ({"calibrate": "every checkpoint"}, [True, True]),
    "last": ({"calibrate": "last"}, [False, True]),
    "best": ({"calibrate": "best"}, [True, True]),
    "never": ({"calibrate": "never"}, [False, False]),
    "default": ({}, [True, True]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_which_checkpoints_have_a_detector(name: str, tmp_path: Path) -> None:
    options, expected = POLICIES[name]
    run = trainer(llama(), tmp_path, callback(**options), **FIRST_IS_BEST)
    run.train()
    assert run.state.best_global_step == 6
    found = [has_detector(tmp_path / f"checkpoint-{step}") for step in (6, 12)]
    assert found == expected


def test_the_best_model_is_watched_by_its_own_detector(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch, load_best_model_at_end=True, **FIRST_IS_BEST)
    run.train()
    best = tmp_path / "checkpoint-6"
    assert run.state.best_model_checkpoint == str(best)
    run.predict(Texts(40, 7))
    assert watch.detector is not None
    assert watch.detector.fitted.fingerprint == fitted_of(best).fingerprint
    assert not watch.detector.is_stale


@pytest.mark.slow
def test_a_loaded_checkpoint_is_watched_by_its_detector(tmp_path: Path) -> None:
    trainer(llama(), tmp_path, callback()).train()
    folder = tmp_path / "checkpoint-12"
    watch = callback(detector=folder)
    metrics = (
        trainer(LlamaForCausalLM.from_pretrained(folder), tmp_path / "b", watch)
        .predict(Texts(40, 7, foreign=True))
        .metrics
    )
    assert metrics is not None
    assert metrics["test_ood_status"] == 2
    assert [alert.kind for alert in watch.alerts][-1] == "drift"


@pytest.mark.slow
def test_a_training_that_goes_on_has_the_detector_and_the_stream_of_before(tmp_path: Path) -> None:
    first = callback(watch=["train", "predict"])
    trainer(llama(), tmp_path, first, num_train_epochs=1).train()
    second = callback(watch=["train", "predict"], calibrate="never")
    run = trainer(llama(), tmp_path, second, num_train_epochs=1)
    run.train(resume_from_checkpoint=True)  # of which no step is left
    assert second._training.state_dict() == first._training.state_dict() != {}
    run.predict(Texts(40, 7))
    assert second.detector is not None
    assert second.detector.fitted.fingerprint == fitted_of(tmp_path / "checkpoint-6").fingerprint


@pytest.mark.slow
def test_a_training_begins_after_an_evaluation_and_after_another_training(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch, num_train_epochs=1)
    run.evaluate()
    for _ in range(2):
        run.train()
    assert watch.detector is not None
    assert run.model is not None
    assert watch.detector.fitted.model == digest(run.model)


@pytest.mark.slow
@pytest.mark.parametrize("is_given", [False, True], ids=["evaluated", "held out"])
def test_data_that_are_trained_on_are_told(is_given: bool, tmp_path: Path) -> None:
    trained_on: Any = Texts(96, 2)
    watch = callback(held_out=trained_on if is_given else None)
    run = trainer(llama(), tmp_path, watch, num_train_epochs=1)
    run.train_dataset = trained_on
    run.eval_dataset = run.eval_dataset if is_given else trained_on
    with pytest.warns(UserWarning, match="calibrates on the data that the model is trained on"):
        run.train()


@pytest.mark.slow
def test_deleted_checkpoints_take_their_detectors_with_them(tmp_path: Path) -> None:
    watch = callback(calibrate="every checkpoint")
    trainer(llama(), tmp_path, watch, save_total_limit=1, num_train_epochs=3).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-18"]
    assert has_detector(tmp_path / "checkpoint-18")


# What is scored


def scored(watch: OODCallback, stage: str = "predict") -> Tensor:
    return watch.scores(stage).log_likelihood


@pytest.mark.parametrize(
    ("make", "bf16"),
    [
        pytest.param(llama, False, id="llama"),
        pytest.param(gpt2, False, id="gpt2", marks=pytest.mark.slow),
        pytest.param(lora, True, id="lora, bf16", marks=pytest.mark.slow),
    ],
)
def test_completions_alone_are_scored(
    make: Callable[[], nn.Module], bf16: bool, tmp_path: Path
) -> None:
    """Against a loop over texts, in double precision."""
    watch, texts = callback(), Texts(40, 7)
    run = trainer(make(), tmp_path, watch, num_train_epochs=1, bf16=bf16)
    run.train()
    run.predict(texts)
    model = copy.deepcopy(run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False))
    model.double().eval()
    expected = []
    for text in texts.rows:
        with torch.no_grad():
            log_prob = model(input_ids=text[None]).logits[0].log_softmax(-1)
        rows = range(PROMPT, len(text))
        expected.append(sum(float(log_prob[t - 1, text[t]]) for t in rows))
    np.testing.assert_allclose(scored(watch), expected, rtol=1e-4)
    assert watch.recorded("predict").dataset_index.tolist() == [*range(40)]


@pytest.mark.slow
def test_packed_texts_are_scored_as_they_are_alone(tmp_path: Path) -> None:
    found = []
    for collator in (collated, DataCollatorWithFlattening()):
        watch = callback(detector=om.Detector(adapter_of(llama().eval())), held_out=Texts(96, 2))
        run = trainer(model := llama().eval(), tmp_path, watch)
        run.data_collator = collator
        watch.calibrate(model, DataLoader(Texts(96, 2), 16, collate_fn=collated))
        run.args.remove_unused_columns = False
        run.predict(Texts(40, 7))
        assert watch.failures == 0
        found.append(scored(watch))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


#: Texts in rows, and what comes of them: rows, and whether they are refused.
PACKS: dict[str, tuple[dict[str, list[list[int]]], list[list[int]] | str]] = {
    "two in a row": (
        {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 2, 0, 1]]},
        [[5, 6, 7], [8, 9, 0]],
    ),
    "filled up": (
        {
            "input_ids": [[5, 6, 7, 0], [8, 9, 3, 4]],
            "position_ids": [[0, 0, 1, 0], [0, 1, 2, 0]],
            "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        },
        [[5, 0, 0], [6, 7, 0], [8, 9, 3], [4, 0, 0]],
    ),
    "from two on": (
        {"input_ids": [[5, 6, 7]], "position_ids": [[2, 3, 2]]},
        [[5, 6], [7, 0]],
    ),
    "one a row": ({"input_ids": [[5, 6]], "position_ids": [[0, 1]]}, [[5, 6]]),
    "no positions": ({"input_ids": [[5, 6]]}, [[5, 6]]),
    "skipped": ({"input_ids": [[5, 6, 7]], "position_ids": [[0, 2, 3]]}, "count the tokens"),
    "shape": ({"input_ids": [[5, 6, 7]], "position_ids": [[0, 1]]}, "tokens' shape"),
}


@pytest.mark.parametrize("name", PACKS)
def test_packed_texts_are_taken_apart(name: str) -> None:
    given, expected = PACKS[name]
    batch = {key: torch.tensor(rows) for key, rows in given.items()}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            unpacked(batch)
        return
    assert unpacked(batch)["input_ids"].tolist() == expected


class Truncated(Texts):
    """Of which some have lost their completion."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {k: v[:PROMPT] for k, v in row.items()} if index % 5 == 1 else row


def test_samples_without_a_token_to_score_are_left_out_and_told(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch)
    run.train()
    with pytest.warns(UserWarning, match="leaves out samples of whose tokens none is trained on"):
        run.predict(Truncated(40, 7))
    kept = [index for index in range(40) if index % 5 != 1]
    assert watch.recorded("predict").dataset_index.tolist() == kept
    alone = (
        watch.detector.score(collated([Texts(40, 7)[i] for i in kept])) if watch.detector else None
    )
    assert alone is not None
    np.testing.assert_allclose(watch.scores("predict").score, alone.score, rtol=1e-3)


# Evaluations


class LeftPadded(Texts):
    """Of one length, with padding before the text, as for generation."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {k: F.pad(v, (2, 0), value=-100 if k == "labels" else 0) for k, v in row.items()}


def left_collated(rows: Any) -> dict[str, Tensor]:
    batch = collated(rows)
    batch["attention_mask"][:, :2] = 0
    return batch


#: Texts and their collator, the Trainer's options, and passes of the model of three batches.
EVALUATED: dict[str, tuple[type[Texts], Any, dict[str, Any], int]] = {
    "padded on the right": (Texts, collated, {}, 4),  # the first is not known to be watched
    "padded on the left": (LeftPadded, left_collated, {}, 6),
    "bf16": (Texts, collated, {"bf16": True}, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_is_scored_by_its_own_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, collator, options, expected = EVALUATED[name]
    watch = callback()
    run = trainer(llama(), tmp_path, watch, num_train_epochs=1, **options)
    run.train()
    run.data_collator = collator
    run.predict(Texts(2, 1))  # of two samples alone it is seen how a batch's rows lie
    run.predict(kind(48, 7))
    passes, forward = list[int](), LlamaModel.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "forward", counting)
        run.predict(kind(48, 7))
    assert len(passes) == expected
    assert watch.failures == 0
    assert watch.detector is not None
    texts = [kind(48, 7)[index] for index in range(48)]
    with plain_forward(run.model):
        alone = [watch.detector.score(collator(texts[i : i + 16])) for i in (0, 16, 32)]
    scores = watch.scores("predict")
    np.testing.assert_allclose(scores.score, torch.cat([s.score for s in alone]), rtol=1e-3)
    np.testing.assert_allclose(scores.p_value, torch.cat([s.p_value for s in alone]), rtol=1e-3)


def test_an_evaluation_of_another_trainer_is_not_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path / "watched", watch, num_train_epochs=1)
    run.train()
    run.predict(Texts(48, 7))
    listened = list[int]()
    monkeypatch.setattr(om.Detector, "live", lambda *_: listened.append(1))
    trainer(run.model, tmp_path / "plain").predict(Texts(48, 7))
    assert not listened
    names = [name for name, part in run.model.named_modules() if part._forward_pre_hooks]
    assert names == [""]  # which waits for the next


def test_foreign_texts_raise_an_alert_and_the_same_do_not(tmp_path: Path) -> None:
    watch = callback(watch=["eval"], fpr=0.01, calibrate_samples=400, held_out=Texts(300, 5))
    run = trainer(llama(), tmp_path, watch, num_train_epochs=6)
    with pytest.warns(UserWarning, match="does not watch evaluations of the training"):
        run.train()
    usual = run.evaluate(Texts(64, 6), metric_key_prefix="usual")
    foreign = run.evaluate(Texts(64, 6, foreign=True), metric_key_prefix="foreign")
    assert (usual["usual_ood_status"], foreign["foreign_ood_status"]) == (0, 2)
    assert foreign["foreign_ood_flagged_rate"] > 0.8 > 0.1 > usual["usual_ood_flagged_rate"]
    assert {alert.stream for alert in watch.alerts} == {"OODMonitor/foreign"}


@pytest.mark.slow
def test_evaluations_of_a_training_are_watched_with_data_of_their_own(tmp_path: Path) -> None:
    watch = callback(watch=["eval"], held_out=Texts(64, 5), calibrate_every_n_evaluations=1)
    run = trainer(llama(), tmp_path, watch, metric_for_best_model="ood_score_mean")
    run.eval_dataset = {"a": Texts(32, 2), "b": Texts(32, 3)}
    run.args.metric_for_best_model = "eval_b_ood_flagged_rate"
    run.train()
    assert run.state.best_metric is not None
    assert watch.failures == 0
    assert [len(watch.recorded(f"eval_{name}")) for name in "ab"] == [32, 32]


@pytest.mark.slow
def test_an_evaluation_of_what_has_calibrated_is_told(tmp_path: Path) -> None:
    watch = callback(watch=["eval", "predict"], calibrate="last")
    run = trainer(llama(), tmp_path, watch)
    with pytest.warns(UserWarning, match="does not watch evaluations of the training"):
        run.train()
    with pytest.warns(UserWarning, match="has scored the samples that calibrated its detector"):
        run.evaluate()


@pytest.mark.slow
def test_weights_that_were_written_to_are_told_as_stale(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch)
    run.train()
    assert run.model is not None
    with torch.no_grad():
        next(run.model.parameters()).mul_(1.5)
    with pytest.warns(UserWarning, match="watches with a stale calibration: the model has other"):
        run.predict(Texts(40, 7))
    assert "stale_calibration" in [alert.kind for alert in watch.alerts]


@pytest.mark.slow
def test_an_evaluation_that_fails_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch)
    run.train()

    class Broken(Texts):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if index > 20:
                raise RuntimeError("broken")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="broken"):
        run.predict(Broken(40, 7))
    run.predict(Texts(40, 8))
    assert len(watch.recorded("predict")) == 40


@pytest.mark.slow
def test_a_batch_that_cannot_be_scored_is_counted_and_the_training_goes_on(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch)
    run.train()

    class Shifted(Texts):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return {**row, "labels": row["labels"].roll(1)} if index < 16 else row

    with pytest.warns(UserWarning, match="could not score a batch: Expected labels that are the"):
        metrics = run.predict(Shifted(40, 7)).metrics or {}
    assert (watch.failures, metrics["test_ood_invalid"], metrics["test_ood_status"]) == (1, 16, 2)
    recorded = watch.recorded("predict")
    assert recorded.dataset_index.tolist() == [*range(40)]
    assert recorded.scores.valid.tolist() == [False] * 16 + [True] * 24


@pytest.mark.slow
def test_a_sample_that_cannot_be_scored_costs_the_others_nothing(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch, num_train_epochs=1)
    run.train()
    run.predict(Texts(40, 7))
    expected = watch.scores("predict").score

    class Shifted(Texts):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return {**row, "labels": row["labels"].roll(1)} if index == 20 else row

    with pytest.warns(UserWarning, match="could not score samples"):
        run.predict(Shifted(40, 7))
    found = watch.scores("predict")
    assert found.valid.nonzero().flatten().tolist() == [i for i in range(40) if i != 20]
    np.testing.assert_allclose(found.score[found.valid], expected[found.valid], rtol=1e-3)


@pytest.mark.slow
def test_rows_of_another_order_are_those_of_the_predictions(tmp_path: Path) -> None:
    watch = callback()
    grouped = {"train_sampling_strategy": "group_by_length"}
    run = trainer(llama(), tmp_path, watch, num_train_epochs=1, **grouped)
    run.train()
    with pytest.warns(UserWarning, match="numbers samples as they are loaded"):
        labels = run.predict(Texts(40, 7)).label_ids
    lengths = (np.asarray(labels) != -100).sum(1)
    assert lengths.tolist() != [len(row) - PROMPT for row in Texts(40, 7).rows]
    assert watch.detector is not None
    texts = {tuple(row[PROMPT:].tolist()): i for i, row in enumerate(Texts(40, 7).rows)}
    order = [texts[tuple(row[row != -100].tolist())] for row in np.asarray(labels)]
    alone = watch.detector.score(collated([Texts(40, 7)[index] for index in order]))
    recorded = watch.recorded("predict")
    found = recorded.scores.score[torch.from_numpy(recorded.dataset_index.argsort())]
    np.testing.assert_allclose(found, alone.score, rtol=1e-3)


class Interrupting(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_prediction_after_an_interrupted_training_is_watched(tmp_path: Path) -> None:
    watch = callback(calibrate="every checkpoint")
    run = trainer(llama(), tmp_path, watch, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.warns(UserWarning, match="watches with a stale calibration"):
        run.predict(Texts(40, 7))
    assert len(watch.recorded("predict")) == 40


class Predicting(TrainerCallback):
    run: Any = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.predict(Texts(40, 7))


@pytest.mark.slow
def test_a_prediction_within_a_training_is_not_watched_and_told(tmp_path: Path) -> None:
    watch, predicting = callback(), Predicting()
    run = predicting.run = trainer(llama(), tmp_path, watch, predicting)
    with pytest.warns(UserWarning, match="has not watched a prediction: it ran within a training"):
        run.train()
    assert [*watch._failures.counts] == ["has not watched a prediction"]


@pytest.mark.slow
def test_an_evaluation_of_which_nothing_is_scored_is_not_ok(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(llama(), tmp_path, watch, num_train_epochs=1, label_smoothing_factor=0.1)
    run.train()
    with pytest.warns(UserWarning, match="given no labels: where they are in the data, `label_sm"):
        metrics = run.predict(Texts(40, 7)).metrics or {}
    assert (metrics["test_ood_invalid"], metrics["test_ood_status"]) == (40, 2)
    run.label_smoother = None
    assert (run.predict(Texts(40, 7)).metrics or {})["test_ood_invalid"] == 0


# The model is left alone


@pytest.mark.slow
def test_copies_of_a_model_tell_nobody(tmp_path: Path) -> None:
    watch = callback()
    run = trainer(model := llama(), tmp_path, watch)
    run.train()
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301
    other.eval()(**collated([Texts(2, 1)[0]]))
    assert watch._evaluations.given() == []
    assert model.state_dict().keys() == llama().state_dict().keys()


# The training stream


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_foreign_shard_is_flagged_while_it_is_trained_on(clip: float, tmp_path: Path) -> None:
    stream = om.TrainingStream(warm_up=20, half_life=20, threshold=2)
    watch = callback(watch=["train"], training=stream)
    run = trainer(llama(), tmp_path, watch, max_grad_norm=clip, num_train_epochs=1)
    run.train_dataset = ConcatDataset([Texts(400, 1), Texts(16, 1, foreign=True)])
    run.args.train_sampling_strategy = "sequential"
    run.train()
    assert {batch.batch_idx for batch in watch.flagged_batches} == {50, 51}
    assert watch._failures.counts == {}


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, lora])
def test_gradients_are_seen_as_they_were_before_they_were_clipped(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    seen: list[list[float]] = []
    for clip in (1e-3, 1e9):
        watch = callback(watch=["train"])
        norms: list[float] = []
        take = watch._training._score
        watch._training._score = lambda which, found, take=take, norms=norms: (  # type: ignore[method-assign,misc]
            norms.append(sum(found.values())),
            take(which, found),
        )[1]
        run = trainer(make(), tmp_path, watch, max_grad_norm=clip, max_steps=1)
        run.train()
        seen.append(norms)
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-4)


# What is refused


class Encoder(nn.Module):
    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Any:
        return {"loss": input_ids.float().mean()}


def bert(*, is_decoder: bool) -> nn.Module:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, intermediate_size=16, is_decoder=is_decoder, **sizes)
    return BertLMHeadModel(config)


def masked_bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=32, intermediate_size=16, **sizes))


def not_finite() -> nn.Module:
    model = llama()
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    return model


def prompt_tuned() -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(llama(), config)


#: Models and the Trainer's and the callback's options, and what is said before the first step.
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], str]] = {
    "no likelihood": (Encoder, {}, {}, "Expected a module with `log_prob`"),
    "another loss": (masked_bert, {}, {}, "a causal language model of transformers, got BertFor"),
    "not causal": (lambda: bert(is_decoder=False), {}, {}, "predictions change with tokens"),
    "prompt tuning": (prompt_tuned, {}, {}, "a tuner inside the layers of a model"),
    "never evaluates": (llama, {"eval_strategy": "no"}, {}, "`held_out=` where the Trainer never"),
    "not finite": (not_finite, {}, {}, "Expected finite log-likelihoods of tokens, got Llama"),
    "too few": (llama, {}, {"held_out": Texts(12, 1)}, "calibration"),
    "no detector there": (llama, {}, {"detector": "nowhere"}, "no checkpoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_monitored_is_refused_before_the_first_step(
    name: str, tmp_path: Path
) -> None:
    make, arguments, options, told = REFUSED[name]
    watch = callback(**options)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        trainer(make(), tmp_path, watch, **arguments).train()
    lenient = callback(**options, strict=False)
    if name == "too few":
        with pytest.warns(UserWarning, match="OODMonitor could not be calibrated"):
            trainer(make(), tmp_path, lenient, num_train_epochs=1, **arguments).train()
        assert lenient.detector is None


@pytest.mark.slow
def test_a_decoder_of_another_name_is_causal(tmp_path: Path) -> None:
    watch = callback()
    trainer(bert(is_decoder=True), tmp_path, watch, num_train_epochs=1).train()
    assert watch.detector is not None


#: Options of the callback that mean nothing, and what is said.
OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "stage": ({"watch": ["test"]}, ValueError, "Expected stages of train, eval, predict"),
    "every": ({"calibrate_every_n_evaluations": 1}, ValueError, "Expected `held_out=` with"),
    "two adapters": (
        {"adapter": lambda m, x: x, "adapter_of": adapter_of},
        ValueError,
        "Expected `adapter_of=` alone",
    ),
    "method": ({"method": "forward", "detector": "x"}, ValueError, "Expected `method=` or a"),
    "iterator": ({"held_out": iter([])}, TypeError, "got an iterator"),
    "stream": ({"training": 3}, TypeError, "Expected training as a TrainingStream"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_mean_nothing_are_refused(name: str) -> None:
    options, kind, told = OPTIONS[name]
    with pytest.raises(kind, match=told):
        OODCallback(**options)
