"""Models and batches, as data: every test of what holds for all models runs over `MODELS`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ood_monitor as om
from support.foreign_cases import FOREIGN
from support.model_case import Case, Function, Gaussian, Model

__all__ = ["HEAVY", "MODELS", "Function", "Gaussian", "Model", "model", "slow_if_heavy"]


class Scale(torch.autograd.Function):
    """x * w, written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


# Small networks


def function(forward: Callable[..., Tensor], *shape: int, **parts: Tensor | nn.Module) -> Case:
    return Gaussian(Function(forward, **parts)), torch.randn(4, *(shape or (3,)))


def layer(make: Callable[[], nn.Module], *shape: int) -> Case:
    """A layer on inputs of this shape, which a linear map of their last dimension gives."""
    before = nn.Linear(shape[-1], shape[-1]), nn.Tanh(), nn.Dropout(0.5)
    return Gaussian(nn.Sequential(*before, make(), nn.Tanh())), torch.randn(4, *shape)


def mlp(*shape: int) -> Case:
    hidden = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh()
    return Gaussian(nn.Sequential(*hidden, nn.Linear(4, 2))), torch.randn(4, *shape, 3)


def looking_up(make: Callable[..., nn.Module], **options: Any) -> Case:
    net = nn.Sequential(make(11, 6, **options), nn.Linear(6, 2))
    return Gaussian(net), torch.randint(11, (4, 7))


def tied() -> Case:
    def logits(m: Any, tokens: Tensor) -> Tensor:
        return F.linear(m.embedding(tokens).tanh(), m.embedding.weight, m.bias)

    net = Function(logits, embedding=nn.Embedding(11, 6), bias=torch.zeros(11))
    return om.SequenceLikelihood(net), torch.randint(11, (4, 7))


def attention(
    *, batch_first: bool = False, masked: bool = False, across: bool = False, **options: Any
) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        masks = {}
        if masked:
            padding = (x[..., 0] > 1) & (torch.arange(5, device=x.device) > 0)
            masks = {"key_padding_mask": padding, "attn_mask": x.new_ones(5, 5).triu(1).bool()}
        query = x if batch_first else x.transpose(0, 1)
        others = (query[..., :kdim].cos(), query[..., :vdim].sin()) if across else (query, query)
        y, weights = m.attention(query, *others, need_weights=masked, **masks)
        y = y if batch_first else y.transpose(0, 1)
        return m.out(y) if weights is None else torch.cat([m.out(y), weights], 2)

    kdim, vdim = options.get("kdim", 4), options.get("vdim", 4)
    net = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
    return function(forward, 5, 4, attention=net, out=nn.Linear(4, 2))


def transformer() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    return Gaussian(net, lambda net, x: net(x, mask.to(x), is_causal=True)), torch.randn(4, 5, 4)


def shifts_and_scales(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x + m.position) * m.gain
    return torch.add(x, (m.shift - h) / (1 + m.temperature**2)).sub(m.last, alpha=2)


def with_class_token(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.cat([m.token.expand(len(x), -1, -1), m.linear(x)], 1))


def with_a_time_embedding(m: Any, x: Tensor) -> Tensor:
    """A time that is a number, expanded to the batch: rows for each sample, but not of its data."""
    t = 50 * x.new_ones(len(x), 1)
    embedding = m.embed((t / torch.arange(1, 7).to(x)).sin()).tanh()
    shift, scale = m.shift(embedding)[:, :, None, None], m.scale(embedding)[:, :, None, None]
    return m.conv(x * (1 + scale) + shift)


def written_into_zeros(m: Any, x: Tensor) -> Tensor:
    canvas = x.new_zeros(len(x), 5)
    canvas[:, :3] = m.linear(x)
    return m.out(canvas)


def changed_after_use(m: Any, x: Tensor) -> Tensor:
    h = m.linear(x)
    y = h + m.shift
    return y + h.mul_(2)


