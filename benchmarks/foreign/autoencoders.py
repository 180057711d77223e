"""Autoencoders: pythae, vector_quantize_pytorch, of graphs with torch_geometric, and of sets."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.foreign.case import Case, Density, Foreign

__all__ = ["CASES"]

SIZE = (1, 12, 12)


def bound(net: Any, x: Tensor) -> Tensor:
    """The lower bound at the mean of pythae's posterior, up to a constant."""
    encoded = net.encoder(x)
    mean, log_variance = encoded.embedding, encoded.log_covariance
    z, prior = through(net, mean)
    errors = (net.decoder(z).reconstruction - x).square().flatten(1).sum(1)
    return prior + 0.5 * log_variance.sum(1) - 0.5 * errors


def through(net: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """What the decoder is given for a draw z, and the log-density of that."""
    if hasattr(net, "iaf_flow"):
        found = net.iaf_flow.inverse(z)
        return found.out, found.log_abs_det_jac - 0.5 * found.out.square().sum(1)
    if hasattr(net, "net"):  # its linear flows, one after the other
        total = z.new_zeros(len(z))
        for flow in net.net:
            found = flow(z)
            z, total = found.out, total + found.log_abs_det_jac
        return z, total - 0.5 * z.square().sum(1)
    if hasattr(net, "pseudo_inputs"):
        return z, net._log_p_z(z)
    return z, -0.5 * z.square().sum(1)


def pythae(batch: int, *, kind: str, **options: Any) -> Case:
    from pythae import models

    config = getattr(models, f"{kind}{'_' if '_' in kind else ''}Config")
    net = getattr(models, kind)(config(input_dim=SIZE, latent_dim=8, **options))
    if kind == "VAMP":  # a tensor that is no buffer would stay in single precision
        net.register_buffer("idle_input", net.__dict__.pop("idle_input"))
    return Density(net, bound), torch.rand(batch, *SIZE)


def convolutional(batch: int) -> Case:
    """Its convolutional networks for MNIST, whose batch normalisations are in eval mode."""
    from pythae import models
    from pythae.models.nn.benchmarks import mnist

    config = models.VAEConfig(input_dim=(1, 28, 28), latent_dim=8)
    parts = mnist.Encoder_Conv_VAE_MNIST(config), mnist.Decoder_Conv_AE_MNIST(config)
    return Density(models.VAE(config, *parts), bound), torch.rand(batch, 1, 28, 28)


class Quantised(nn.Module):
    def __init__(self, quantiser: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, width, 3, padding=1)
        )
        self.quantiser = quantiser
        self.decoder = nn.Sequential(
            nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x).flatten(2).mT
        quantised = self.quantiser(encoded)[0]
        decoded = self.decoder(quantised.mT.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2)))
        return -0.5 * (decoded - x).square().flatten(1).sum(1)


def quantised(batch: int, *, kind: str, width: int, **options: Any) -> Case:
    import vector_quantize_pytorch as package

    net = Quantised(getattr(package, kind)(**options), width)
    return Density(net, lambda net, x: net.log_prob(x)), torch.rand(batch, *SIZE)


# Graphs


class GraphVAE(nn.Module):
    """As torch_geometric's VGAE, on B graphs in one, whose nodes are rows."""

    def __init__(self, width: int, layer: str) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        kind = getattr(layers, layer)
        self.first, self.posterior = kind(8, width), kind(width, 16)
        self.decoder = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))

    def log_prob(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """Of graphs (B, N, 8) of the edges (B, 2, E)."""
        count = nodes.shape[1]
        first = count * torch.arange(len(nodes), device=nodes.device)
        joined = (edges + first[:, None, None]).transpose(0, 1).flatten(1)
        rows = nodes.flatten(0, 1)
        mean, log_variance = self.posterior(self.first(rows, joined).relu(), joined).chunk(2, 1)
        errors = (self.decoder(mean) - rows).square().sum(1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        linked = nn.functional.logsigmoid((mean[joined[0]] * mean[joined[1]]).sum(1))
        of_nodes = -(0.5 * errors + kl).view(len(nodes), count).sum(1)
        return of_nodes + linked.view(len(nodes), -1).sum(1)


def graphs(batch: int, *, layer: str, width: int = 32, nodes: int = 12, edges: int = 30) -> Case:
    samples = torch.randn(batch, nodes, 8), torch.randint(nodes, (batch, 2, edges))
    return Density(GraphVAE(width, layer), lambda net, batch: net.log_prob(*batch)), samples


VECTORS = {"dim": 16, "codebook_size": 64, "learnable_codebook": True, "ema_update": False}
GRAPH = {"width": 6, "nodes": 4, "edges": 7}

CASES: tuple[Foreign, ...] = (
    Foreign("pythae VAE", "pythae", partial(pythae, kind="VAE")),
    Foreign("pythae convolutional VAE", "pythae", convolutional, 16),
    Foreign("pythae VAE with IAF", "pythae", partial(pythae, kind="VAE_IAF")),
    Foreign(
        "pythae VAE with planar and radial flows",
        "pythae",
        partial(pythae, kind="VAE_LinNF", flows=["Planar", "Radial", "Planar"]),
    ),
    Foreign("pythae VampPrior", "pythae", partial(pythae, kind="VAMP")),
    Foreign(
        "VQ-VAE",
        "vector_quantize_pytorch",
        partial(quantised, kind="VectorQuantize", width=16, **VECTORS),
    ),
    Foreign(
        "FSQ-VAE",
        "vector_quantize_pytorch",
        partial(quantised, kind="FSQ", width=16, levels=[5, 5, 5], dim=16),
    ),
    *(
        Foreign(f"graph VAE, {layer}", "torch_geometric", partial(graphs, layer=layer), small=GRAPH)
        for layer in ("GCNConv", "GATConv", "SAGEConv", "GraphConv")
    ),
)
