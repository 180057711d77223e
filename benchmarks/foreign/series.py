"""Forecasters of gluonts: the likelihood of a series' future given its past."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.foreign.case import Case, Density, Foreign

__all__ = ["CASES"]

PAST, FUTURE = 24, 12
#: Of models of several series at once.
VARIABLES = 3


def log_prob(net: Any, b: dict[str, Tensor]) -> Tensor:
    loss: Tensor = net.loss(**b)
    return -loss.flatten(1).sum(1) if loss.ndim > 1 else -loss


def forecaster(
    batch: int, *, module: str, name: str, past: int = PAST, future: int = FUTURE, **options: Any
) -> Case:
    """A model, and what it says that it takes."""
    import importlib

    models = importlib.import_module(f"gluonts.torch.model.{module}.module")
    net = getattr(models, name)(context_length=past, prediction_length=future, **options)
    shapes = {key: spec.shape for key, spec in net.describe_inputs(batch).items()}
    several = (VARIABLES,) if -1 in shapes["past_target"] else ()
    shapes |= dict.fromkeys(("future_target", "future_observed_values"), (batch, future, *several))
    samples = {
        key: values(key, *(VARIABLES if n == -1 else n for n in shape))
        for key, shape in shapes.items()
        if 0 not in shape
    }
    return Density(net, log_prob), samples


def values(key: str, *shape: int) -> Tensor:
    """Whole numbers, numbers around one, or which values were seen: nine in ten."""
    if key.endswith("_cat"):
        return torch.randint(3, shape)
    if key.endswith("observed_values"):
        return (torch.rand(shape) < 0.9).float()
    return 1 + torch.randn(shape)


def student() -> Any:
    from gluonts.torch.distributions import StudentTOutput

    return StudentTOutput()


def deepar(batch: int, *, hidden: int = 40, **sizes: int) -> Case:
    options: dict[str, Any] = {"freq": "D", "num_feat_static_cat": 1, "cardinality": [3]}
    lags: dict[str, Any] = {"lags_seq": [1, 2, 7], "hidden_size": hidden}
    return forecaster(
        batch, module="deepar", name="DeepARModel", **options | lags, dropout_rate=0.0, **sizes
    )


def tft(batch: int, *, hidden: int = 32, **sizes: int) -> Case:
    return forecaster(
        batch,
        module="tft",
        name="TemporalFusionTransformerModel",
        d_hidden=hidden,
        d_var=hidden,
        c_feat_static_cat=[3],
        d_feat_static_real=[1],
        d_feat_dynamic_real=[2],
        distr_output=student(),
        **sizes,
    )


def tide(batch: int, **sizes: int) -> Case:
    widths = ("feat_proj", "encoder", "decoder", "temporal", "distr")
    return forecaster(
        batch,
        module="tide",
        name="TiDEModel",
        num_feat_dynamic_real=2,
        num_feat_dynamic_proj=2,
        num_feat_static_real=1,
        num_feat_static_cat=1,
        cardinality=[3],
        embedding_dimension=[4],
        **{f"{width}_hidden_dim": 16 for width in widths},
        decoder_output_dim=8,
        dropout_rate=0.0,
        num_layers_encoder=2,
        num_layers_decoder=2,
        layer_norm=True,
        distr_output=student(),
        scaling="mean",
        **sizes,
    )


def transformer(batch: int, *, module: str, name: str, **options: Any) -> Case:
    shape: dict[str, Any] = {
        "d_model": 16,
        "nhead": 2,
        "dim_feedforward": 32,
        "dropout": 0.0,
        "activation": "relu",
        "norm_first": False,
        "num_encoder_layers": 2,
        "scaling": "mean",
    }
    return forecaster(batch, module=module, name=name, **shape | options)


def simple(batch: int, *, module: str, name: str, **options: Any) -> Case:
    return forecaster(batch, module=module, name=name, **options)


def wavenet(batch: int, *, bins: int = 64, channels: int = 24) -> Case:
    """On values in bins."""
    from gluonts.torch.model.wavenet.module import WaveNet

    edges = torch.linspace(-2, 2, bins).tolist()
    sizes = {"num_residual_channels": channels, "num_skip_channels": 32}
    net = WaveNet(FUTURE, edges, **sizes, dilation_depth=4, num_stacks=1, cardinality=[3])
    past = net.receptive_field
    samples = {
        "feat_static_cat": torch.randint(3, (batch, 1)),
        "feat_static_real": torch.randn(batch, 1),
        "past_target": torch.randint(bins, (batch, past)),
        "past_observed_values": torch.ones(batch, past),
        "past_time_feat": torch.randn(batch, 1, past),
        "future_time_feat": torch.randn(batch, 1, FUTURE),
        "future_target": torch.randint(bins, (batch, FUTURE)),
        "future_observed_values": torch.ones(batch, FUTURE),
        "scale": 1 + torch.rand(batch, 1),
    }
    return Density(net, log_prob), samples


SMALL = {"past": 8, "future": 4}
PATCHES = {"patch_len": 4, "stride": 2, "padding_patch": "end", "num_feat_dynamic_real": 0}

CASES: tuple[Foreign, ...] = (
    Foreign("DeepAR", "gluonts", deepar, 16, 6, SMALL | {"hidden": 6}),
    Foreign("TFT", "gluonts", tft, 16, 4, SMALL | {"hidden": 8}),
    Foreign("TiDE", "gluonts", tide, small=SMALL),
    Foreign("WaveNet", "gluonts", wavenet, 16, small={"bins": 8, "channels": 6}),
    Foreign(
        "PatchTST",
        "gluonts",
        partial(transformer, module="patch_tst", name="PatchTSTModel", **PATCHES),
        small=SMALL,
    ),
    Foreign(
        "iTransformer",
        "gluonts",
        partial(transformer, module="i_transformer", name="ITransformerModel"),
        small=SMALL,
    ),
    Foreign(
        "DLinear",
        "gluonts",
        partial(simple, module="d_linear", name="DLinearModel", hidden_dimension=20),
        small=SMALL,
    ),
)
