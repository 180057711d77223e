"""What a Trainer trains, as an adapter: a causal language model, whole or with a tuner (PEFT)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ood_monitor import Adapter, SequenceLikelihood
from ood_monitor.adapters.base import Batch, checked_elements, map_tensors, usable_by
from ood_monitor.adapters.elements import Elements
from ood_monitor.modules import Passes, dtype_of, gradless, scored
from ood_monitor_integrations.training.loading import first

__all__ = ["IGNORED", "adapter_of_model", "check_causal"]

#: The label that transformers' losses ignore.
IGNORED = -100

_REMEDY = (
    "Give `adapter=`, an adapter or a function `(model, x) -> (B,)` of log-likelihoods in nats, or "
    "`adapter_of=`, a function that makes an adapter of the model."
)


def adapter_of_model(module: nn.Module) -> Adapter | None:
    """A model that predicts the next token, scored on the tokens that it is trained on.

    With a tuner's weights inside layers (LoRA and its kind) it is the model that these are in.

    Returns:
        The adapter; None of a module that is none of transformers, which may have a likelihood of
        its own.

    Raises:
        ValueError: It is another kind of model, or one whose tuner puts tokens of its own before
            those of a batch.
    """
    own = untuned(module)
    if not isinstance(own, PreTrainedModel):
        return None
    if not _predicts_the_next_token(own):
        raise ValueError(
            f"Expected a causal language model of transformers, got {type(own).__name__}: what of "
            f"a batch it is to find likely cannot be told. {_REMEDY}"
        )
    return SequenceLikelihood(own, ignore_index=IGNORED)


def untuned(module: nn.Module) -> nn.Module:
    """The model that a tuner (PEFT) was put into; the module itself where there is none.

    Raises:
        ValueError: The tuner puts tokens of its own before those of a batch.
    """
    base: Callable[[], nn.Module] | None = getattr(module, "get_base_model", None)
    if base is None or not hasattr(module, "peft_config"):
        return module
    config = getattr(module, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"Expected a tuner inside the layers of a model, as LoRA, got {type(config).__name__}, "
            f"which puts tokens of its own before those of a batch. {_REMEDY}"
        )
    return base()


def _predicts_the_next_token(module: PreTrainedModel) -> bool:
    """By the loss that the Trainer goes by, or by name: some have no word for their loss."""
    is_causal = LOSS_MAPPING.get(getattr(module, "loss_type", None) or "") is ForCausalLMLoss
    is_named = type(module).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return (is_causal or is_named) and not getattr(module.config, "is_encoder_decoder", False)


def check_causal(adapter: Adapter, batch: Batch) -> None:
    """Refuse a model that sees the token that it is to predict, as an encoder's head does.

    Args:
        adapter: As :func:`adapter_of_model` gives it.
        batch: Samples, of which the first is looked at.

    Raises:
        ValueError: It is one, or what it gives is not finite.
    """
    one = first(batch, 1)
    last = int((one["labels"] != IGNORED).nonzero()[-1, 1])
    other = map_tensors(torch.clone, one)
    other["input_ids"][0, last] = other["labels"][0, last] = int(one["input_ids"][0, last] == 0)
    before, after = (_log_probabilities(adapter, each) for each in (one, other))
    if not before.isfinite().all():
        raise ValueError(
            f"Expected finite log-likelihoods of tokens, got {type(adapter.module).__name__} with "
            f"{int((~before.isfinite()).sum())} of {len(before)} that are not: its weights may not "
            "be finite, or a token that is scored is impossible under it."
        )
    kept = slice(0, -1)  # the last that is scored is the one that was changed
    rounding = 8 * torch.finfo(dtype_of(adapter.module)).eps
    if not torch.allclose(before[kept], after[kept], rtol=rounding, atol=rounding):
        raise ValueError(
            f"Expected a causal language model, got {type(adapter.module).__name__}, whose "
            "predictions change with tokens that come later: a decoder may have to be told, as by "
            f"`is_decoder=True` in its config. {_REMEDY}"
        )


def _log_probabilities(adapter: Adapter, batch: Batch) -> Tensor:
    """Of the tokens of one text that are scored, (K,)."""

    def found(passes: Passes[Adapter]) -> Tensor:
        own = usable_by(adapter.module, batch)
        [(_, elements)] = gradless(adapter, lambda: list(checked_elements(passes.fresh(), own)))
        assert isinstance(elements, Elements)
        assert elements.counted is not None
        return elements.log_prob[elements.counted].detach().float()

    return scored(found, adapter, adapter.module)
