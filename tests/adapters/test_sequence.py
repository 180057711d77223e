"""Likelihoods of sequences against a loop of cross-entropies."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import checked_terms

VOCABULARY = 11


class Bigram(nn.Module):
    """Logits of the next token from the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Any:
        return self.logits(tokens)


class HuggingFace(Bigram):
    """The same with the attribute of transformers' outputs."""

    def forward(self, tokens: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(tokens))


class WithALoss(Bigram):
    """The same beside a loss."""

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens), None


class Nameless(Bigram):
    def forward(self, tokens: Tensor) -> Any:
        return {"scores": super().forward(tokens)}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def tokens(n: int = 4, length: int = 7) -> Tensor:
    return torch.randint(1, VOCABULARY, (n, length))


def log_likelihood(adapter: om.Adapter, batch: Any) -> Tensor:
    [(term, value)] = checked_terms(adapter, batch)
    assert term == "log_likelihood"
    return value.detach()


def cross_entropies(module: nn.Module, x: Tensor, padding: int | None = None) -> Tensor:
    """Minus the summed cross-entropy, sample by sample and token by token."""
    totals = []
    for row in x:
        logits = module(row[None])
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits = getattr(logits, "logits", logits)[0].detach()
        losses = [
            F.cross_entropy(logits[t][None], row[t + 1][None])
            for t in range(len(row) - 1)
            if row[t + 1] != padding
        ]
        totals.append(-sum(losses))
    return torch.stack(totals)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Bigram, HuggingFace, WithALoss, gpt2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_likelihood_is_minus_the_cross_entropies(make: Any, dtype: torch.dtype) -> None:
    module, x = make(), tokens()
    found = log_likelihood(om.SequenceLikelihood(module), x.to(dtype))
    torch.testing.assert_close(found, cross_entropies(module, x))


@pytest.mark.parametrize("make", [Bigram, gpt2])
def test_padding_is_left_out(make: Any) -> None:
    module, x = make(), tokens()
    x[1, 3:], x[2, 6:], x[3, 2:] = 0, 0, 0
    found = log_likelihood(om.SequenceLikelihood(module, padding=0), x)
    torch.testing.assert_close(found, cross_entropies(module, x, padding=0))


@pytest.mark.parametrize("make", [Bigram, gpt2])
def test_padded_sequence_is_as_likely_as_it_is_alone(make: Any) -> None:
    adapter, x = om.SequenceLikelihood(make(), padding=0), tokens()
    padded = F.pad(x[:, :4], (0, 3), value=0)
    torch.testing.assert_close(log_likelihood(adapter, padded), log_likelihood(adapter, x[:, :4]))


def test_probabilities_of_all_sequences_add_up_to_one() -> None:
    every = torch.cartesian_prod(torch.tensor([3]), *[torch.arange(VOCABULARY)] * 3)
    probability = log_likelihood(om.SequenceLikelihood(gpt2()), every).exp()
    assert probability.sum().item() == pytest.approx(1.0, rel=1e-9)


def test_first_token_is_given() -> None:
    [(_, one)] = checked_terms(om.SequenceLikelihood(Bigram()), torch.tensor([[3, 5]]))
    assert one.item() < 0
    all_seconds = torch.stack([torch.full((VOCABULARY,), 3), torch.arange(VOCABULARY)], 1)
    total = log_likelihood(om.SequenceLikelihood(Bigram()), all_seconds).exp().sum()
    assert total.item() == pytest.approx(1.0)


def test_sequence_has_the_same_likelihood_alone_and_in_a_batch() -> None:
    adapter, x = om.SequenceLikelihood(gpt2()), tokens()
    alone = torch.cat([log_likelihood(adapter, row[None]) for row in x])
    torch.testing.assert_close(alone, log_likelihood(adapter, x))


@pytest.mark.parametrize("make", [Bigram, gpt2])
def test_a_mean_is_over_the_tokens_that_are_predicted(make: Any) -> None:
    module, x = make(), tokens()
    x[1, 3:], x[2, 6:], x[3, 2:] = 0, 0, 0
    found = log_likelihood(om.SequenceLikelihood(module, padding=0, per_token=True), x)
    counts = torch.tensor([6, 2, 5, 1])
    torch.testing.assert_close(found, cross_entropies(module, x, padding=0) / counts)


