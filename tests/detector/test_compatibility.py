"""What of a batch must be as it was in fitting, where padding may fill texts up to any width."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ood_monitor as om

VOCABULARY, PAD = 11, 0


class Model(nn.Module):
    """Causal: of positions and means over what came."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.positions = nn.Embedding(40, 6, dtype=torch.float64)
        self.out = nn.Linear(6, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        count = torch.arange(tokens.shape[1])
        hidden = (self.tokens(tokens) * self.positions(count)).cumsum(1)
        return self.out((hidden / (count[:, None] + 1)).tanh())  # type: ignore[no-any-return]


def texts(n: int, width: int, left: bool = False) -> Tensor:
    """Of 6 to 9 tokens, the same for any width."""
    x = torch.randint(1, VOCABULARY, (n, 9), generator=torch.Generator().manual_seed(0))
    lengths = 6 + torch.arange(n) % 4
    rows = [
        F.pad(row[:m], (width - m, 0) if left else (0, width - m), value=PAD)
        for row, m in zip(x, lengths.tolist(), strict=True)
    ]
    return torch.stack(rows)


def batch(n: int, width: int, left: bool = False, features: int = 9) -> dict[str, Tensor]:
    """With a mask, and with numbers that have nothing to do with the tokens."""
    tokens = texts(n, width, left)
    mask = (tokens != PAD).long()
    return {"ids": tokens, "mask": mask, "features": torch.zeros(n, features)}


def masked(module: nn.Module) -> om.SequenceLikelihood:
    return om.SequenceLikelihood(
        module,
        inputs=lambda batch: batch["ids"],
        condition=lambda batch: {"attention_mask": batch["mask"]},
    )


def by_token(module: nn.Module) -> om.SequenceLikelihood:
    return om.SequenceLikelihood(module, padding=PAD)


KINDS: dict[str, tuple[Any, Any]] = {"token": (by_token, texts), "mask": (masked, batch)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def fitted(kind: str, width: int = 12) -> om.Detector:
    make, data = KINDS[kind]
    return om.Detector(make(Model())).fit([data(120, width)], progress=False)


@every_kind
@pytest.mark.parametrize("width", [9, 12, 14, 30])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_text_has_one_score_in_any_width(kind: str, width: int, left: bool) -> None:
    detector, data = fitted(kind), KINDS[kind][1]
    expected, found = detector.score(data(8, 12)), detector.score(data(8, width, left))
    torch.testing.assert_close(found.score, expected.score)
    torch.testing.assert_close(found.p_value, expected.p_value)


@every_kind
def test_a_saved_detector_scores_any_width(kind: str, tmp_path: Path) -> None:
    detector, (make, data) = fitted(kind), KINDS[kind]
    detector.save_pretrained(tmp_path, card=False)
    loaded = om.Detector.from_pretrained(tmp_path, make(detector.adapter.module))
    expected = detector.score(data(8, 12)).score
    torch.testing.assert_close(loaded.score(data(8, 20)).score, expected)


def test_a_width_stays_checked_where_nothing_tells_padding() -> None:
    detector = om.Detector(om.SequenceLikelihood(Model())).fit([texts(120, 9)], progress=False)
    with pytest.raises(ValueError, match=r"fitted on, \(9,\) torch.int64, got \(12,\) torch.int64"):
        detector.score(texts(8, 12))


def test_what_does_not_run_along_the_tokens_stays_checked() -> None:
    detector = fitted("mask")
    for width in (9, 12, 10, 11):
        with pytest.raises(ValueError, match=r"\(9,\) torch.float32, got .*\(10,\) torch.float32"):
            detector.check(batch(8, width, features=10))
    detector.check(batch(8, 9))


def test_types_and_further_dimensions_stay_checked() -> None:
    detector = fitted("token")
    for x in (texts(8, 14).int(), texts(8, 14)[..., None], torch.rand(8, 14)):
        with pytest.raises(ValueError, match=r"fitted on, \(12,\) torch.int64, got"):
            detector.check(x)