def score_of_an_energy(m: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(m.energy(x).tanh().sum(), x, create_graph=True)[0] + m.shift


def through_experts(m: Any, x: Tensor) -> Tensor:
    """Each position of a sample goes to one of two experts, as its values say."""
    tokens, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    first = tokens[:, 0] > 0
    out[first], out[~first] = m.one(tokens[first]), m.two(tokens[~first])
    return out.reshape(x.shape)


def recurrent(kind: Callable[..., nn.Module], **options: Any) -> Case:
    """With states that start at zero, and again with those that it ended with."""
    width = 4 * (1 + options.get("bidirectional", False))
    first = options.get("batch_first", False)

    def forward(m: Any, x: Tensor) -> Tensor:
        y, state = m.layer(m.f(x if first else x.transpose(0, 1)))
        y = (y + m.layer(m.f(x.sin() if first else x.sin().transpose(0, 1)), state)[0]).tanh()
        return m.out(y if first else y.transpose(0, 1))

    return function(
        forward, 5, 3, f=nn.Linear(3, 3), layer=kind(3, 4, **options), out=nn.Linear(width, 2)
    )


def stepwise(kind: Callable[..., nn.Module]) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        for each in x.unbind(1):
            state = m.cell(each, state)
        return m.out(state[0] if isinstance(state, tuple) else state)

    return function(forward, 5, 3, cell=kind(3, 4), out=nn.Linear(4, 2))


#: A recurrent layer, a name and its options.
RECURRENT: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *((kind, "first", {"batch_first": True}) for kind in ("LSTM", "GRU", "RNN")),
    *((kind, "time-first", {"bidirectional": True}) for kind in ("LSTM", "GRU")),
    ("LSTM", "dropout", {"num_layers": 2, "dropout": 0.5, "batch_first": True}),
    ("LSTM", "deep", {"num_layers": 2, "bidirectional": True}),
    ("GRU", "plain", {"num_layers": 2, "bias": False}),
    ("RNN", "relu", {"nonlinearity": "relu", "bidirectional": True, "batch_first": True}),
)

# All

POINTWISE_PARTS = {
    "position": (1, 5, 3),
    "gain": (3,),
    "shift": (5, 1),
    "temperature": (),
    "last": (1, 1, 3),
}


