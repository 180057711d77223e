"""Models of plain PyTorch as their users write them: of sentences, and with a learned start."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.foreign.case import Case, Density, Foreign

__all__ = ["CASES"]


class SentenceVAE(nn.Module):
    """Of tokens (B, T): recurrent on both sides, as of Bowman et al. (2016)."""

    def __init__(self, kind: type[nn.RNNBase], vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = kind(width, 2 * width, batch_first=True)
        self.posterior = nn.Linear(2 * width, 32)
        self.start = nn.Linear(16, 2 * width)
        self.decoder = kind(width, 2 * width, batch_first=True)
        self.output = nn.Linear(2 * width, vocabulary)

    def log_likelihood(self, tokens: Tensor) -> Tensor:
        """The lower bound at the mean of the posterior, (B,)."""
        embedded = self.embedding(tokens)
        mean, log_variance = self.posterior(self.encoder(embedded)[0][:, -1]).chunk(2, 1)
        start = self.start(mean).tanh().unsqueeze(0)
        is_lstm = isinstance(self.decoder, nn.LSTM)
        state = (start, torch.zeros_like(start)) if is_lstm else start
        logits = self.output(self.decoder(embedded[:, :-1], state)[0])
        found = -F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").sum(1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return found - kl


def sentence_vae(
    batch: int, *, kind: type[nn.RNNBase], vocabulary: int = 200, width: int = 64, length: int = 20
) -> Case:
    net = SentenceVAE(kind, vocabulary, width)
    tokens = torch.randint(vocabulary, (batch, length))
    return Density(net, lambda net, tokens: net.log_likelihood(tokens)), tokens


class LearnedStart(nn.Module):
    """A prior of one learned tensor for all samples, as very deep VAEs have at their top."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 16, 8, 8))
        self.prior = nn.Sequential(
            nn.Conv2d(16, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def log_prob(self, x: Tensor) -> Tensor:
        mean = self.prior(self.start.expand(len(x), -1, -1, -1))
        return -0.5 * (mean - x).square().flatten(1).sum(1)


def learned_start(batch: int, *, width: int = 64) -> Case:
    return om.LogLikelihood(LearnedStart(width)), torch.rand(batch, 1, 8, 8)


class TimeFirst(nn.Module):
    """A transformer in PyTorch's own layout, (T, B, width)."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        first = tokens.T
        mask = nn.Transformer.generate_square_subsequent_mask(len(first)).to(self.position)
        hidden = self.layers(self.embedding(first) + self.position[: len(first)], mask=mask)
        logits: Tensor = self.output(hidden)
        return logits.transpose(0, 1)


def time_first(batch: int, *, width: int = 64, length: int = 32, vocabulary: int = 100) -> Case:
    net = TimeFirst(vocabulary, width, length)
    return om.SequenceLikelihood(net), torch.randint(vocabulary, (batch, length))


class Packed(nn.Module):
    """An LSTM on packed sequences of unlike lengths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, batch_first=True)
        self.output = nn.Linear(width, 8)


def of_packed(net: Any, b: dict[str, Tensor]) -> Tensor:
    x, lengths = b["x"], b["lengths"]
    packed = nn.utils.rnn.pack_padded_sequence(
        x[:, :-1], lengths - 1, batch_first=True, enforce_sorted=False
    )
    hidden, _ = nn.utils.rnn.pad_packed_sequence(
        net.lstm(packed)[0], batch_first=True, total_length=x.shape[1] - 1
    )
    counted = torch.arange(1, x.shape[1]) < lengths[:, None]
    errors = (net.output(hidden) - x[:, 1:]).square().sum(2)
    return -0.5 * (errors * counted).sum(1)


def packed(batch: int, *, width: int = 64, length: int = 20) -> Case:
    lengths = torch.randint(3, length + 1, (batch,))
    samples = {"x": torch.randn(batch, length, 8), "lengths": lengths}
    return Density(Packed(width), of_packed), samples


TOKENS = {"vocabulary": 11, "width": 8, "length": 5}

CASES: tuple[Foreign, ...] = (
    Foreign(
        "GRU sentence VAE", "torch", partial(sentence_vae, kind=nn.GRU), target=5, small=TOKENS
    ),
    Foreign(
        "LSTM sentence VAE", "torch", partial(sentence_vae, kind=nn.LSTM), target=5, small=TOKENS
    ),
    Foreign("packed LSTM", "torch", packed, small={"width": 6, "length": 7}),
    Foreign("time-first transformer", "torch", time_first, small=TOKENS),
    *(
        Foreign(
            f"learned start state, B = {batch}",
            "torch",
            learned_start,
            batch,
            target=3,
            small={"width": 4},
        )
        for batch in (8, 32, 64, 128)
    ),
)
