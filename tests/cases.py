"""Models and batches, as data: every test of what holds for all models runs over `MODELS`."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import diffusers
import normflows
import torch
import torch.nn.functional as F
import transformers
import zuko
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ood_monitor as om
from ood_monitor.adapters.base import Batch, map_tensors

__all__ = ["MODELS", "Function", "Gaussian", "Model", "model", "unet"]


#: An adapter and a batch of it.
Case: TypeAlias = tuple[om.Adapter, Batch]


class Gaussian(om.Adapter):
    """Log-density of ones around the output of a network, up to a constant."""

    def __init__(
        self, module: nn.Module, forward: Callable[..., Tensor] = lambda module, x: module(x)
    ) -> None:
        self.module, self._forward = module, forward

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        arguments = batch if isinstance(batch, tuple) else (batch,)
        output = self._forward(self.module, *arguments)
        yield "log_likelihood", -0.5 * (output - 1).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Model:
    """One case: a model under an adapter, and what the engine makes of it.

    Attributes:
        name: Its name.
        make: Gives the adapter and a batch of four samples, in single precision.
        looped: Patterns of the parameters that no rule covers.
        warns: Whether only the comparison with the loop over samples finds them.
    """

    name: str
    make: Callable[[], Case]
    looped: tuple[str, ...] = ()
    warns: bool = False

    def __call__(self, dtype: torch.dtype = torch.float64) -> Case:
        """The model, in eval mode and off its initial values, which are often zero; its batch."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapter, batch = self.make()
            perturbed(adapter.module)
        nn.Module.to(adapter.module.eval(), dtype)  # diffusers' own `to` logs a warning
        return adapter, map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def perturbed(module: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


class Function(nn.Module):
    """A module of parameters and submodules by name, whose output a function of it gives."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Tensor | nn.Module) -> None:
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(self, *inputs)


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
            padding = (x[..., 0] > 1) & (torch.arange(5) > 0)
            masks = {"key_padding_mask": padding, "attn_mask": torch.ones(5, 5).triu(1).bool()}
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
    t = 50 * torch.ones(len(x), 1, dtype=x.dtype)
    embedding = m.embed((t / torch.arange(1, 7, dtype=x.dtype)).sin()).tanh()
    shift, scale = m.shift(embedding)[:, :, None, None], m.scale(embedding)[:, :, None, None]
    return m.conv(x * (1 + scale) + shift)


def written_into_zeros(m: Any, x: Tensor) -> Tensor:
    canvas = torch.zeros(len(x), 5, dtype=x.dtype)
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


# Foreign models


def diffusion(network: nn.Module, *shape: int) -> Case:
    schedule = diffusers.DDPMScheduler()
    return om.DenoisingBound(network, schedule, levels=[10, 500]), torch.randn(4, *shape)


def unet(**options: Any) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def conditional_unet() -> Case:
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    batch = torch.randn(4, 4, 8, 8), torch.tensor([1, 9, 99, 999]), torch.randn(4, 5, 6)
    return Gaussian(net, lambda net, x, t, text: net(x, t, text).sample), batch


def autoencoder() -> Case:
    net = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    return om.ELBO(net), torch.randn(4, 3, 8, 8)


def dit() -> Case:
    net = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_embeds_ada_norm=1000,
    )
    batch = torch.randn(4, 4, 8, 8), torch.tensor([1, 9, 99, 999]), torch.randint(1000, (4,))

    def forward(net: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return net(x, timestep=t, class_labels=labels).sample

    return Gaussian(net, forward), batch


def flux() -> Case:
    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    image_ids, text_ids = torch.zeros(9, 3), torch.zeros(5, 3)
    image_ids[:, 1:] = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))

    def forward(net: nn.Module, x: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> Tensor:
        guidance = torch.full_like(t, 3.5)
        ids = {"img_ids": image_ids.to(x), "txt_ids": text_ids.to(x)}
        return net(x, text, pooled, timestep=t, guidance=guidance, **ids).sample

    batch = torch.randn(4, 9, 4), torch.randn(4, 5, 6), torch.randn(4, 5), torch.rand(4)
    return Gaussian(net, forward), batch


def glow() -> Case:
    net = om.models.Glow(channels=1, size=8, levels=2, steps=2, hidden=6)
    return om.LogLikelihood(net, bins=256), torch.rand(4, 1, 8, 8)


def foreign_glow() -> Case:
    """normflows' Glow on labelled images: log_prob(x, y), which adds up log-dets in place."""
    with warnings.catch_warnings():  # its initialisation calls what PyTorch has renamed
        warnings.filterwarnings("ignore", "torch.lu is deprecated", UserWarning)
        flows = [[normflows.flows.GlowBlock(c, 5) for _ in range(2)] for c in (8, 4)]
    priors = [normflows.distributions.ClassCondDiagGaussian(s, 3) for s in ((8, 2, 2), (2, 4, 4))]
    squeezes = [normflows.flows.Squeeze(), normflows.flows.Squeeze()]
    for level, squeeze in zip(flows, squeezes, strict=True):
        level.append(squeeze)
    net = normflows.MultiscaleFlow(priors, flows, [normflows.flows.Merge()], class_cond=True)
    batch = torch.randn(4, 1, 8, 8), torch.randint(3, (4,))
    net.log_prob(*batch)  # the first batch sets the activation normalisations
    return Likelihood(net), batch


class Likelihood(om.Adapter):
    """log_prob(*batch)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        yield "log_likelihood", self.module.log_prob(*batch)


def zuko_flow(make: Callable[..., nn.Module], **options: Any) -> Case:
    net = make(features=3, context=2, transforms=2, hidden_features=(6,), **options)
    batch = torch.randn(4, 5)

    def log_prob(net: nn.Module, x: Tensor) -> Tensor:
        return net(x[:, 3:]).log_prob(x[:, :3])

    return om.LogLikelihood(net, log_prob), batch


def gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=6,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return om.SequenceLikelihood(transformers.GPT2LMHeadModel(config), padding=0), torch.randint(
        11, (4, 7)
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
    Model(
        "lstm",
        lambda: function(
            lambda m, x: m.out(m.lstm(x)[0]),
            *(5, 3),
            lstm=nn.LSTM(3, 4, batch_first=True),
            out=nn.Linear(4, 2),
        ),
        ("lstm.*",),
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
        ("w",),
    ),
    Model(
        "einsum",
        lambda: function(lambda m, x: torch.einsum("bi,io->bo", x, m.w), **parts(w=(3, 4))),
        ("w",),
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
        ("p",),
    ),
    Model(
        "changed-after-use",
        lambda: function(changed_after_use, linear=nn.Linear(3, 3), **parts(shift=(3,))),
        ("shift",),
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
        warns=True,
    ),
    Model(
        "time-first",
        lambda: function(
            lambda m, x: m.f(x.transpose(0, 1)).transpose(0, 1), 5, 3, f=nn.Linear(3, 2)
        ),
        ("f.*",),
    ),
    Model(
        "vmap",
        lambda: function(lambda m, x: torch.vmap(m.f)(x).tanh(), f=nn.Linear(3, 2)),
        ("*",),
        warns=True,
    ),
    Model(
        "score-of-an-energy",
        lambda: function(score_of_an_energy, energy=nn.Linear(3, 3), **parts(shift=(3,))),
        ("energy.weight",),
        warns=True,
    ),
    Model(
        "experts",
        lambda: function(through_experts, 5, 3, one=nn.Linear(3, 3), two=nn.Linear(3, 3)),
        ("*",),
    ),
    Model("unet", lambda: diffusion(unet(), 3, 8, 8)),
    Model("conditional-unet", conditional_unet),
    Model("autoencoder", autoencoder),
    Model("dit", dit),
    Model("flux", flux),
    Model("glow", glow),
    Model("normflows-glow", foreign_glow, ("q0.*", "flows.*.log_S", "flows.*.flows.2.s")),
    Model("zuko-maf", lambda: zuko_flow(zuko.flows.MAF)),
    # A spline unbinds pairs, which the two samples of the comparison look like.
    Model("zuko-nsf", lambda: zuko_flow(zuko.flows.NSF), ("transform.transforms.1.*",)),
    Model("gpt2", gpt2),
)


def model(name: str) -> Model:
    return next(model for model in MODELS if model.name == name)