def parts(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def of_layer(name: str, *shape: int, make: Callable[[], nn.Module], looped: bool = False) -> Model:
    return Model(name, partial(layer, make, *shape), ("3.*",) if looped else ())


MODELS: tuple[Model, ...] = (
    Model("linear-2d", mlp),
    Model("linear-3d", lambda: mlp(5)),
    Model("linear-4d", lambda: mlp(2, 3)),
    of_layer("conv1d", 3, 8, make=lambda: nn.Conv1d(3, 4, 3)),
    of_layer("conv2d", 3, 6, 6, make=lambda: nn.Conv2d(3, 4, 3, bias=False)),
    of_layer("conv3d", 3, 3, 4, 4, make=lambda: nn.Conv3d(3, 4, 3, padding=1)),
    of_layer("conv-1x1", 3, 4, 4, make=lambda: nn.Conv2d(3, 6, 1)),
    of_layer("conv-wide", 16, 3, 3, make=lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1)),
    of_layer("conv-stride", 3, 6, 6, make=lambda: nn.Conv2d(3, 4, 3, (2, 1), (1, 2))),
    of_layer("conv-dilation", 3, 6, 6, make=lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1))),
    of_layer("conv-valid", 3, 6, 6, make=lambda: nn.Conv2d(3, 4, 3, padding="valid")),
    of_layer(
        "conv-same", 3, 6, 6, make=lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=2)
    ),
    *(
        of_layer(
            f"conv-{mode}",
            *(3, 6, 6),
            make=partial(nn.Conv2d, 3, 4, 3, padding=(2, 1), padding_mode=mode),
        )
        for mode in ("circular", "reflect", "replicate")
    ),
    of_layer("conv-groups", 4, 6, 6, make=lambda: nn.Conv2d(4, 6, 3, groups=2)),
    of_layer("conv-depthwise", 3, 6, 6, make=lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3)),
    of_layer("transposed-1d", 3, 6, make=lambda: nn.ConvTranspose1d(3, 4, 3)),
    of_layer("transposed-2d", 4, 5, 5, make=lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2)),
    of_layer("transposed-3d", 3, 2, 3, 3, make=lambda: nn.ConvTranspose3d(3, 2, 2)),
    of_layer("group-norm", 4, 3, 3, make=lambda: nn.GroupNorm(2, 4)),
    of_layer("group-norm-2d", 8, make=lambda: nn.GroupNorm(2, 8)),
    of_layer("layer-norm", 5, 6, make=lambda: nn.LayerNorm(6)),
    of_layer("layer-norm-2d", 2, 3, 4, make=lambda: nn.LayerNorm((3, 4), bias=False)),
    of_layer("rms-norm", 5, 6, make=lambda: nn.RMSNorm(6)),
    of_layer("rms-norm-diffusers", 5, 6, make=lambda: RMSNorm(6, 1e-6, bias=True)),
    of_layer("batch-norm-1d", 4, make=lambda: nn.BatchNorm1d(4)),
    of_layer("batch-norm-2d", 4, 3, 3, make=lambda: nn.BatchNorm2d(4)),
    of_layer("batch-norm-plain", 4, 3, 3, make=lambda: nn.BatchNorm2d(4, affine=False)),
    of_layer("instance-norm", 4, 5, 5, make=lambda: nn.InstanceNorm2d(4, affine=True), looped=True),
    of_layer("prelu", 4, 3, 3, make=lambda: nn.PReLU(4), looped=True),
    of_layer("weight-norm", 5, 4, make=lambda: parametrizations.weight_norm(nn.Linear(4, 3))),
    of_layer(
        "weight-norm-conv", 4, 5, make=lambda: parametrizations.weight_norm(nn.Conv1d(4, 3, 3))
    ),
    of_layer("spectral-norm", 5, 4, make=lambda: parametrizations.spectral_norm(nn.Linear(4, 3))),
    of_layer("orthogonal", 5, 4, make=lambda: parametrizations.orthogonal(nn.Linear(4, 4))),
    Model("embedding", lambda: looking_up(nn.Embedding)),
    Model("embedding-padding", lambda: looking_up(nn.Embedding, padding_idx=-2)),
    Model(
        "embedding-frequency", lambda: looking_up(nn.Embedding, scale_grad_by_freq=True), ("0.*",)
    ),
    Model("embedding-bag", lambda: looking_up(nn.EmbeddingBag), ("0.*",)),
    Model("tied", tied),
    Model("attention", lambda: attention(batch_first=True)),
    Model("attention-time-first", lambda: attention(batch_first=False)),
    Model("attention-masked", lambda: attention(batch_first=True, masked=True)),
    Model("attention-across", lambda: attention(batch_first=True, across=True)),
    Model("attention-of-other-widths", lambda: attention(across=True, kdim=3, vdim=2)),
    Model("attention-biased", lambda: attention(add_bias_kv=True), ("attention.*",)),
    Model("transformer", lambda: transformer(), ()),
    *(
        Model(
            f"{kind}-{name}",
            partial(recurrent, getattr(nn, kind), **options),
        )
        for kind, name, options in RECURRENT
    ),
    *(
        Model(f"{kind.__name__}", partial(stepwise, kind))
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ),
    Model("twice", lambda: function(lambda m, x: m.f(m.f(x).tanh()), f=nn.Linear(3, 3))),
    Model(
        "twice-conv",
        lambda: function(lambda m, x: m.f(m.f(x).tanh()), 3, 5, 5, f=nn.Conv2d(3, 3, 3, padding=1)),
    ),
    Model(
        "shifts-and-scales",
        lambda: function(
            shifts_and_scales, *(5, 3), linear=nn.Linear(3, 3), **parts(**POINTWISE_PARTS)
        ),
    ),
    Model(
        "low-rank-update",
        lambda: function(
            lambda m, x: F.linear(x, m.weight + m.a @ m.b).tanh(),
            **parts(weight=(4, 3), a=(4, 2), b=(2, 3)),
        ),
    ),
    Model(
        "transposed-weight",
        lambda: function(
            lambda m, x: F.linear(F.linear(x, m.weight, bias=m.bias).tanh(), weight=m.weight.t()),
            **parts(weight=(4, 3), bias=(4,)),
        ),
    ),
    Model(
        "halves-of-a-weight",
        lambda: function(
            lambda m, x: F.linear(F.linear(x, m.weight[:3]).tanh(), m.weight[3:]),
            **parts(weight=(6, 3)),
        ),
    ),
    Model(
        "matmul",
        lambda: function(
            lambda m, x: torch.addmm(m.b, (x @ m.w).tanh().matmul(m.u).tanh(), m.v),
            **parts(w=(3, 4), u=(4, 3), b=(2,), v=(3, 2)),
        ),
    ),
    Model(
        "matmul-weight-first",
        lambda: function(lambda m, x: m.w @ x, 5, 3, **parts(w=(2, 5))),
    ),
    Model(
        "einsum",
        lambda: function(lambda m, x: torch.einsum("bi,io->bo", x, m.w), **parts(w=(3, 4))),
    ),
    Model(
        "class-token",
        lambda: function(
            with_class_token,
            5,
            3,
            linear=nn.Linear(3, 3),
            out=nn.Linear(3, 2),
            **parts(token=(1, 1, 3)),
        ),
    ),
    Model(
        "expanded-time-embedding",
        lambda: function(
            with_a_time_embedding,
            *(3, 5, 5),
            embed=nn.Linear(6, 4),
            shift=nn.Linear(4, 3),
            scale=nn.Linear(4, 3),
            conv=nn.Conv2d(3, 3, 3),
        ),
    ),
    Model(
        "unused", lambda: function(lambda m, x: m.f(x), f=nn.Linear(3, 2), unused=nn.Linear(3, 3))
    ),
    Model(
        "in-place-sum",
        lambda: function(
            lambda m, x: m.out(m.f(x).add_(m.p).relu_()),
            f=nn.Linear(3, 4),
            out=nn.Linear(4, 2),
            **parts(p=(4,)),
        ),
    ),
    Model(
        "changed-after-use",
        lambda: function(changed_after_use, linear=nn.Linear(3, 3), **parts(shift=(3,))),
    ),
    Model(
        "written-into-zeros",
        lambda: function(written_into_zeros, linear=nn.Linear(3, 3), out=nn.Linear(5, 2)),
    ),
    Model(
        "custom-function",
        lambda: function(
            lambda m, x: m.out(Scale.apply(m.f(x), m.w)),
            f=nn.Linear(3, 3),
            out=nn.Linear(3, 2),
            **parts(w=(3,)),
        ),
        ("w",),
        warns=False,
    ),
    Model(
        "time-first",
        lambda: function(
            lambda m, x: m.f(x.transpose(0, 1)).transpose(0, 1), 5, 3, f=nn.Linear(3, 2)
        ),
    ),
    Model(
        "vmap",
        lambda: function(lambda m, x: torch.vmap(m.f)(x).tanh(), f=nn.Linear(3, 2)),
        ("*",),
    ),
    Model(
        "score-of-an-energy",
        lambda: function(score_of_an_energy, energy=nn.Linear(3, 3), **parts(shift=(3,))),
        ("energy.weight", "energy.bias", "shift"),
    ),
    Model(
        "experts",
        lambda: function(through_experts, 5, 3, one=nn.Linear(3, 3), two=nn.Linear(3, 3)),
    ),
    *FOREIGN,
)


#: Models that take seconds, each with a quicker one of its family: what holds beside exact norms is
#: tested on these in `make test-slow`.
HEAVY = frozenset(
    {
        *("stable-diffusion", "sdxl", "latent-diffusion", "ddpm-of-labels", "ddpm-draws"),
        *("ddpm-l1", "ddpm-vlb", "autoencoder-iwae", "normflows-glow"),
    }
)


def slow_if_heavy(case: Model, *marks: pytest.MarkDecorator) -> Any:
    """A model as a parameter, which is slow if it takes long."""
    slow = (pytest.mark.slow,) if case.name in HEAVY else ()
    return pytest.param(case, id=case.name, marks=(*marks, *slow))


def model(name: str) -> Model:
    return next(model for model in MODELS if model.name == name)