def masked(module: nn.Module, **options: Any) -> om.SequenceLikelihood:
    """As for what tokenizers give."""
    return om.SequenceLikelihood(
        module,
        inputs=lambda batch: batch["input_ids"],
        condition=lambda batch: {"attention_mask": batch["attention_mask"]},
        **options,
    )


def test_tokens_that_a_mask_hides_are_left_out() -> None:
    module, x = gpt2(), tokens()
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [2]])).long()
    found = log_likelihood(masked(module), {"input_ids": x, "attention_mask": mask})
    alone = [cross_entropies(module, x[[i], : int(mask[i].sum())]) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(alone))


def test_a_mask_keeps_the_end_token_that_pads_and_ends() -> None:
    module, x = gpt2(), tokens(2, 5)
    x[:, 3:] = 0  # the first ends the sequence, the second fills it up
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 2)
    found = log_likelihood(masked(module), {"input_ids": x, "attention_mask": mask})
    torch.testing.assert_close(found, cross_entropies(module, x[:, :4]))


# Labels, as transformers' collators give them


def labelled(x: Tensor, ignored: list[list[int]], left: int = 0, right: int = 0) -> dict[str, Any]:
    """A padded batch, of which some tokens of each row are ignored."""
    labels = x.clone()
    for row, columns in enumerate(ignored):
        labels[row, columns] = -100
    mask = F.pad(torch.ones_like(x), (left, right))
    return {
        "input_ids": F.pad(x, (left, right), value=9),
        "attention_mask": mask,
        "labels": F.pad(labels, (left, right), value=-100),
    }


#: Columns that are ignored in each of two rows: prompts, a turn in between, the first token alone.
IGNORED = {"prompts": [[0, 1, 2], [0]], "turns": [[0, 1, 4, 5], [0, 3]], "first": [[0], [0]]}


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 3), (3, 0), (2, 2)])
def test_tokens_whose_labels_are_ignored_are_not_scored(
    ignored: list[list[int]], left: int, right: int
) -> None:
    module, x = gpt2(), tokens(2)
    batch = labelled(x, ignored, left, right)
    found = log_likelihood(om.SequenceLikelihood(module, ignore_index=-100), batch)
    expected = torch.zeros(2, dtype=found.dtype)
    for row, columns in enumerate(ignored):
        log_prob = module(x[[row]]).logits[0].log_softmax(-1)
        kept = [t for t in range(1, x.shape[1]) if t not in columns]
        expected[row] = sum(log_prob[t - 1, x[row, t]] for t in kept)
    torch.testing.assert_close(found, expected)


def test_the_loss_of_transformers_is_the_mean_over_the_same_tokens() -> None:
    module, batch = gpt2(), labelled(tokens(2), IGNORED["turns"], right=1)
    adapter = om.SequenceLikelihood(module, ignore_index=-100)
    count = int((batch["labels"][:, 1:] != -100).sum())
    loss = -log_likelihood(adapter, batch).sum() / count
    torch.testing.assert_close(loss.float(), module(**batch).loss)  # which it takes in float32


#: What makes a batch of labels none, and what is said.
WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "shifted": (lambda b: {**b, "labels": b["labels"].roll(-1, 1)}, "labels that are the tokens"),
    "shape": (lambda b: {**b, "labels": b["labels"][:, 1:]}, "labels of the tokens' shape"),
    "none": (lambda b: {k: v for k, v in b.items() if k != "labels"}, "a tensor 'labels'"),
    "all ignored": (lambda b: {**b, "labels": b["labels"] * 0 - 100}, "only given or ignored"),
    "further": (lambda b: {**b, "pixel_values": torch.zeros(2, 3)}, "got pixel_values beside"),
    "no tokens": (lambda b: {"labels": b["labels"]}, "a tensor 'input_ids'"),
    "packed": (
        lambda b: {**b, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)},
        "one text a row",
    ),
}


@pytest.mark.parametrize("change", WRONG)
def test_labels_that_mean_something_else_are_refused(change: str) -> None:
    made, told = WRONG[change]
    batch = made(labelled(tokens(2), IGNORED["first"]))
    with pytest.raises(ValueError, match=told):
        log_likelihood(om.SequenceLikelihood(gpt2(), ignore_index=-100), batch)


# Pixels


class Pixels(nn.Module):
    """Logits of each pixel's four values from the pixel on its left, (B, 4, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.following = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        known = self.following[(4 * x[..., :-1]).long()]
        first = self.first.expand(*x.shape[:-1], 1, 4)
        return torch.cat([first, known], -2).movedim(-1, 1)


def pixels(**options: Any) -> om.SequenceLikelihood:
    return om.SequenceLikelihood(
        Pixels(), shifted=False, class_dim=1, scale=lambda x: x / 4, **options
    )


def test_likelihood_of_pixels_is_minus_their_cross_entropies() -> None:
    adapter, x = pixels(), torch.randint(4, (3, 1, 5, 6))
    losses = F.cross_entropy(adapter.module(x / 4), x, reduction="none")
    torch.testing.assert_close(log_likelihood(adapter, x), -losses.detach().flatten(1).sum(1))
    mean = pixels(per_token=True)
    mean.module.load_state_dict(adapter.module.state_dict())
    torch.testing.assert_close(log_likelihood(mean, x), -losses.detach().flatten(1).mean(1))


def test_probabilities_of_all_images_add_up_to_one() -> None:
    every = torch.cartesian_prod(*[torch.arange(4)] * 4).reshape(-1, 1, 2, 2)
    assert log_likelihood(pixels(), every).exp().sum().item() == pytest.approx(1.0)


def test_padding_has_no_gradient() -> None:
    adapter = om.SequenceLikelihood(gpt2(), padding=0)
    x = F.pad(tokens(length=4), (0, 3), value=0)
    padded = om.gradient_norms(adapter, x)
    alone = om.gradient_norms(adapter, x[:, :4])
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 3), torch.ones(2, 1).long(), torch.ones(2).long(), torch.ones(2, 3, 4).long()],
    ids=["floating-point", "one token", "one dimension", "three dimensions"],
)
def test_what_are_no_tokens_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"integer tokens \(B, T\) with T >= 2, got a tensor"):
        log_likelihood(om.SequenceLikelihood(Bigram()), x)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    adapter = om.SequenceLikelihood(gpt2())
    assert log_likelihood(adapter, tokens(length=8)).shape == (4,)
    with pytest.raises(ValueError, match=r"at most 8 tokens, the context of GPT2LM.*, got 9"):
        log_likelihood(adapter, tokens(length=9))


@pytest.mark.parametrize("per_token", [False, True])
def test_a_sequence_of_nothing_but_padding_is_refused(per_token: bool) -> None:
    x = tokens()
    x[2], x[3, 1:] = 0, 0  # of the fourth the only token is given, not predicted
    adapter = om.SequenceLikelihood(gpt2(), padding=0, per_token=per_token)
    with pytest.raises(ValueError, match=r"padding only,.* in 2 of 4, first at index 2"):
        log_likelihood(adapter, x)
    hidden = {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 7, [0] * 7] * 2)}
    with pytest.raises(ValueError, match=r"padding only,.* in 2 of 4, first at index 1"):
        log_likelihood(masked(gpt2(), per_token=per_token), hidden)


def test_tokens_below_zero_are_refused() -> None:
    x = tokens()
    x[1, 2] = -100
    with pytest.raises(ValueError, match="tokens from 0 on, got -100"):
        log_likelihood(om.SequenceLikelihood(Bigram()), x)


@pytest.mark.parametrize("shape", [(VOCABULARY, 7), (7,), (9, VOCABULARY)], ids=str)
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    module = Bigram()
    module.forward = lambda x: torch.zeros(len(x), *shape)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="logits"):
        log_likelihood(om.SequenceLikelihood(module), tokens())


def test_what_is_no_logits_is_named() -> None:
    with pytest.raises(ValueError, match=r"Nameless to give logits, a tensor, .* got dict"):
        list(om.SequenceLikelihood(Nameless()).log_likelihood(tokens()))
